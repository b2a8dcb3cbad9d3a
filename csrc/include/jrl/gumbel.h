// Gumbel(0, 1) noise on the CPU, added to a run of consecutive elements of a random tensor.
#pragma once

#include <algorithm>

#include "jrl/cpu_math.h"
#include "jrl/philox.h"

namespace jrl {

// Of a positive normal number; accurate relative to the result near 1 too, where a uniform number's logarithm is tiny.
JRL_INLINE float log_of_positive(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  // x = 2^exponent * m with m in [sqrt(1/2), sqrt(2)).
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  bits -= exponent * (1 << 23);
  float m;
  std::memcpy(&m, &bits, 4);
  const float z = (m - 1.0f) / (m + 1.0f), q = z * z;
  float p = 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  p = p * q + 1.0f;
  return static_cast<float>(exponent) * 0.693147180559945f + 2.0f * z * p;
}

JRL_INLINE double log_of_positive(double x) { return std::log(x); }

// values[i] += the noise of element first + i.
template <typename T>
JRL_INLINE void add_gumbel(T* values, int64_t first, int64_t count, uint64_t seed, uint32_t stream) {
  constexpr int64_t kBlocks = 64;
  uint32_t words[4 * kBlocks];
  T noise[4 * kBlocks];
  const int64_t end = first + count;
  for (int64_t at = first; at < end;) {
    const int64_t start = at & ~int64_t(3), stop = std::min(end, start + 4 * kBlocks);
    const int64_t blocks = (stop - start + 3) / 4;
#pragma omp simd
    for (int64_t i = 0; i < blocks; ++i) {
      const Philox drawn = philox(static_cast<uint64_t>((start >> 2) + i), stream, seed);
      words[4 * i] = drawn.word[0];
      words[4 * i + 1] = drawn.word[1];
      words[4 * i + 2] = drawn.word[2];
      words[4 * i + 3] = drawn.word[3];
    }
#pragma omp simd
    for (int64_t i = 0; i < 4 * blocks; ++i) noise[i] = -log_of_positive(-log_of_positive(T(uniform(words[i]))));
#pragma omp simd
    for (int64_t i = at; i < stop; ++i) values[i - first] += noise[i - start];
    at = stop;
  }
}

}  // namespace jrl
