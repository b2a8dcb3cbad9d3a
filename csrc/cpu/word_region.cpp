// Attention of every query of a tile's captions over the keys of each of its images, forward and backward.
//
// A tile is row-major [rows, images, regions]: rows are the captions' queries one after another, offsets[c] the first
// of caption c. A BLAS has filled it with dots; the Gram products in between are a BLAS's too. Numbers of a (row,
// image) lie at image * stride + row. Threads own pairs of caption and image, whose work is independent: the same bits
// every run.

#include <algorithm>
#include <cmath>
#include <vector>

#include "jrl/cpu_math.h"
#include "jrl/registry.h"

namespace {

using jrl::infinity;

enum Prenormalize : int { kNone, kSoftmax, kL2, kL1 };

constexpr int kLeaky = 4;  // added to the above where a leaky ReLU comes first
constexpr double kSlope = 0.1, kEps = 1e-8;

// The dots of one caption with one image.
template <typename T>
struct Pair {
  int64_t rows, regions, step;  // step: from one row of the tile to the next
  const bool* mask;             // [regions], or null
  T scale;
  int how;
  bool hard;
};

template <typename T>
JRL_INLINE T rectified(T x, bool leaky) {
  return leaky && !(x > 0) ? x * T(kSlope) : x;
}

// out [rows, regions] = the dots a, normalised over the rows; column [regions] is left with the norms.
template <typename T>
JRL_INLINE void prenormalize(const Pair<T>& p, const T* a, T* out, T* column) {
  const int64_t n = p.regions;
  const bool leaky = p.how & kLeaky;
  const int how = p.how & 3;
  for (int64_t t = 0; t < p.rows; ++t)
#pragma omp simd
    for (int64_t r = 0; r < n; ++r) out[t * n + r] = rectified(a[t * p.step + r], leaky);
  if (how == kNone) return;
  std::fill(column, column + n, how == kSoftmax ? -infinity<T> : T(0));
  for (int64_t t = 0; t < p.rows; ++t) {
    const T* x = out + t * n;
    if (how == kSoftmax) {
#pragma omp simd
      for (int64_t r = 0; r < n; ++r) column[r] = x[r] > column[r] ? x[r] : column[r];
    } else if (how == kL2) {
#pragma omp simd
      for (int64_t r = 0; r < n; ++r) column[r] += x[r] * x[r];
    } else {
#pragma omp simd
      for (int64_t r = 0; r < n; ++r) column[r] += x[r] < 0 ? -x[r] : x[r];
    }
  }
  if (how == kSoftmax) {
    T* sum = column + n;
    std::fill(sum, sum + n, T(0));
    for (int64_t t = 0; t < p.rows; ++t)
#pragma omp simd
      for (int64_t r = 0; r < n; ++r) {
        const T e = jrl::exp(out[t * n + r] - column[r]);
        out[t * n + r] = e;
        sum[r] += e;
      }
    for (int64_t t = 0; t < p.rows; ++t)
#pragma omp simd
      for (int64_t r = 0; r < n; ++r) out[t * n + r] /= sum[r];
    return;
  }
  if (how == kL2)
#pragma omp simd
    for (int64_t r = 0; r < n; ++r) column[r] = std::sqrt(column[r]);
  for (int64_t t = 0; t < p.rows; ++t)
#pragma omp simd
    for (int64_t r = 0; r < n; ++r) out[t * n + r] /= column[r] + T(kEps);
}

// dz [rows, regions], the gradient of the normalised dots y, becomes that of the dots a; column holds their norms.
template <typename T>
JRL_INLINE void prenormalize_backward(const Pair<T>& p, const T* a, const T* y, T* dz, T* column) {
  const int64_t n = p.regions;
  const bool leaky = p.how & kLeaky;
  const int how = p.how & 3;
  if (how != kNone) {
    T* dot = column + n;
    std::fill(dot, dot + n, T(0));
    for (int64_t t = 0; t < p.rows; ++t)
#pragma omp simd
      for (int64_t r = 0; r < n; ++r) dot[r] += dz[t * n + r] * y[t * n + r];
    for (int64_t t = 0; t < p.rows; ++t) {
      const T* x = a + t * p.step;
      const T* of = y + t * n;
      T* d = dz + t * n;
      if (how == kSoftmax) {
#pragma omp simd
        for (int64_t r = 0; r < n; ++r) d[r] = of[r] * (d[r] - dot[r]);
      } else if (how == kL2) {
        // y = x / (q + eps) and dq/dx = x / q, which is 0 where q is.
#pragma omp simd
        for (int64_t r = 0; r < n; ++r) {
          const T q = column[r], along = rectified(x[r], leaky) / (q == 0 ? T(1) : q);
          d[r] = (d[r] - along * dot[r]) / (q + T(kEps));
        }
      } else {
#pragma omp simd
        for (int64_t r = 0; r < n; ++r) {
          const T sign = x[r] > 0 ? T(1) : (x[r] < 0 ? T(-1) : T(0));
          d[r] = (d[r] - sign * dot[r]) / (column[r] + T(kEps));
        }
      }
    }
  }
  if (leaky)
    for (int64_t t = 0; t < p.rows; ++t)
#pragma omp simd
      for (int64_t r = 0; r < n; ++r) dz[t * n + r] = a[t * p.step + r] > 0 ? dz[t * n + r] : dz[t * n + r] * T(kSlope);
}

// alpha = softmax(z) over the valid regions, or one at the first of the largest; returns their log-sum-exp (largest).
template <typename T>
JRL_INLINE T attention(const Pair<T>& p, const T* y, T* alpha) {
  const int64_t n = p.regions;
  const bool* mask = p.mask;
  T top = -infinity<T>;
  int nan = 0;
#pragma omp simd reduction(max : top) reduction(| : nan)
  for (int64_t r = 0; r < n; ++r) {
    const T z = mask && !mask[r] ? -infinity<T> : p.scale * y[r];
    nan |= z != z;
    alpha[r] = z;
    top = z > top ? z : top;
  }
  if (nan) {
    std::fill(alpha, alpha + n, std::numeric_limits<T>::quiet_NaN());
    return std::numeric_limits<T>::quiet_NaN();
  }
  if (top == -infinity<T>) {
    std::fill(alpha, alpha + n, T(0));
    return 0;
  }
  if (p.hard) {
    const int64_t best = std::find(alpha, alpha + n, top) - alpha;
    std::fill(alpha, alpha + n, T(0));
    alpha[best] = 1;
    return top;
  }
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t r = 0; r < n; ++r) {
    alpha[r] = jrl::exp(alpha[r] - top);
    sum += alpha[r];
  }
  const T share = 1 / sum;
#pragma omp simd
  for (int64_t r = 0; r < n; ++r) alpha[r] *= share;
  return top + std::log(sum);
}

