// Searching a tile of scores that a BLAS has filled: best positives, counts for ranks, the largest k of each row.
//
// A tile's score decides only where it is further from the threshold than rounding can have moved it; the rest is
// computed again from the inputs in float64, in one order, so that equal inputs tie exactly wherever their tile ends.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "jrl/cpu_math.h"
#include "jrl/registry.h"

namespace {

constexpr int64_t kChunk = 64;  // columns that are looked at one by one where one of them needs it
constexpr int64_t kLanes = 32;  // partial sums of an exact score: as many as a GPU's warp has lanes

enum Metric { kDot, kCosine, kOrder, kMin, kMax };

template <bool kIsOrder, typename T>
JRL_INLINE double lane_sum(const T* x, const T* y, int64_t depth) {
  double lanes[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) {
      const double a = x[d + l], b = y[d + l], v = 0.0 > b - a ? 0.0 : b - a;
      lanes[l] += kIsOrder ? v * v : a * b;
    }
  for (int64_t l = 0; d + l < depth; ++l) {
    const double a = x[d + l], b = y[d + l], v = 0.0 > b - a ? 0.0 : b - a;
    lanes[l] += kIsOrder ? v * v : a * b;
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

JRL_CLONES double dot_of(const float* x, const float* y, int64_t d) { return lane_sum<false>(x, y, d); }
JRL_CLONES double dot_of(const double* x, const double* y, int64_t d) { return lane_sum<false>(x, y, d); }
JRL_CLONES double order_of(const float* x, const float* y, int64_t d) { return -lane_sum<true>(x, y, d); }
JRL_CLONES double order_of(const double* x, const double* y, int64_t d) { return -lane_sum<true>(x, y, d); }

// Scores of pairs of rows in float64.
template <typename T>
struct Exact {
  int metric;
  const T *x, *y;
  int64_t depth;
  const double *x_norm, *y_norm;
  const T *a, *b;  // the second pair of embeddings of an agreement
  int64_t other_depth;

  double operator()(int64_t i, int64_t j) const {
    const T *xi = x + i * depth, *yj = y + j * depth;
    if (metric == kOrder) return order_of(xi, yj, depth);
    const double s = dot_of(xi, yj, depth);
    if (metric == kDot) return s;
    if (metric == kCosine) return s / (x_norm[i] * y_norm[j]);
    const double t = dot_of(a + i * other_depth, b + j * other_depth, other_depth);
    if (std::isnan(s) || std::isnan(t)) return std::numeric_limits<double>::quiet_NaN();
    return metric == kMin ? std::min(s, t) : std::max(s, t);
  }
};

// What a tile's entry stands for, s * row * column, and how far rounding can have moved it.
template <typename T>
struct Rounding {
  const T *row_scale, *column_scale, *row_error, *column_error;
  T relative;
};

struct Tally {
  int64_t above, below;
};

// How many entries are surely above `high` and below `low`; with kMark, `unsure` tells which are neither.
template <bool kMark, typename T>
JRL_INLINE Tally tally(const T* s, int64_t columns, Rounding<T> r, int64_t row, int64_t column, T low, T high,
                       uint8_t* unsure) {
  const T scale = r.row_scale[row], error = r.row_error[row];
  const T *column_scale = r.column_scale + column, *column_error = r.column_error + column;
  int32_t above = 0, below = 0;
#pragma omp simd reduction(+ : above, below)
  for (int64_t j = 0; j < columns; ++j) {
    const T score = s[j] * (scale * column_scale[j]), size = score < 0 ? -score : score;
    const T tolerance = error * column_error[j] + r.relative * size;
    const bool over = score - tolerance > high, under = score + tolerance < low;
    above += over;
    below += under;
    if (kMark) unsure[j] = !(over | under);
  }
  return {above, below};
}

JRL_CLONES Tally tally_of(const float* s, int64_t n, Rounding<float> r, int64_t i, int64_t j, float low, float high) {
  return tally<false, float>(s, n, r, i, j, low, high, nullptr);
}
JRL_CLONES Tally tally_of(const double* s, int64_t n, Rounding<double> r, int64_t i, int64_t j, double low,
                          double high) {
  return tally<false, double>(s, n, r, i, j, low, high, nullptr);
}
JRL_CLONES Tally mark_of(const float* s, int64_t n, Rounding<float> r, int64_t i, int64_t j, float low, float high,
                         uint8_t* unsure) {
  return tally<true>(s, n, r, i, j, low, high, unsure);
}
JRL_CLONES Tally mark_of(const double* s, int64_t n, Rounding<double> r, int64_t i, int64_t j, double low, double high,
                         uint8_t* unsure) {
  return tally<true>(s, n, r, i, j, low, high, unsure);
}

// best[i] = the largest exact score of the pairs (i, listed[starts[i]:ends[i]]): -inf without one, NaN with a NaN.
template <typename T>
int best(int metric, const T* x, const T* y, int64_t depth, const double* x_norm, const double* y_norm, int64_t rows,
         const int64_t* starts, const int64_t* ends, const int64_t* listed, double* best) {
  const Exact<T> exact{metric, x, y, depth, x_norm, y_norm, nullptr, nullptr, 0};
#pragma omp parallel for schedule(dynamic, 64)
  for (int64_t i = 0; i < rows; ++i) {
    double top = -jrl::infinity<double>;
    for (int64_t p = starts[i]; p < ends[i]; ++p) {
      const double s = exact(i, listed[p]);
      top = s <= top ? top : s;
      if (std::isnan(top)) break;
    }
    best[i] = top;
  }
  return 0;
}

// counts[i] += how many columns of the tile at (r0, c0) are not below best[i] and not listed as positives of i.
template <typename T>
int count(const T* s, int64_t rows, int64_t columns, int64_t r0, int64_t c0, const T* row_scale, const T* column_scale,
          const T* row_error, const T* column_error, double relative, int metric, const T* x, const T* y, int64_t depth,
          const double* x_norm, const double* y_norm, const int64_t* starts, const int64_t* ends, const int64_t* listed,
          const T* low, const T* high, const double* best, int64_t* counts) {
  const Exact<T> exact{metric, x, y, depth, x_norm, y_norm, nullptr, nullptr, 0};
  const Rounding<T> r{row_scale, column_scale, row_error, column_error, static_cast<T>(relative)};
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t i = r0; i < r0 + rows; ++i) {
    const T* line = s + (i - r0) * columns;
    const Tally all = tally_of(line, columns, r, i, c0, low[i], high[i]);
    counts[i] += all.above;
    if (all.above + all.below == columns) continue;
    for (int64_t chunk = 0; chunk < columns; chunk += kChunk) {
      uint8_t unsure[kChunk];
      const int64_t width = std::min(kChunk, columns - chunk);
      const Tally some = mark_of(line + chunk, width, r, i, c0 + chunk, low[i], high[i], unsure);
      if (some.above + some.below == width) continue;
      for (int64_t p = 0; p < width; ++p) {
        const int64_t j = c0 + chunk + p;
        if (unsure[p] && !std::binary_search(listed + starts[i], listed + ends[i], j))
          counts[i] += !(exact(i, j) < best[i]);
      }
    }
  }
  return 0;
}

constexpr int64_t kNothing = std::numeric_limits<int64_t>::max();

// NaN is larger than any number, as in torch.topk; among equals the lowest index comes first.
template <typename T>
bool precedes(T value, int64_t index, T other, int64_t other_index) {
  const bool nan = std::isnan(value), other_nan = std::isnan(other);
  if (nan != other_nan) return nan;
  if (nan || value == other) return index < other_index;
  return value > other;
}

// A row's largest k so far, as a heap whose first entry is the one to replace. An entry is a tile's score to within its
// error until it meets one that it cannot be told from; then both are computed exactly, and their errors are 0.
template <typename T>
struct Heap {
  struct Entry {
    T value, error;
    int64_t index;
  };

  const Exact<T>& exact;
  int64_t row, k;
  T *values, *errors;
  int64_t* indices;

  Entry at(int64_t p) const { return {values[p], errors[p], indices[p]}; }

  void put(int64_t p, const Entry& entry) const {
    values[p] = entry.value;
    errors[p] = entry.error;
    indices[p] = entry.index;
  }

  void refine(Entry* entry) const {
    if (entry->error == 0) return;
    entry->value = static_cast<T>(exact(row, entry->index));
    entry->error = 0;
  }

  bool before(Entry* entry, int64_t p) const {
    Entry other = at(p);
    if (entry->value - entry->error > other.value + other.error) return true;
    if (entry->value + entry->error < other.value - other.error) return false;
    refine(entry);
    refine(&other);
    put(p, other);
    return precedes(entry->value, entry->index, other.value, other.index);
  }

  void offer(Entry entry) const {
    if (!before(&entry, 0)) return;
    int64_t hole = 0;
    for (int64_t child = 1; child < k; child = 2 * hole + 1) {
      if (child + 1 < k) {
        Entry first = at(child);
        const bool second_is_worse = before(&first, child + 1);
        put(child, first);
        child += second_is_worse;
      }
      if (!before(&entry, child)) break;
      put(hole, at(child));
      hole = child;
    }
    put(hole, entry);
  }
};

// Offers what the tile at (r0, c0) holds to the heaps [M, k]; pairs with equal exclude ids stay out.
template <typename T>
int select(const T* s, int64_t rows, int64_t columns, int64_t r0, int64_t c0, const T* row_scale, const T* column_scale,
           const T* row_error, const T* column_error, double relative, int metric, const T* x, const T* y,
           int64_t depth, const double* x_norm, const double* y_norm, const T* a, const T* b, int64_t other_depth,
           const int64_t* exclude_x, const int64_t* exclude_y, int64_t k, T* values, T* errors, int64_t* indices) {
  const Exact<T> exact{metric, x, y, depth, x_norm, y_norm, a, b, other_depth};
  const Rounding<T> r{row_scale, column_scale, row_error, column_error, static_cast<T>(relative)};
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t i = r0; i < r0 + rows; ++i) {
    const T* line = s + (i - r0) * columns;
    const Heap<T> heap{exact, i, k, values + i * k, errors + i * k, indices + i * k};
    const auto threshold = [&] { return heap.values[0] - heap.errors[0]; };
    if (tally_of(line, columns, r, i, c0, threshold(), jrl::infinity<T>).below == columns) continue;
    for (int64_t chunk = 0; chunk < columns; chunk += kChunk) {
      uint8_t possible[kChunk];
      const int64_t width = std::min(kChunk, columns - chunk), first = c0 + chunk;
      if (mark_of(line + chunk, width, r, i, first, threshold(), jrl::infinity<T>, possible).below == width) continue;
      for (int64_t p = 0; p < width; ++p) {
        const int64_t j = first + p;
        if (!possible[p] || (exclude_x && exclude_x[i] == exclude_y[j])) continue;
        const T score = line[chunk + p] * (row_scale[i] * column_scale[j]);
        heap.offer({score, row_error[i] * column_error[j] + r.relative * std::abs(score), j});
      }
    }
  }
  return 0;
}

// Heaps to lists of exact scores in descending order; what was never filled becomes -inf and index -1.
template <typename T>
int sort(int metric, const T* x, const T* y, int64_t depth, const double* x_norm, const double* y_norm, const T* a,
         const T* b, int64_t other_depth, int64_t rows, int64_t k, T* values, T* errors, int64_t* indices) {
  const Exact<T> exact{metric, x, y, depth, x_norm, y_norm, a, b, other_depth};
#pragma omp parallel for
  for (int64_t i = 0; i < rows; ++i) {
    const Heap<T> heap{exact, i, k, values + i * k, errors + i * k, indices + i * k};
    std::vector<typename Heap<T>::Entry> row(k);
    for (int64_t p = 0; p < k; ++p) {
      row[p] = heap.at(p);
      heap.refine(&row[p]);
    }
    std::sort(row.begin(), row.end(), [](const auto& one, const auto& other) {
      return precedes(one.value, one.index, other.value, other.index);
    });
    for (int64_t p = 0; p < k; ++p) {
      if (row[p].index == kNothing) row[p].index = -1;
      heap.put(p, row[p]);
    }
  }
  return 0;
}

}  // namespace

JRL_CPU_LAUNCHERS(similarity_best, best);
JRL_CPU_LAUNCHERS(similarity_count, count);
JRL_CPU_LAUNCHERS(similarity_select, select);
JRL_CPU_LAUNCHERS(similarity_sort, sort);
