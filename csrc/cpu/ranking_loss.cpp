// One pass over a tile of scores that a BLAS has filled: hinge sums or hardest candidates of its rows and columns, or
// dL/ds in place. Row i and column i are each other's positive for i < pairs; `base` is margin - s_ii.
//
// Each row, and each column, has one thread that visits it in order: the same bits at any number of threads.

#include <algorithm>

#include "jrl/cpu_math.h"
#include "jrl/registry.h"
#include "jrl/threads.h"

namespace {

using jrl::infinity;

// A tile at (r0, c0) of the whole matrix.
struct Place {
  int64_t columns, offset;
  int64_t paired_rows, paired_columns;  // how many have a positive

  Place(int64_t rows, int64_t columns, int64_t r0, int64_t c0, int64_t pairs)
      : columns(columns),
        offset(r0 - c0),
        paired_rows(std::clamp<int64_t>(pairs - r0, 0, rows)),
        paired_columns(std::clamp<int64_t>(pairs - c0, 0, columns)) {}

  // The column of row i's positive, or one past any.
  int64_t diagonal(int64_t i) const {
    const int64_t j = i + offset;
    return j < 0 || j >= columns ? columns : j;
  }
};

// A NaN violates, so that it reaches the loss.
template <typename T>
JRL_INLINE bool violates(T v) {
  return !(v <= 0);
}

template <typename T>
JRL_INLINE void add_range(const T* s, int64_t begin, int64_t end, T base, const int64_t* ids, int64_t id, T* sum,
                          int64_t* count) {
  T total = 0;
  int32_t found = 0;
  if (ids) {
#pragma omp simd reduction(+ : total, found)
    for (int64_t j = begin; j < end; ++j) {
      const T v = s[j] + base;
      const bool hit = (ids[j] != id) & violates(v);
      total += hit ? v : T(0);
      found += hit;
    }
  } else {
#pragma omp simd reduction(+ : total, found)
    for (int64_t j = begin; j < end; ++j) {
      const T v = s[j] + base;
      total += violates(v) ? v : T(0);
      found += violates(v);
    }
  }
  *sum += total;
  *count += found;
}

// A row's violations added to the columns begin <= j < end.
template <typename T>
JRL_INLINE void add_columns(const T* s, int64_t begin, int64_t end, const T* base, const int64_t* ids, int64_t id,
                            T* sum, int64_t* count) {
  if (ids) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
      const T v = s[j] + base[j];
      const bool hit = (ids[j] != id) & violates(v);
      sum[j] += hit ? v : T(0);
      count[j] += hit;
    }
  } else {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
      const T v = s[j] + base[j];
      sum[j] += violates(v) ? v : T(0);
      count[j] += violates(v);
    }
  }
}

JRL_CLONES void sum_row(const float* s, int64_t begin, int64_t end, float base, const int64_t* ids, int64_t id,
                        float* sum, int64_t* count) {
  add_range(s, begin, end, base, ids, id, sum, count);
}
JRL_CLONES void sum_row(const double* s, int64_t begin, int64_t end, double base, const int64_t* ids, int64_t id,
                        double* sum, int64_t* count) {
  add_range(s, begin, end, base, ids, id, sum, count);
}
JRL_CLONES void sum_columns(const float* s, int64_t begin, int64_t end, const float* base, const int64_t* ids,
                            int64_t id, float* sum, int64_t* count) {
  add_columns(s, begin, end, base, ids, id, sum, count);
}
JRL_CLONES void sum_columns(const double* s, int64_t begin, int64_t end, const double* base, const int64_t* ids,
                            int64_t id, double* sum, int64_t* count) {
  add_columns(s, begin, end, base, ids, id, sum, count);
}

// Calls visit(begin, end) on the parts of [begin, end) to either side of a positive.
template <typename Visit>
JRL_INLINE void around(int64_t begin, int64_t end, int64_t diagonal, Visit visit) {
  if (diagonal < begin || diagonal >= end) return visit(begin, end);
  visit(begin, diagonal);
  visit(diagonal + 1, end);
}

