// Noise-contrastive estimation against rows gathered from a memory bank: each row is read once, for its score and,
// while it is still in cache, for its share of the gradient.

#include <algorithm>

#include "jrl/cpu_math.h"
#include "jrl/registry.h"

namespace {

constexpr int kIndexOutOfRange = 1;

template <typename T>
JRL_INLINE T dot_rows(const T* a, const T* b, int64_t depth) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < depth; ++d) sum += a[d] * b[d];
  return sum;
}

JRL_CLONES float dot(const float* a, const float* b, int64_t depth) { return dot_rows(a, b, depth); }
JRL_CLONES double dot(const double* a, const double* b, int64_t depth) { return dot_rows(a, b, depth); }

template <typename T>
JRL_INLINE void add_row(T* out, const T* row, T weight, int64_t depth) {
#pragma omp simd
  for (int64_t d = 0; d < depth; ++d) out[d] += weight * row[d];
}

JRL_CLONES void add(float* out, const float* row, float weight, int64_t depth) { add_row(out, row, weight, depth); }
JRL_CLONES void add(double* out, const double* row, double weight, int64_t depth) { add_row(out, row, weight, depth); }

// The rows of the bank come from anywhere in memory: ask for the next while this one is worked on.
template <typename T>
JRL_INLINE void fetch(const T* row, int64_t depth) {
#ifdef __GNUC__
  for (int64_t d = 0; d < depth; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d);
#else
  (void)row, (void)depth;
#endif
}

template <typename T>
struct Terms {  // of one query
  const T* query;
  const T* bank;
  int64_t depth, stride;
  T scale, constant;
  T* direction;  // null where no gradient is wanted

  // The sum of softplus(sign * (s - constant)) over the indices that count; their slopes times `weight` join
  // `direction`.
  double sum(const int64_t* index, const bool* counts, int64_t length, T sign, T weight) const {
    double total = 0;
    for (int64_t j = 0; j < length; ++j) {
      if (counts && !counts[j]) continue;
      if (j + 1 < length) fetch(bank + index[j + 1] * stride, depth);
      const T* row = bank + index[j] * stride;
      const T u = sign * (scale * dot(query, row, depth) - constant), e = jrl::exp(u < 0 ? u : -u);
      total += (u < 0 ? T(0) : u) + jrl::log1p_unit(e);
      if (direction) add(direction, row, sign * weight * (u < 0 ? e : T(1)) / (T(1) + e), depth);
    }
    return total;
  }
};

// The door has checked a user's indices, but not those of a compiled graph: memory beyond the bank is never read.
bool within(int64_t length, const int64_t* index, int64_t count) {
  return std::all_of(index, index + count, [length](int64_t at) { return at >= 0 && at < length; });
}

template <typename T>
int partition_nce(int64_t rows, int64_t depth, const T* query, const T* bank, int64_t bank_rows, int64_t stride,
                  int64_t positives, const int64_t* positive_index, const bool* positive_mask, int64_t negatives,
                  const int64_t* negative_index, double scale, double constant, T* losses, T* direction) {
  if (!within(bank_rows, positive_index, rows * positives) || !within(bank_rows, negative_index, rows * negatives)) {
    return kIndexOutOfRange;
  }
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < rows; ++b) {
    const bool* counts = positive_mask ? positive_mask + b * positives : nullptr;
    const int64_t count = counts ? std::count(counts, counts + positives, true) : positives;
    T* sum = direction ? direction + b * depth : nullptr;
    if (sum) std::fill(sum, sum + depth, T(0));
    losses[b] = 0;
    if (count == 0) continue;
    const Terms<T> terms{query + b * depth, bank, depth, stride, static_cast<T>(scale), static_cast<T>(constant), sum};
    const double mean = terms.sum(positive_index + b * positives, counts, positives, T(-1), T(1) / T(count)) / count;
    losses[b] = static_cast<T>(mean + terms.sum(negative_index + b * negatives, nullptr, negatives, T(1), T(1)));
  }
  return 0;
}

}  // namespace

JRL_CPU_LAUNCHERS(partition_nce, partition_nce);