template <typename T>
JRL_INLINE T dot(const T* x, const T* y, int64_t count) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i] * y[i];
  return sum;
}

// alpha may be a: a row of it is written when all of the dots' row has been read. Null agreement or log_sum_exp: not
// wanted.
template <typename T>
JRL_INLINE void attend_pair(const Pair<T>& p, const T* a, const T* u, T* alpha, T* agreement, T* log_sum_exp,
                            T* scratch) {
  const int64_t n = p.regions;
  T* weights = scratch + 2 * n;
  T* y = weights + n;
  if (p.how != kNone) prenormalize(p, a, y, scratch);
  for (int64_t t = 0; t < p.rows; ++t) {
    const T total = attention(p, p.how == kNone ? a + t * p.step : y + t * n, weights);
    if (log_sum_exp) log_sum_exp[t] = total;
    if (agreement) agreement[t] = dot(weights, (u ? u : a) + t * p.step, n);
    std::copy(weights, weights + n, alpha + t * p.step);
  }
}

JRL_CLONES void attend_of(const Pair<float>& p, const float* a, const float* u, float* w, float* n, float* l,
                          float* s) {
  attend_pair(p, a, u, w, n, l, s);
}
JRL_CLONES void attend_of(const Pair<double>& p, const double* a, const double* u, double* w, double* n, double* l,
                          double* s) {
  attend_pair(p, a, u, w, n, l, s);
}

