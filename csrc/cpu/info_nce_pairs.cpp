// What a tile of logits holds besides its sums: excluded pairs, positives by id, and listed positives.

#include <algorithm>

#include "jrl/cpu_math.h"
#include "jrl/registry.h"
#include "jrl/threads.h"

namespace {

// Pairs with equal exclude ids become -inf unless their positive ids are equal too.
template <typename T>
int mask(T* s, int64_t rows, int64_t columns, const int64_t* exclude_x, const int64_t* exclude_y, const int64_t* x_ids,
         const int64_t* y_ids) {
#pragma omp parallel for
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      if (exclude_x[i] == exclude_y[j] && !(x_ids && x_ids[i] == y_ids[j])) s[i * columns + j] = -jrl::infinity<T>;
  return 0;
}

template <typename T>
JRL_INLINE void add_positive(T* max, T* sum, int64_t at, T s, int log_sum_exp) {
  if (log_sum_exp) {
    jrl::join(max + at, sum + at, s, T(1));
  } else {
    sum[at] += s;
  }
}

// Sums, or streaming log-sum-exps, of the logits whose ids are equal.
template <typename T>
int positives(const T* s, int64_t rows, int64_t columns, const int64_t* x_ids, const int64_t* y_ids, T* row_max,
              T* row_sum, T* column_max, T* column_sum, int log_sum_exp) {
#pragma omp parallel
  {
    if (row_sum) {
      const jrl::Range mine = jrl::share(rows);
      for (int64_t i = mine.begin; i < mine.end; ++i)
        for (int64_t j = 0; j < columns; ++j)
          if (x_ids[i] == y_ids[j]) add_positive(row_max, row_sum, i, s[i * columns + j], log_sum_exp);
    }
    if (column_sum) {
      const jrl::Range mine = jrl::share(columns);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = mine.begin; j < mine.end; ++j)
          if (x_ids[i] == y_ids[j]) add_positive(column_max, column_sum, j, s[i * columns + j], log_sum_exp);
    }
  }
  return 0;
}

// Pairs sorted by row: those inside the tile at (r0, c0) are read into, or written from, `values`.
template <typename T, bool kRead>
int exchange(T* s, int64_t rows, int64_t columns, int64_t r0, int64_t c0, const int64_t* pair_rows,
             const int64_t* pair_columns, int64_t pairs, T* values) {
  const int64_t begin = std::lower_bound(pair_rows, pair_rows + pairs, r0) - pair_rows;
  for (int64_t p = begin; p < pairs && pair_rows[p] < r0 + rows; ++p) {
    const int64_t j = pair_columns[p] - c0;
    if (j < 0 || j >= columns) continue;
    T* place = s + (pair_rows[p] - r0) * columns + j;
    if (kRead) {
      values[p] = *place;
    } else {
      *place = values[p];
    }
  }
  return 0;
}

template <typename T>
int gather(T* s, int64_t rows, int64_t columns, int64_t r0, int64_t c0, const int64_t* pair_rows,
           const int64_t* pair_columns, int64_t pairs, T* values) {
  return exchange<T, true>(s, rows, columns, r0, c0, pair_rows, pair_columns, pairs, values);
}

template <typename T>
int scatter(T* s, int64_t rows, int64_t columns, int64_t r0, int64_t c0, const int64_t* pair_rows,
            const int64_t* pair_columns, int64_t pairs, T* values) {
  return exchange<T, false>(s, rows, columns, r0, c0, pair_rows, pair_columns, pairs, values);
}

}  // namespace

JRL_CPU_LAUNCHERS(info_nce_mask, mask);
JRL_CPU_LAUNCHERS(info_nce_positives, positives);
JRL_CPU_LAUNCHERS(tile_gather, gather);
JRL_CPU_LAUNCHERS(tile_scatter, scatter);
