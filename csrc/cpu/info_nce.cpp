// One pass over a tile of logits that a BLAS has filled: streaming log-sum-exp of its rows and columns, or dL/ds in
// place. Tiles are row-major and contiguous; ids and offsets are 64-bit.
//
// Threads own contiguous rows, each with its own column sums, joined in thread order: the same bits every run.

#include <algorithm>
#include <utility>
#include <vector>

#include "jrl/cpu_math.h"
#include "jrl/registry.h"
#include "jrl/threads.h"

namespace {

using jrl::finite_or_zero;
using jrl::infinity;
using jrl::join;

constexpr int64_t kBlock = 32;  // rows visited together: 32 x 1024 floats stay in L2

// Two references further apart than this share no exp: e^-60 is far below what a float sum can hold.
constexpr float kSpan = 60;

template <typename T>
JRL_INLINE T block_max(const T* s, int64_t count) {
  T top = -infinity<T>;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < count; ++j) top = s[j] > top ? s[j] : top;
  return top;
}

// Sums of exp(s - top) of one row, added to the columns' sums as well.
template <typename T>
JRL_INLINE T exp_row(const T* s, int64_t columns, T top, T* column_sums) {
  T sum = 0;
  if (column_sums) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < columns; ++j) {
      const T e = jrl::exp(s[j] - top);
      sum += e;
      column_sums[j] += e;
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < columns; ++j) sum += jrl::exp(s[j] - top);
  }
  return sum;
}

template <typename T>
struct Running {  // of a set of rows or of columns; null where not wanted
  T* max;
  T* sum;
};

// Rows of a block, with one exp for both directions where the block's range allows it and two where it does not.
template <typename T>
JRL_INLINE void block_statistics(const T* s, int64_t rows, int64_t columns, Running<T> row, Running<T> column,
                                 T* scratch) {
  const T top = finite_or_zero(block_max(s, rows * columns));
  T row_sums[kBlock];
  T* column_sums = column.max ? scratch : nullptr;
  if (column_sums) std::fill(column_sums, column_sums + columns, T(0));
  for (int64_t i = 0; i < rows; ++i) row_sums[i] = exp_row(s + i * columns, columns, top, column_sums);

  const T least = jrl::exp(T(-kSpan));
  bool rows_hold = true, columns_hold = true;
  for (int64_t i = 0; i < rows; ++i) rows_hold &= !(row_sums[i] < least);
  if (column_sums) {
    T lowest = infinity<T>;
#pragma omp simd reduction(min : lowest)
    for (int64_t j = 0; j < columns; ++j) lowest = column_sums[j] < lowest ? column_sums[j] : lowest;
    columns_hold = !(lowest < least);
  }
  if (row.max) {
    for (int64_t i = 0; i < rows; ++i) {
      T reference = top;
      if (!rows_hold) {
        reference = finite_or_zero(block_max(s + i * columns, columns));
        row_sums[i] = exp_row<T>(s + i * columns, columns, reference, nullptr);
      }
      join(row.max + i, row.sum + i, reference, row_sums[i]);
    }
  }
  if (!column_sums) return;
  if (columns_hold) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) join(column.max + j, column.sum + j, top, column_sums[j]);
    return;
  }
  T* column_tops = scratch + columns;
  std::fill(column_tops, column_tops + columns, -infinity<T>);
  std::fill(column_sums, column_sums + columns, T(0));
  for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j)
      column_tops[j] = s[i * columns + j] > column_tops[j] ? s[i * columns + j] : column_tops[j];
  for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j)
      column_sums[j] += jrl::exp(s[i * columns + j] - finite_or_zero(column_tops[j]));
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j)
    join(column.max + j, column.sum + j, finite_or_zero(column_tops[j]), column_sums[j]);
}

template <typename T>
JRL_INLINE void rows_statistics(const T* s, int64_t rows, int64_t columns, Running<T> row, Running<T> column,
                                T* scratch) {
  for (int64_t i = 0; i < rows; i += kBlock) {
    const Running<T> part = row.max ? Running<T>{row.max + i, row.sum + i} : row;
    block_statistics(s + i * columns, std::min(kBlock, rows - i), columns, part, column, scratch);
  }
}

// Clones are made of plain functions; templates are inlined into them.
JRL_CLONES void statistics_of(const float* s, int64_t m, int64_t n, Running<float> r, Running<float> c, float* w) {
  rows_statistics(s, m, n, r, c, w);
}
JRL_CLONES void statistics_of(const double* s, int64_t m, int64_t n, Running<double> r, Running<double> c, double* w) {
  rows_statistics(s, m, n, r, c, w);
}