// Sums and counts of the violations, added to those of earlier tiles; a null side is left out.
template <typename T>
int sums(T* s, int64_t rows, int64_t columns, int64_t r0, int64_t c0, int64_t pairs, const int64_t* exclude_x,
         const int64_t* exclude_y, const T* row_base, const T* column_base, T* row_sum, int64_t* row_count,
         T* column_sum, int64_t* column_count) {
  const Place place(rows, columns, r0, c0, pairs);
  if (row_sum) {
#pragma omp parallel for
    for (int64_t i = 0; i < place.paired_rows; ++i)
      around(0, columns, place.diagonal(i), [&](int64_t begin, int64_t end) {
        sum_row(s + i * columns, begin, end, row_base[i], exclude_y, exclude_x ? exclude_x[i] : 0, row_sum + i,
                row_count + i);
      });
  }
  if (column_sum) {
#pragma omp parallel
    {
      const jrl::Range mine = jrl::share(place.paired_columns);
      for (int64_t i = 0; i < rows; ++i)
        around(mine.begin, mine.end, place.diagonal(i), [&](int64_t begin, int64_t end) {
          sum_columns(s + i * columns, begin, end, column_base, exclude_y, exclude_x ? exclude_x[i] : 0, column_sum,
                      column_count);
        });
    }
  }
  return 0;
}

// The largest, or the first NaN, replaces what came before; among equals the earlier stays.
template <typename T>
JRL_INLINE bool replaces(T next, T top) {
  return !(next <= top) & (top == top);
}

template <typename T>
JRL_INLINE T row_top(const T* s, int64_t begin, int64_t end, const int64_t* ids, int64_t id, T top) {
  T lost = 0;  // becomes NaN where any score is
  if (ids) {
#pragma omp simd reduction(max : top) reduction(+ : lost)
    for (int64_t j = begin; j < end; ++j) {
      const T value = ids[j] != id ? s[j] : -infinity<T>;
      top = value > top ? value : top;
      lost += value == value ? T(0) : value;
    }
  } else {
#pragma omp simd reduction(max : top) reduction(+ : lost)
    for (int64_t j = begin; j < end; ++j) {
      top = s[j] > top ? s[j] : top;
      lost += s[j] == s[j] ? T(0) : s[j];
    }
  }
  return top + lost;
}

template <typename T>
JRL_INLINE void keep_columns(const T* s, int64_t begin, int64_t end, const int64_t* ids, int64_t id, int64_t index,
                             T* top, int64_t* at) {
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) {
    const bool better = replaces(s[j], top[j]) & !(ids && ids[j] == id);
    top[j] = better ? s[j] : top[j];
    at[j] = better ? index : at[j];
  }
}

JRL_CLONES float top_of(const float* s, int64_t begin, int64_t end, const int64_t* ids, int64_t id, float top) {
  return row_top(s, begin, end, ids, id, top);
}
JRL_CLONES double top_of(const double* s, int64_t begin, int64_t end, const int64_t* ids, int64_t id, double top) {
  return row_top(s, begin, end, ids, id, top);
}
JRL_CLONES void top_columns(const float* s, int64_t begin, int64_t end, const int64_t* ids, int64_t id, int64_t index,
                            float* top, int64_t* at) {
  keep_columns(s, begin, end, ids, id, index, top, at);
}
JRL_CLONES void top_columns(const double* s, int64_t begin, int64_t end, const int64_t* ids, int64_t id, int64_t index,
                            double* top, int64_t* at) {
  keep_columns(s, begin, end, ids, id, index, top, at);
}

