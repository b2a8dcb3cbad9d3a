// gumbel_assign over tiles [images, G, S] that a BLAS has filled: a softmax over the groups of each token, and segment
// means of the tokens' values.

#include "jrl/gumbel.h"
#include "jrl/registry.h"

namespace {

constexpr uint32_t kStream = 0;

// Finds each token's group and log-sum-exp of z / tau; a token with a NaN has a log-sum-exp that is one.
template <typename T>
JRL_INLINE void statistics_image(T* z, int64_t groups, int64_t tokens, int64_t first, const int64_t* seed, T tau,
                                 const bool* mask, int64_t* index, T* log_sum_exp, T* top, T* sum) {
  if (seed) jrl::add_gumbel(z, first, groups * tokens, static_cast<uint64_t>(*seed), kStream);
  for (int64_t s = 0; s < tokens; ++s) {
    top[s] = -jrl::infinity<T>;
    sum[s] = 0;
    index[s] = 0;
  }
  for (int64_t g = 0; g < groups; ++g) {
    const T* line = z + g * tokens;
#pragma omp simd
    for (int64_t s = 0; s < tokens; ++s) {
      const bool better = line[s] > top[s];
      index[s] = better ? g : index[s];
      top[s] = better ? line[s] : top[s];
    }
  }
  const T inverse = 1 / tau;
  for (int64_t g = 0; g < groups; ++g) {
    const T* line = z + g * tokens;
#pragma omp simd
    for (int64_t s = 0; s < tokens; ++s) sum[s] += jrl::exp((line[s] - jrl::finite_or_zero(top[s])) * inverse);
  }
  for (int64_t s = 0; s < tokens; ++s) {
    const bool kept = !mask || mask[s];
    log_sum_exp[s] = kept ? jrl::finite_or_zero(top[s]) * inverse + std::log(sum[s]) : T(0);
    index[s] = kept ? index[s] : -1;
  }
}

JRL_CLONES void statistics_of(float* z, int64_t groups, int64_t tokens, int64_t first, const int64_t* seed, float tau,
                              const bool* mask, int64_t* index, float* log_sum_exp, float* top, float* sum) {
  statistics_image(z, groups, tokens, first, seed, tau, mask, index, log_sum_exp, top, sum);
}
JRL_CLONES void statistics_of(double* z, int64_t groups, int64_t tokens, int64_t first, const int64_t* seed, double tau,
                              const bool* mask, int64_t* index, double* log_sum_exp, double* top, double* sum) {
  statistics_image(z, groups, tokens, first, seed, tau, mask, index, log_sum_exp, top, sum);
}

// `z` holds the logits of images from `first_image` on, and afterwards has the noise in it. scratch: [images, 2,
// tokens].
template <typename T>
int statistics(T* z, int64_t images, int64_t groups, int64_t tokens, int64_t first_image, const int64_t* seed, T tau,
               const bool* mask, int64_t* index, T* log_sum_exp, T* scratch) {
#pragma omp parallel for
  for (int64_t b = 0; b < images; ++b) {
    const int64_t tile = groups * tokens, row = b * tokens;
    statistics_of(z + b * tile, groups, tokens, (first_image + b) * tile, seed, tau, mask ? mask + row : nullptr,
                  index + row, log_sum_exp + row, scratch + 2 * row, scratch + 2 * row + tokens);
  }
  return 0;
}

// Adds each token's values to its group's sum and one to the group's share.
template <typename T>
int sums(const T* values, int64_t images, int64_t groups, int64_t tokens, int64_t width, const int64_t* index,
         const T* log_sum_exp, T* share, T* total) {
#pragma omp parallel for
  for (int64_t b = 0; b < images; ++b) {
    T poison = 0;
    for (int64_t s = 0; s < tokens; ++s) {
      const int64_t token = b * tokens + s, g = index[token];
      poison += log_sum_exp[token] - log_sum_exp[token];
      if (g < 0) continue;
      share[b * groups + g] += 1;
      T* line = total + (b * groups + g) * width;
#pragma omp simd
      for (int64_t e = 0; e < width; ++e) line[e] += values[token * width + e];
    }
    // Zero, but NaN where a token's softmax is: its one-hot row would hide what reached the logits.
    for (int64_t g = 0; g < groups; ++g) share[b * groups + g] += poison;
  }
  return 0;
}

template <typename T>
JRL_INLINE T probabilities_line(T* z, int64_t tokens, T inverse_tau, const bool* mask, const T* log_sum_exp) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t s = 0; s < tokens; ++s) {
    const T a = jrl::exp(z[s] * inverse_tau - log_sum_exp[s]);
    z[s] = mask && !mask[s] ? T(0) : a;
    sum += z[s];
  }
  return sum;
}

JRL_CLONES float probabilities_of(float* z, int64_t n, float inverse_tau, const bool* mask, const float* log_sum_exp) {
  return probabilities_line(z, n, inverse_tau, mask, log_sum_exp);
}
JRL_CLONES double probabilities_of(double* z, int64_t n, double inverse_tau, const bool* mask,
                                   const double* log_sum_exp) {
  return probabilities_line(z, n, inverse_tau, mask, log_sum_exp);
}