// Of one row: dL/d(match) = g, the match n / norm and the norm, or where the match is the dot product itself, a norm of
// null.
template <typename T>
struct Upstream {
  const T* grad;
  const T* match;
  const T* norm;
};

// a becomes da; u, where given, du; h, where given (the Gram product of alpha), alpha dL/d(norm^2). Returns
// dL/d(scale).
template <typename T>
JRL_INLINE T gradient_pair(const Pair<T>& p, const Upstream<T>& up, T* a, T* u, const T* alpha, T* h, T* scratch) {
  const int64_t n = p.regions;
  T* y = scratch + 2 * n;
  T* dz = y + p.rows * n;
  const bool prenormalized = p.how != kNone && !p.hard;
  if (prenormalized) prenormalize(p, a, y, scratch);
  T dscale = 0;
  for (int64_t t = 0; t < p.rows; ++t) {
    const T* w = alpha + t * p.step;
    const T* values = (u ? u : a) + t * p.step;
    const T norm = h ? up.norm[t] : T(1), dn = up.grad[t] / norm;
    // Below the least norm the match does not depend on it.
    const T dq = norm > T(kEps) ? -up.grad[t] * up.match[t] / (2 * norm * norm) : T(0);
    T* to = dz + t * n;
    T mean = 0;
    if (!p.hard) {
      T* line = h ? h + t * p.step : nullptr;
      if (line) {
#pragma omp simd reduction(+ : mean)
        for (int64_t r = 0; r < n; ++r) {
          to[r] = dn * values[r] + 2 * dq * line[r];
          mean += w[r] * to[r];
        }
      } else {
#pragma omp simd reduction(+ : mean)
        for (int64_t r = 0; r < n; ++r) {
          to[r] = dn * values[r];
          mean += w[r] * to[r];
        }
      }
      const T* x = prenormalized ? y + t * n : a + t * p.step;
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t r = 0; r < n; ++r) {
        const T d = w[r] * (to[r] - mean);
        sum += d * x[r];
        to[r] = p.scale * d;
      }
      dscale += sum;
    } else {
      std::fill(to, to + n, T(0));
    }
    if (h)
#pragma omp simd
      for (int64_t r = 0; r < n; ++r) h[t * p.step + r] = dq * w[r];
  }
  if (prenormalized) prenormalize_backward(p, a, y, dz, scratch);
  for (int64_t t = 0; t < p.rows; ++t) {
    const T dn = up.grad[t] / (h ? up.norm[t] : T(1));
    const T* w = alpha + t * p.step;
    T* da = a + t * p.step;
    const T* d = dz + t * n;
    if (u) {
#pragma omp simd
      for (int64_t r = 0; r < n; ++r) {
        da[r] = d[r];
        u[t * p.step + r] = dn * w[r];
      }
    } else {
#pragma omp simd
      for (int64_t r = 0; r < n; ++r) da[r] = d[r] + dn * w[r];
    }
  }
  return dscale;
}

JRL_CLONES float gradient_of(const Pair<float>& p, const Upstream<float>& up, float* a, float* u, const float* w,
                             float* h, float* s) {
  return gradient_pair(p, up, a, u, w, h, s);
}
JRL_CLONES double gradient_of(const Pair<double>& p, const Upstream<double>& up, double* a, double* u, const double* w,
                              double* h, double* s) {
  return gradient_pair(p, up, a, u, w, h, s);
}

JRL_CLONES float dot_of(const float* x, const float* y, int64_t count) { return dot(x, y, count); }
JRL_CLONES double dot_of(const double* x, const double* y, int64_t count) { return dot(x, y, count); }

