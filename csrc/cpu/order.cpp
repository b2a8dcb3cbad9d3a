// Order scores -E, E_mn = sum_d max(0, y_nd - x_md)^2, of a tile of pairs, and their gradients, without anything [m, n,
// d].
//
// Threads own contiguous rows of what they write, and each sum runs over its terms in a fixed order: the same bits
// every run.

#include <algorithm>

#include "jrl/cpu_math.h"
#include "jrl/registry.h"
#include "jrl/threads.h"

namespace {

constexpr int64_t kRows = 2;  // pairs computed together: 2 x 4 sums stay in registers
constexpr int64_t kColumns = 4;
constexpr int64_t kBlock = 32;  // rows of the other side that stay in L2 while all of one side meets them

// In this order of comparison a NaN stays a NaN.
template <typename T>
JRL_INLINE T excess(T y, T x) {
  const T t = y - x;
  return T(0) > t ? T(0) : t;
}

template <typename T>
JRL_INLINE void pair_scores(const T* const* x, const T* const* y, int64_t depth, T* e) {
  T e0 = 0, e1 = 0, e2 = 0, e3 = 0, e4 = 0, e5 = 0, e6 = 0, e7 = 0;
  const T *x0 = x[0], *x1 = x[1], *y0 = y[0], *y1 = y[1], *y2 = y[2], *y3 = y[3];
#pragma omp simd reduction(+ : e0, e1, e2, e3, e4, e5, e6, e7)
  for (int64_t d = 0; d < depth; ++d) {
    const T v0 = excess(y0[d], x0[d]), v1 = excess(y1[d], x0[d]), v2 = excess(y2[d], x0[d]), v3 = excess(y3[d], x0[d]);
    const T v4 = excess(y0[d], x1[d]), v5 = excess(y1[d], x1[d]), v6 = excess(y2[d], x1[d]), v7 = excess(y3[d], x1[d]);
    e0 += v0 * v0;
    e1 += v1 * v1;
    e2 += v2 * v2;
    e3 += v3 * v3;
    e4 += v4 * v4;
    e5 += v5 * v5;
    e6 += v6 * v6;
    e7 += v7 * v7;
  }
  const T sums[] = {e0, e1, e2, e3, e4, e5, e6, e7};
  std::copy(sums, sums + kRows * kColumns, e);
}

JRL_CLONES void scores_of(const float* const* x, const float* const* y, int64_t d, float* e) {
  pair_scores(x, y, d, e);
}
JRL_CLONES void scores_of(const double* const* x, const double* const* y, int64_t d, double* e) {
  pair_scores(x, y, d, e);
}

// target += sum_q weights[q] excess, of four others at a time.
template <bool kOthersAreY, typename T>
JRL_INLINE void add_four(T* target, const T* own, const T* const* others, const T* weights, int64_t depth) {
  const T *a = others[0], *b = others[1], *c = others[2], *e = others[3];
  const T wa = weights[0], wb = weights[1], wc = weights[2], we = weights[3];
#pragma omp simd
  for (int64_t d = 0; d < depth; ++d) {
    const T o = own[d];
    const T first =
        kOthersAreY ? wa * excess(a[d], o) + wb * excess(b[d], o) : wa * excess(o, a[d]) + wb * excess(o, b[d]);
    const T second =
        kOthersAreY ? wc * excess(c[d], o) + we * excess(e[d], o) : wc * excess(o, c[d]) + we * excess(o, e[d]);
    target[d] += first + second;
  }
}

JRL_CLONES void add_to_x(float* t, const float* o, const float* const* p, const float* w, int64_t d) {
  add_four<true>(t, o, p, w, d);
}
JRL_CLONES void add_to_x(double* t, const double* o, const double* const* p, const double* w, int64_t d) {
  add_four<true>(t, o, p, w, d);
}
JRL_CLONES void add_to_y(float* t, const float* o, const float* const* p, const float* w, int64_t d) {
  add_four<false>(t, o, p, w, d);
}
JRL_CLONES void add_to_y(double* t, const double* o, const double* const* p, const double* w, int64_t d) {
  add_four<false>(t, o, p, w, d);
}

template <typename T>
int scores(const T* x, const T* y, int64_t rows, int64_t columns, int64_t depth, T* out, int64_t out_stride) {
#pragma omp parallel
  {
    const jrl::Range mine = jrl::share(rows);
    for (int64_t block = 0; block < columns; block += kBlock) {
      const int64_t end = std::min(block + kBlock, columns);
      for (int64_t i = mine.begin; i < mine.end; i += kRows) {
        // Past the end the last row repeats, so that a pair's sum does not depend on where it stands.
        const T* two[kRows] = {x + i * depth, x + std::min(i + 1, mine.end - 1) * depth};
        for (int64_t j = block; j < end; j += kColumns) {
          const T* four[kColumns];
          for (int64_t q = 0; q < kColumns; ++q) four[q] = y + std::min(j + q, end - 1) * depth;
          T e[kRows * kColumns];
          scores_of(two, four, depth, e);
          for (int64_t r = 0; r < std::min(kRows, mine.end - i); ++r)
            for (int64_t q = 0; q < std::min(kColumns, end - j); ++q)
              out[(i + r) * out_stride + j + q] = -e[r * kColumns + q];
        }
      }
    }
  }
  return 0;
}

// target[o] += sum_p factor g(o, p) excess; g(o, p) = g[o * own_stride + p * other_stride].
template <bool kOthersAreY, typename T>
void accumulate(const T* g, int64_t own_stride, int64_t other_stride, T factor, const T* own, const T* others,
                int64_t count, int64_t other_count, int64_t depth, T* target) {
#pragma omp parallel
  {
    const jrl::Range mine = jrl::share(count);
    for (int64_t block = 0; block < other_count; block += kBlock) {
      const int64_t end = std::min(block + kBlock, other_count);
      for (int64_t o = mine.begin; o < mine.end; ++o) {
        for (int64_t p = block; p < end; p += kColumns) {
          T weights[kColumns] = {};
          const T* four[kColumns];
          bool any = false;
          for (int64_t q = 0; q < kColumns; ++q) {
            four[q] = others + std::min(p + q, end - 1) * depth;
            if (p + q < end) weights[q] = factor * g[o * own_stride + (p + q) * other_stride];
            any |= weights[q] != 0;
          }
          if (!any) continue;  // a hinge loss leaves most pairs without a gradient
          if (kOthersAreY) {
            add_to_x(target + o * depth, own + o * depth, four, weights, depth);
          } else {
            add_to_y(target + o * depth, own + o * depth, four, weights, depth);
          }
        }
      }
    }
  }
}

// With v = max(0, y - x): dx += sum_n 2 g v, dy -= sum_m 2 g v; either may be null.
template <typename T>
int gradient(const T* g, int64_t g_stride, const T* x, const T* y, int64_t rows, int64_t columns, int64_t depth, T* dx,
             T* dy) {
  if (dx) accumulate<true>(g, g_stride, 1, T(2), x, y, rows, columns, depth, dx);
  if (dy) accumulate<false>(g, 1, g_stride, T(-2), y, x, columns, rows, depth, dy);
  return 0;
}

}  // namespace

JRL_CPU_LAUNCHERS(order_scores, scores);
JRL_CPU_LAUNCHERS(order_gradient, gradient);