// Noisy logits become the soft assignment, and `share` its sums over the tokens.
template <typename T>
int probabilities(T* z, int64_t images, int64_t groups, int64_t tokens, T tau, const bool* mask, const T* log_sum_exp,
                  T* share) {
#pragma omp parallel for
  for (int64_t row = 0; row < images * groups; ++row) {
    const int64_t at = row / groups * tokens;
    share[row] = probabilities_of(z + row * tokens, tokens, 1 / tau, mask ? mask + at : nullptr, log_sum_exp + at);
  }
  return 0;
}

template <typename T>
JRL_INLINE void gradient_image(T* z, T* dots, int64_t groups, int64_t tokens, int64_t first, const int64_t* seed, T tau,
                               const bool* mask, const T* log_sum_exp, const T* inverse, const T* center, T* mean) {
  if (seed) jrl::add_gumbel(z, first, groups * tokens, static_cast<uint64_t>(*seed), kStream);
  for (int64_t s = 0; s < tokens; ++s) mean[s] = 0;
  for (int64_t g = 0; g < groups; ++g) {
    T *a = z + g * tokens, *dot = dots + g * tokens;
    probabilities_line(a, tokens, 1 / tau, mask, log_sum_exp);
    // A inverse before the rest: it is at most 1, where the inverse of a group of hardly any weight may be huge.
#pragma omp simd
    for (int64_t s = 0; s < tokens; ++s) {
      dot[s] = a[s] * inverse[g] * (dot[s] - center[g]);
      mean[s] += dot[s];
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    T *a = z + g * tokens, *dot = dots + g * tokens;
#pragma omp simd
    for (int64_t s = 0; s < tokens; ++s) {
      dot[s] = (dot[s] - a[s] * mean[s]) / tau;
      a[s] *= inverse[g];
    }
  }
}

JRL_CLONES void gradient_of(float* z, float* dots, int64_t groups, int64_t tokens, int64_t first, const int64_t* seed,
                            float tau, const bool* mask, const float* log_sum_exp, const float* inverse,
                            const float* center, float* mean) {
  gradient_image(z, dots, groups, tokens, first, seed, tau, mask, log_sum_exp, inverse, center, mean);
}
JRL_CLONES void gradient_of(double* z, double* dots, int64_t groups, int64_t tokens, int64_t first, const int64_t* seed,
                            double tau, const bool* mask, const double* log_sum_exp, const double* inverse,
                            const double* center, double* mean) {
  gradient_image(z, dots, groups, tokens, first, seed, tau, mask, log_sum_exp, inverse, center, mean);
}

// `dots` holds du_g . v_s and becomes the gradient of the logits; `z` holds the logits and becomes A_gs inverse_g, the
// soft assignment's weights in dv; center is du_g . u_g. scratch: [images, tokens].
template <typename T>
int gradient(T* z, T* dots, int64_t images, int64_t groups, int64_t tokens, int64_t first_image, const int64_t* seed,
             T tau, const bool* mask, const T* log_sum_exp, const T* inverse, const T* center, T* scratch) {
#pragma omp parallel for
  for (int64_t b = 0; b < images; ++b) {
    const int64_t tile = groups * tokens, row = b * tokens;
    gradient_of(z + b * tile, dots + b * tile, groups, tokens, (first_image + b) * tile, seed, tau,
                mask ? mask + row : nullptr, log_sum_exp + row, inverse + b * groups, center + b * groups,
                scratch + row);
  }
  return 0;
}

// dv_s = inverse_g du_g of the token's group g.
template <typename T>
int spread(const T* grad, int64_t images, int64_t groups, int64_t tokens, int64_t width, const int64_t* index,
           const T* inverse, T* out) {
#pragma omp parallel for
  for (int64_t token = 0; token < images * tokens; ++token) {
    T* line = out + token * width;
    if (index[token] < 0) {
      std::fill(line, line + width, T(0));
      continue;
    }
    const int64_t row = token / tokens * groups + index[token];
    const T factor = inverse[row];
#pragma omp simd
    for (int64_t e = 0; e < width; ++e) line[e] = factor * grad[row * width + e];
  }
  return 0;
}

// The generator itself, for its known answers: counters [count, 4] and keys [count, 2] to words [count, 4].
int philox_words_cpu(const uint32_t* counters, const uint32_t* keys, int64_t count, uint32_t* words) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t *c = counters + 4 * i, *k = keys + 2 * i;
    const jrl::Philox drawn = jrl::philox(c[0], c[1], c[2], c[3], k[0], k[1]);
    std::copy(drawn.word, drawn.word + 4, words + 4 * i);
  }
  return 0;
}

}  // namespace

JRL_CPU_LAUNCHERS(gumbel_assign_statistics, statistics);
JRL_CPU_LAUNCHERS(gumbel_assign_sums, sums);
JRL_CPU_LAUNCHERS(gumbel_assign_probabilities, probabilities);
JRL_CPU_LAUNCHERS(gumbel_assign_gradient, gradient);
JRL_CPU_LAUNCHERS(gumbel_assign_spread, spread);
JRL_LAUNCHER(philox_words_cpu);