template <typename T>
Pair<T> pair_of(const int64_t* offsets, int64_t c, int64_t i, int64_t images, int64_t regions, const bool* key_mask,
                T scale, int how, bool hard) {
  return {offsets[c + 1] - offsets[c],
          regions,
          images * regions,
          key_mask ? key_mask + i * regions : nullptr,
          scale,
          how,
          hard};
}

int64_t longest(const int64_t* offsets, int64_t captions) {
  int64_t most = 0;
  for (int64_t c = 0; c < captions; ++c) most = std::max(most, offsets[c + 1] - offsets[c]);
  return most;
}

// alpha (which may be a) of every row and image; where not null, n = sum alpha u (u null: of a) and the log-sum-exp.
template <typename T>
int attend(const T* a, int64_t captions, const int64_t* offsets, int64_t images, int64_t regions, const bool* key_mask,
           const T* u, double scale, int how, bool hard, T* alpha, T* agreement, T* log_sum_exp, int64_t stride) {
  const int64_t scratch = (3 + (how == kNone ? 0 : longest(offsets, captions))) * regions;
#pragma omp parallel
  {
    std::vector<T> work(scratch);
#pragma omp for
    for (int64_t at = 0; at < captions * images; ++at) {
      const int64_t c = at / images, i = at % images, row = offsets[c] - offsets[0], to = i * stride + row;
      const int64_t tile = row * images * regions + i * regions;
      const Pair<T> p = pair_of<T>(offsets, c, i, images, regions, key_mask, T(scale), how, hard);
      attend_of(p, a + tile, u ? u + tile : nullptr, alpha + tile, agreement ? agreement + to : nullptr,
                log_sum_exp ? log_sum_exp + to : nullptr, work.data());
    }
  }
  return 0;
}

// match = agreement / norm in place, norm = sqrt(sum_j x y) of [rows, images, width] tiles: alpha and its Gram product,
// or the context and itself.
template <typename T>
int norms(const T* x, const T* y, int64_t rows, int64_t images, int64_t width, T* match, T* norm, int64_t stride) {
#pragma omp parallel for
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < images; ++i) {
      const int64_t tile = (row * images + i) * width, at = i * stride + row;
      const T square = dot_of(x + tile, y + tile, width);
      const T root = std::sqrt(square < 0 ? T(0) : square);
      norm[at] = root < T(kEps) ? T(kEps) : root;
      match[at] /= norm[at];
    }
  return 0;
}

// a becomes da, u du and h the weighted alpha, as in gradient_pair; dscale [captions, images].
template <typename T>
int gradient(T* a, int64_t captions, const int64_t* offsets, int64_t images, int64_t regions, const bool* key_mask,
             T* u, const T* alpha, T* h, const T* grad, const T* match, const T* norm, int64_t stride, double scale,
             int how, bool hard, T* dscale) {
  const int64_t scratch = (2 + 2 * longest(offsets, captions)) * regions;
#pragma omp parallel
  {
    std::vector<T> work(scratch);
#pragma omp for
    for (int64_t at = 0; at < captions * images; ++at) {
      const int64_t c = at / images, i = at % images, row = offsets[c] - offsets[0], from = i * stride + row;
      const int64_t tile = row * images * regions + i * regions;
      const Pair<T> p = pair_of<T>(offsets, c, i, images, regions, key_mask, T(scale), how, hard);
      const Upstream<T> up{grad + from, match + from, norm + from};
      dscale[at] =
          gradient_of(p, up, a + tile, u ? u + tile : nullptr, alpha + tile, h ? h + tile : nullptr, work.data());
    }
  }
  return 0;
}

}  // namespace

JRL_CPU_LAUNCHERS(word_region_attend, attend);
JRL_CPU_LAUNCHERS(word_region_norms, norms);
JRL_CPU_LAUNCHERS(word_region_gradient, gradient);
