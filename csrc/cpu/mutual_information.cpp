// The bounds of the mutual information over a tile of scores. A row and a column of the same image are an own pair; an
// image of -1 marks one that does not count. Own pairs are few, so that each loop runs over all columns at full width
// and corrects them afterwards.

#include <vector>

#include "jrl/cpu_math.h"
#include "jrl/registry.h"

namespace {

enum Bound { kNce = 0, kJsd = 1, kDv = 2 };

template <typename T>
JRL_INLINE T sigmoid(T u) {
  const T e = jrl::exp(u < 0 ? u : -u);
  return (u < 0 ? e : T(1)) / (T(1) + e);
}

template <typename T>
JRL_INLINE void mask_row(T* u, int64_t columns, int32_t image, const int32_t* images) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) u[j] = images[j] == image || images[j] < 0 ? -jrl::infinity<T> : u[j];
}

JRL_CLONES void mask_of(float* u, int64_t n, int32_t image, const int32_t* images) { mask_row(u, n, image, images); }
JRL_CLONES void mask_of(double* u, int64_t n, int32_t image, const int32_t* images) { mask_row(u, n, image, images); }

template <typename T>
JRL_INLINE T softplus_row(const T* u, int64_t columns, int32_t image, const int32_t* images) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < columns; ++j) {
    const T value = (u[j] < 0 ? T(0) : u[j]) + jrl::log1p_unit(jrl::exp(u[j] < 0 ? u[j] : -u[j]));
    sum += images[j] == image || images[j] < 0 ? T(0) : value;
  }
  return sum;
}

JRL_CLONES float softplus_of(const float* u, int64_t n, int32_t image, const int32_t* images) {
  return softplus_row(u, n, image, images);
}
JRL_CLONES double softplus_of(const double* u, int64_t n, int32_t image, const int32_t* images) {
  return softplus_row(u, n, image, images);
}

template <typename T>
JRL_INLINE void sigmoid_row(T* u, int64_t columns, T off) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) u[j] = off * sigmoid(u[j]);
}

JRL_CLONES void sigmoid_of(float* u, int64_t n, float off) { sigmoid_row(u, n, off); }
JRL_CLONES void sigmoid_of(double* u, int64_t n, double off) { sigmoid_row(u, n, off); }

// What a row's or the columns' share of the gradient is made of; null where not wanted.
template <typename T>
struct Side {
  const T* log_sum;
  const T* weight;
};

template <typename T>
JRL_INLINE void exp_row(T* u, int64_t columns, Side<T> x, Side<T> y) {
  if (x.weight && y.weight) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j)
      u[j] = *x.weight * jrl::exp(u[j] - *x.log_sum) + y.weight[j] * jrl::exp(u[j] - y.log_sum[j]);
  } else if (x.weight) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) u[j] = *x.weight * jrl::exp(u[j] - *x.log_sum);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) u[j] = y.weight[j] * jrl::exp(u[j] - y.log_sum[j]);
  }
}

JRL_CLONES void exp_of(float* u, int64_t n, Side<float> x, Side<float> y) { exp_row(u, n, x, y); }
JRL_CLONES void exp_of(double* u, int64_t n, Side<double> x, Side<double> y) { exp_row(u, n, x, y); }

template <typename T>
T own_gradient(T u, T own, Side<T> x, Side<T> y, int64_t j, int bound) {
  if (bound == kDv) return own;
  if (bound == kJsd) return own * sigmoid(-u);
  T slope = 0;
  if (x.weight) slope += sigmoid(*x.log_sum - u);
  if (y.weight) slope += sigmoid(y.log_sum[j] - u);
  return own * slope;
}

// All but the entries of different images become -inf.
template <typename T>
int mask(T* u, int64_t rows, int64_t columns, const int32_t* x_images, const int32_t* y_images) {
#pragma omp parallel for
  for (int64_t i = 0; i < rows; ++i) {
    T* line = u + i * columns;
    if (x_images[i] < 0) {
      for (int64_t j = 0; j < columns; ++j) line[j] = -jrl::infinity<T>;
    } else {
      mask_of(line, columns, x_images[i], y_images);
    }
  }
  return 0;
}

// sums[i] += sum_j softplus(u_ij) over different images.
template <typename T>
int softplus_sums(const T* u, int64_t rows, int64_t columns, const int32_t* x_images, const int32_t* y_images,
                  T* sums) {
#pragma omp parallel for
  for (int64_t i = 0; i < rows; ++i)
    if (x_images[i] >= 0) sums[i] += softplus_of(u + i * columns, columns, x_images[i], y_images);
  return 0;
}

// u becomes d bound / du; slopes holds that of own pairs and that of the others ("jsd").
template <typename T>
int gradient(T* u, int64_t rows, int64_t columns, const int32_t* x_images, const int32_t* y_images, const T* log_sum_x,
             const T* weight_x, const T* log_sum_y, const T* weight_y, const T* slopes, int bound) {
  const Side<T> y{log_sum_y, weight_y};
#pragma omp parallel
  {
    std::vector<T> own(columns);
#pragma omp for
    for (int64_t i = 0; i < rows; ++i) {
      T* line = u + i * columns;
      const int32_t image = x_images[i];
      const Side<T> x = weight_x ? Side<T>{log_sum_x + i, weight_x + i} : Side<T>{nullptr, nullptr};
      for (int64_t j = 0; j < columns; ++j)
        if (y_images[j] == image) own[j] = own_gradient(line[j], slopes[0], x, y, j, bound);
      if (bound == kJsd) {
        sigmoid_of(line, columns, slopes[1]);
      } else {
        exp_of(line, columns, x, y);
      }
      for (int64_t j = 0; j < columns; ++j)
        if (image < 0 || y_images[j] < 0) {
          line[j] = 0;
        } else if (y_images[j] == image) {
          line[j] = own[j];
        }
    }
  }
  return 0;
}

}  // namespace

JRL_CPU_LAUNCHERS(mutual_information_mask, mask);
JRL_CPU_LAUNCHERS(mutual_information_softplus, softplus_sums);
JRL_CPU_LAUNCHERS(mutual_information_gradient, gradient);