// Largest candidate of each row and column and the lowest index that has it, joined to those of earlier tiles.
template <typename T>
int hardest(T* s, int64_t rows, int64_t columns, int64_t r0, int64_t c0, int64_t pairs, const int64_t* exclude_x,
            const int64_t* exclude_y, T* row_max, int64_t* row_argmax, T* column_max, int64_t* column_argmax) {
  const Place place(rows, columns, r0, c0, pairs);
  if (row_max) {
#pragma omp parallel for
    for (int64_t i = 0; i < place.paired_rows; ++i)
      around(0, columns, place.diagonal(i), [&](int64_t begin, int64_t end) {
        const T* line = s + i * columns;
        const int64_t id = exclude_x ? exclude_x[i] : 0;
        const T top = top_of(line, begin, end, exclude_y, id, -infinity<T>);
        if (!replaces(top, row_max[i])) return;
        int64_t j = begin;
        while ((exclude_y && exclude_y[j] == id) || !(line[j] == top || (top != top && line[j] != line[j]))) ++j;
        row_max[i] = line[j];
        row_argmax[i] = c0 + j;
      });
  }
  if (column_max) {
#pragma omp parallel
    {
      const jrl::Range mine = jrl::share(place.paired_columns);
      for (int64_t i = 0; i < rows; ++i)
        around(mine.begin, mine.end, place.diagonal(i), [&](int64_t begin, int64_t end) {
          top_columns(s + i * columns, begin, end, exclude_y, exclude_x ? exclude_x[i] : 0, r0 + i, column_max,
                      column_argmax);
        });
    }
  }
  return 0;
}

template <typename T>
JRL_INLINE void range_gradient(T* s, int64_t begin, int64_t end, const T* row_base, const T* row_grad,
                               const T* column_base, const T* column_grad) {
  if (row_grad && column_grad) {
    const T base = *row_base, grad = *row_grad;
#pragma omp simd
    for (int64_t j = begin; j < end; ++j)
      s[j] = (violates(s[j] + base) ? grad : T(0)) + (violates(s[j] + column_base[j]) ? column_grad[j] : T(0));
  } else if (row_grad) {
    const T base = *row_base, grad = *row_grad;
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) s[j] = violates(s[j] + base) ? grad : T(0);
  } else if (column_grad) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) s[j] = violates(s[j] + column_base[j]) ? column_grad[j] : T(0);
  } else {
    std::fill(s + begin, s + end, T(0));
  }
}

JRL_CLONES void gradient_of(float* s, int64_t begin, int64_t end, const float* row_base, const float* row_grad,
                            const float* column_base, const float* column_grad) {
  range_gradient(s, begin, end, row_base, row_grad, column_base, column_grad);
}
JRL_CLONES void gradient_of(double* s, int64_t begin, int64_t end, const double* row_base, const double* row_grad,
                            const double* column_base, const double* column_grad) {
  range_gradient(s, begin, end, row_base, row_grad, column_base, column_grad);
}

// s becomes grad_x where it violates its row's margin plus grad_y where it violates its column's; 0 for positives.
template <typename T>
int gradient(T* s, int64_t rows, int64_t columns, int64_t r0, int64_t c0, int64_t pairs, const int64_t* exclude_x,
             const int64_t* exclude_y, const T* row_base, const T* column_base, const T* grad_x, const T* grad_y) {
  const Place place(rows, columns, r0, c0, pairs);
#pragma omp parallel for
  for (int64_t i = 0; i < rows; ++i) {
    T* line = s + i * columns;
    const T* grad = grad_x && i < place.paired_rows ? grad_x + i : nullptr;
    gradient_of(line, 0, place.paired_columns, row_base + i, grad, column_base, grad_y);
    gradient_of(line, place.paired_columns, columns, row_base + i, grad, column_base, nullptr);
    const int64_t positive = place.diagonal(i);
    if (positive < columns) line[positive] = 0;
    for (int64_t j = 0; exclude_x && j < columns; ++j)
      if (exclude_x[i] == exclude_y[j]) line[j] = 0;
  }
  return 0;
}

}  // namespace

JRL_CPU_LAUNCHERS(ranking_loss_sums, sums);
JRL_CPU_LAUNCHERS(ranking_loss_hardest, hardest);
JRL_CPU_LAUNCHERS(ranking_loss_gradient, gradient);
