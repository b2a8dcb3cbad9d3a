// The sigmoid loss over a tile of logits: row sums of softplus, or dL/ds in place.

#include "jrl/cpu_math.h"
#include "jrl/registry.h"

namespace {

template <typename T>
JRL_INLINE T softplus_row(const T* s, int64_t columns) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < columns; ++j) {
    const T magnitude = s[j] < 0 ? -s[j] : s[j];
    sum += (s[j] < 0 ? T(0) : s[j]) + jrl::log1p_unit(jrl::exp(-magnitude));
  }
  return sum;
}

JRL_CLONES float softplus_of(const float* s, int64_t n) { return softplus_row(s, n); }
JRL_CLONES double softplus_of(const double* s, int64_t n) { return softplus_row(s, n); }

template <typename T>
JRL_INLINE void sigmoid_row(T* s, int64_t columns, T grad) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    const T magnitude = s[j] < 0 ? -s[j] : s[j], e = jrl::exp(-magnitude);
    s[j] = grad * (s[j] < 0 ? e : T(1)) / (T(1) + e);
  }
}

JRL_CLONES void sigmoid_of(float* s, int64_t n, float grad) { sigmoid_row(s, n, grad); }
JRL_CLONES void sigmoid_of(double* s, int64_t n, double grad) { sigmoid_row(s, n, grad); }

// sums[i] += sum_j softplus(s_ij), less s_ij where the ids are equal.
template <typename T>
int softplus_sums(const T* s, int64_t rows, int64_t columns, const int64_t* x_ids, const int64_t* y_ids, T* sums) {
#pragma omp parallel for
  for (int64_t i = 0; i < rows; ++i) {
    sums[i] += softplus_of(s + i * columns, columns);
    for (int64_t j = 0; x_ids && j < columns; ++j)
      if (x_ids[i] == y_ids[j]) sums[i] -= s[i * columns + j];
  }
  return 0;
}

// s becomes grad_i (sigmoid(s) - 1[ids equal]).
template <typename T>
int sigmoid(T* s, int64_t rows, int64_t columns, const T* grad, const int64_t* x_ids, const int64_t* y_ids) {
#pragma omp parallel for
  for (int64_t i = 0; i < rows; ++i) {
    T* line = s + i * columns;
    // sigmoid(s) - 1 = -sigmoid(-s): flipping the sign first keeps its small values exact.
    for (int64_t j = 0; x_ids && j < columns; ++j)
      if (x_ids[i] == y_ids[j]) line[j] = -line[j];
    sigmoid_of(line, columns, grad[i]);
    for (int64_t j = 0; x_ids && j < columns; ++j)
      if (x_ids[i] == y_ids[j]) line[j] = -line[j];
  }
  return 0;
}

}  // namespace

JRL_CPU_LAUNCHERS(sigmoid_contrastive_sums, softplus_sums);
JRL_CPU_LAUNCHERS(sigmoid_contrastive_gradient, sigmoid);