// Streaming sums with everything that the statistics report; `weighted` is the sum of exp(s - max) * s.
template <typename T>
struct Detailed {
  T* max;
  T* sum;
  T* weighted;
  int64_t* argmax;
  T* candidates;
};

template <typename T>
JRL_INLINE void add_detail(const Detailed<T>& d, int64_t at, T s, int64_t index) {
  const T old = d.max[at], next = s > old ? s : old, top = finite_or_zero(next);
  const T keep = jrl::exp(old - top), e = jrl::exp(s - top);
  d.sum[at] = d.sum[at] * keep + e;
  d.weighted[at] = d.weighted[at] * keep + (s == -infinity<T> ? T(0) : e * s);
  d.argmax[at] = s > old ? index : d.argmax[at];
  d.max[at] = next;
  d.candidates[at] += s == -infinity<T> ? T(0) : T(1);
}

// A row's maximum is found first, so that its sums need one exp an entry.
template <typename T>
JRL_INLINE void row_details(const T* s, int64_t columns, const Detailed<T>& d, int64_t at, int64_t c0) {
  const T most = block_max(s, columns), old = d.max[at], next = most > old ? most : old, top = finite_or_zero(next);
  T sum = 0, weighted = 0, candidates = 0;
#pragma omp simd reduction(+ : sum, weighted, candidates)
  for (int64_t j = 0; j < columns; ++j) {
    const T e = jrl::exp(s[j] - top);
    sum += e;
    weighted += s[j] == -infinity<T> ? T(0) : e * s[j];
    candidates += s[j] == -infinity<T> ? T(0) : T(1);
  }
  const T keep = jrl::exp(old - top);
  d.sum[at] = d.sum[at] * keep + sum;
  d.weighted[at] = d.weighted[at] * keep + weighted;
  if (most > old) d.argmax[at] = c0 + (std::find(s, s + columns, most) - s);
  d.max[at] = next;
  d.candidates[at] += candidates;
}

JRL_CLONES void detail_row(const float* s, int64_t columns, Detailed<float> row, int64_t i, int64_t c0) {
  row_details(s, columns, row, i, c0);
}
JRL_CLONES void detail_row(const double* s, int64_t columns, Detailed<double> row, int64_t i, int64_t c0) {
  row_details(s, columns, row, i, c0);
}
JRL_CLONES void detail_columns(const float* s, int64_t begin, int64_t end, Detailed<float> column, int64_t index) {
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) add_detail(column, j, s[j], index);
}
JRL_CLONES void detail_columns(const double* s, int64_t begin, int64_t end, Detailed<double> column, int64_t index) {
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) add_detail(column, j, s[j], index);
}

template <typename T>
JRL_INLINE void row_gradient(T* s, int64_t columns, T top, T a, const T* b) {
  if (b) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) s[j] = jrl::exp(s[j] - top) * (a + b[j]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) s[j] = jrl::exp(s[j] - top) * a;
  }
}

// s becomes grad_x exp(s - lse_x) + grad_y exp(s - lse_y); a null side is left out.
template <typename T>
JRL_INLINE void block_gradient(T* s, int64_t rows, int64_t columns, const T* grad_x, const T* lse_x, const T* grad_y,
                               const T* lse_y, T* scratch) {
  const T top = finite_or_zero(block_max(s, rows * columns));
  bool one_exp = true;
  if (grad_x)
    for (int64_t i = 0; i < rows; ++i) one_exp &= top - lse_x[i] <= kSpan;
  if (grad_y) {
    T widest = -infinity<T>;
#pragma omp simd reduction(max : widest)
    for (int64_t j = 0; j < columns; ++j) {
      const T gap = top - lse_y[j];
      scratch[j] = grad_y[j] * jrl::exp(gap);
      widest = gap <= kSpan ? widest : infinity<T>;
    }
    one_exp &= widest <= kSpan;
  }
  for (int64_t i = 0; i < rows; ++i) {
    T* line = s + i * columns;
    if (one_exp) {
      row_gradient(line, columns, top, grad_x ? grad_x[i] * jrl::exp(top - lse_x[i]) : T(0),
                   grad_y ? scratch : nullptr);
    } else if (!grad_y) {
      row_gradient<T>(line, columns, lse_x[i], grad_x[i], nullptr);
    } else {
      const T a = grad_x ? grad_x[i] : T(0), reference = grad_x ? lse_x[i] : infinity<T>;
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) {
        line[j] = a * jrl::exp(line[j] - reference) + grad_y[j] * jrl::exp(line[j] - lse_y[j]);
      }
    }
  }
}

