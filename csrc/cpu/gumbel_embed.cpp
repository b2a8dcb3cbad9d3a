// gumbel_embed over rows of logits [rows, V]: noise, log-sum-exp and the k largest, or the gradient of the logits.

#include <numeric>
#include <vector>

#include "jrl/gumbel.h"
#include "jrl/registry.h"
#include "jrl/threads.h"

namespace {

constexpr uint32_t kStream = 1;

template <typename T>
JRL_INLINE T log_sum_exp_row(T* z, int64_t codes, int64_t first, const int64_t* seed, T inverse_tau) {
  if (seed) jrl::add_gumbel(z, first, codes, static_cast<uint64_t>(*seed), kStream);
  T top = -jrl::infinity<T>, sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t v = 0; v < codes; ++v) top = z[v] > top ? z[v] : top;
  const T shift = jrl::finite_or_zero(top);
#pragma omp simd reduction(+ : sum)
  for (int64_t v = 0; v < codes; ++v) sum += jrl::exp((z[v] - shift) * inverse_tau);
  return shift * inverse_tau + std::log(sum);
}

JRL_CLONES float log_sum_exp_of(float* z, int64_t n, int64_t first, const int64_t* seed, float inverse_tau) {
  return log_sum_exp_row(z, n, first, seed, inverse_tau);
}
JRL_CLONES double log_sum_exp_of(double* z, int64_t n, int64_t first, const int64_t* seed, double inverse_tau) {
  return log_sum_exp_row(z, n, first, seed, inverse_tau);
}

// The k largest, in order, the lowest index first among equals.
template <typename T>
void largest(const T* z, int64_t codes, int64_t k, int64_t* index, std::vector<int64_t>& order) {
  if (k == 1) {
    index[0] = 0;
    for (int64_t v = 1; v < codes; ++v)
      if (z[v] > z[index[0]]) index[0] = v;
    return;
  }
  order.resize(static_cast<std::size_t>(codes));
  std::iota(order.begin(), order.end(), int64_t(0));
  std::partial_sort(order.begin(), order.begin() + k, order.end(),
                    [z](int64_t a, int64_t b) { return z[a] != z[b] ? z[a] > z[b] : a < b; });
  std::copy(order.begin(), order.begin() + k, index);
}

// `z` holds logits of rows from `first_row` on, and afterwards has the noise in it.
template <typename T>
int statistics(T* z, int64_t rows, int64_t codes, int64_t first_row, const int64_t* seed, T tau, int64_t k,
               int64_t* index, T* log_sum_exp) {
#pragma omp parallel
  {
    std::vector<int64_t> order;
#pragma omp for
    for (int64_t i = 0; i < rows; ++i) {
      T* line = z + i * codes;
      log_sum_exp[i] = log_sum_exp_of(line, codes, (first_row + i) * codes, seed, 1 / tau);
      // No order holds among NaNs: such a row is NaN whatever its indices.
      if (log_sum_exp[i] == log_sum_exp[i]) {
        largest(line, codes, k, index + i * k, order);
      } else {
        std::iota(index + i * k, index + (i + 1) * k, int64_t(0));
      }
    }
  }
  return 0;
}

template <typename T>
JRL_INLINE void softmax_row(T* z, int64_t codes, int64_t first, const int64_t* seed, T inverse_tau, T log_sum_exp) {
  if (seed) jrl::add_gumbel(z, first, codes, static_cast<uint64_t>(*seed), kStream);
#pragma omp simd
  for (int64_t v = 0; v < codes; ++v) z[v] = jrl::exp(z[v] * inverse_tau - log_sum_exp);
}

template <typename T>
JRL_INLINE void gradient_row(const T* p, T* da, int64_t codes, T tau) {
  T mean = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t v = 0; v < codes; ++v) mean += p[v] * da[v];
#pragma omp simd
  for (int64_t v = 0; v < codes; ++v) da[v] = p[v] * (da[v] - mean) / tau;
}

JRL_CLONES void softmax_of(float* z, int64_t n, int64_t first, const int64_t* seed, float inverse_tau,
                           float log_sum_exp) {
  softmax_row(z, n, first, seed, inverse_tau, log_sum_exp);
}
JRL_CLONES void softmax_of(double* z, int64_t n, int64_t first, const int64_t* seed, double inverse_tau,
                           double log_sum_exp) {
  softmax_row(z, n, first, seed, inverse_tau, log_sum_exp);
}
JRL_CLONES void gradient_of(const float* p, float* da, int64_t n, float tau) { gradient_row(p, da, n, tau); }
JRL_CLONES void gradient_of(const double* p, double* da, int64_t n, double tau) { gradient_row(p, da, n, tau); }

// Logits become the probabilities p of softmax((logits + noise) / tau).
template <typename T>
int probabilities(T* z, int64_t rows, int64_t codes, int64_t first_row, const int64_t* seed, T tau,
                  const T* log_sum_exp) {
#pragma omp parallel for
  for (int64_t i = 0; i < rows; ++i)
    softmax_of(z + i * codes, codes, (first_row + i) * codes, seed, 1 / tau, log_sum_exp[i]);
  return 0;
}

// dL/dp in `da` becomes dL/dlogits.
template <typename T>
int gradient(const T* p, T* da, int64_t rows, int64_t codes, T tau) {
#pragma omp parallel for
  for (int64_t i = 0; i < rows; ++i) gradient_of(p + i * codes, da + i * codes, codes, tau);
  return 0;
}

// out[index_i] += grad_i, rows in order; each thread adds a share of the columns.
template <typename T>
int scatter(const T* grad, int64_t rows, int64_t width, const int64_t* index, T* out) {
#pragma omp parallel
  {
    const jrl::Range mine = jrl::share(width);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = mine.begin; d < mine.end; ++d) out[index[i] * width + d] += grad[i * width + d];
  }
  return 0;
}

}  // namespace

JRL_CPU_LAUNCHERS(gumbel_embed_statistics, statistics);
JRL_CPU_LAUNCHERS(gumbel_embed_probabilities, probabilities);
JRL_CPU_LAUNCHERS(gumbel_embed_gradient, gradient);
JRL_CPU_LAUNCHERS(gumbel_embed_scatter, scatter);