JRL_CLONES void gradient_of(float* s, int64_t m, int64_t n, const float* gx, const float* lx, const float* gy,
                            const float* ly, float* w) {
  block_gradient(s, m, n, gx, lx, gy, ly, w);
}
JRL_CLONES void gradient_of(double* s, int64_t m, int64_t n, const double* gx, const double* lx, const double* gy,
                            const double* ly, double* w) {
  block_gradient(s, m, n, gx, lx, gy, ly, w);
}

template <typename T>
int statistics(const T* s, int64_t rows, int64_t columns, T* row_max, T* row_sum, T* column_max, T* column_sum) {
  const int threads = jrl::threads_available();
  std::vector<T> partial(column_max ? 4 * threads * columns : 0);
#pragma omp parallel num_threads(threads)
  {
    const int t = jrl::thread_index();
    const jrl::Range mine = jrl::share(rows);
    Running<T> column{nullptr, nullptr};
    T* scratch = nullptr;
    if (column_max) {
      T* base = partial.data() + 4 * t * columns;
      column = {base, base + columns};
      scratch = base + 2 * columns;
      std::fill(column.max, column.max + columns, -infinity<T>);
    }
    const Running<T> row =
        row_max ? Running<T>{row_max + mine.begin, row_sum + mine.begin} : Running<T>{nullptr, nullptr};
    statistics_of(s + mine.begin * columns, mine.end - mine.begin, columns, row, column, scratch);
  }
  for (int t = 0; column_max && t < threads; ++t) {
    const T* base = partial.data() + 4 * t * columns;
    for (int64_t j = 0; j < columns; ++j) join(column_max + j, column_sum + j, base[j], base[columns + j]);
  }
  return 0;
}

template <typename T>
int details(const T* s, int64_t rows, int64_t columns, int64_t r0, int64_t c0, T* row_max, T* row_sum, T* row_weighted,
            int64_t* row_argmax, T* row_candidates, T* column_max, T* column_sum, T* column_weighted,
            int64_t* column_argmax, T* column_candidates) {
  const Detailed<T> row{row_max, row_sum, row_weighted, row_argmax, row_candidates};
  const Detailed<T> column{column_max, column_sum, column_weighted, column_argmax, column_candidates};
  if (row.max) {
#pragma omp parallel for
    for (int64_t i = 0; i < rows; ++i) detail_row(s + i * columns, columns, row, i, c0);
  }
  if (column.max) {
#pragma omp parallel
    {
      const jrl::Range mine = jrl::share(columns);
      for (int64_t i = 0; i < rows; ++i) detail_columns(s + i * columns, mine.begin, mine.end, column, r0 + i);
    }
  }
  return 0;
}

template <typename T>
int gradient(T* s, int64_t rows, int64_t columns, const T* grad_x, const T* lse_x, const T* positive_x, const T* grad_y,
             const T* lse_y, const T* positive_y, const int64_t* x_ids, const int64_t* y_ids, int log_sum_exp) {
#pragma omp parallel
  {
    const jrl::Range mine = jrl::share(rows);
    std::vector<T> scratch(columns);
    std::vector<std::pair<int64_t, T>> hits;  // place in the tile and the positives' part, read before s is overwritten
    for (int64_t i = mine.begin; i < mine.end; i += kBlock) {
      const int64_t count = std::min(kBlock, mine.end - i);
      hits.clear();
      for (int64_t k = i; x_ids && k < i + count; ++k)
        for (int64_t j = 0; j < columns; ++j)
          if (x_ids[k] == y_ids[j]) {
            const T logit = s[k * columns + j];
            T part = 0;
            if (grad_x) part += log_sum_exp ? grad_x[k] * jrl::exp(logit - positive_x[k]) : positive_x[k];
            if (grad_y) part += log_sum_exp ? grad_y[j] * jrl::exp(logit - positive_y[j]) : positive_y[j];
            hits.emplace_back(k * columns + j, part);
          }
      gradient_of(s + i * columns, count, columns, grad_x ? grad_x + i : nullptr, grad_x ? lse_x + i : nullptr, grad_y,
                  lse_y, scratch.data());
      for (const auto& [place, part] : hits) s[place] -= part;
    }
  }
  return 0;
}

}  // namespace

JRL_CPU_LAUNCHERS(info_nce_statistics, statistics);
JRL_CPU_LAUNCHERS(info_nce_details, details);
JRL_CPU_LAUNCHERS(info_nce_gradient, gradient);
