// exp and log1p that a compiler can vectorise, and the attributes that let it: one clone of a function for each x86-64
// level.
//
// Every function carries NaN through. exp of anything below -87.3 is exactly 0, so a masked logit (-inf) contributes
// nothing.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define JRL_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define JRL_CLONES
#endif
#define JRL_INLINE static inline __attribute__((always_inline))

namespace jrl {

template <typename T>
constexpr T infinity = std::numeric_limits<T>::infinity();

JRL_INLINE float exp(float x) {
  const float low = -87.3f, high = 88.7f;
  float clamped = x < low ? low : x;  // in this order a NaN stays a NaN
  clamped = clamped > high ? high : clamped;
  // Adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits of the sum.
  const float magic = 12582912.0f;
  const float shifted = clamped * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t bits, one, offset;
  const float unit = 1.0f;
  std::memcpy(&bits, &shifted, 4);
  std::memcpy(&offset, &magic, 4);
  std::memcpy(&one, &unit, 4);
  // 2^n in two factors, so that n = 128 does not overflow before p is applied.
  const int32_t exponent = bits - offset, half = exponent >> 1;
  const int32_t first = one + half * (1 << 23), second = one + (exponent - half) * (1 << 23);
  float a, b;
  std::memcpy(&a, &first, 4);
  std::memcpy(&b, &second, 4);
  const float value = p * a * b;
  return x < low ? 0.0f : (x > high ? infinity<float> : value);
}

JRL_INLINE double exp(double x) { return std::exp(x); }

// log(1 + e) for e in [0, 1], accurate relative to its value: 2 atanh(e / (2 + e)).
JRL_INLINE float log1p_unit(float e) {
  const float z = e / (2.0f + e), q = z * z;
  float p = 1.0f / 15;
  p = p * q + 1.0f / 13;
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  p = p * q + 1.0f;
  return 2.0f * z * p;
}

JRL_INLINE double log1p_unit(double e) { return std::log1p(e); }

template <typename T>
JRL_INLINE T finite_or_zero(T x) {
  return x == -infinity<T> ? T(0) : x;
}

// Joins the sum l of exp(s - m) to a running (max, sum).
template <typename T>
JRL_INLINE void join(T* max, T* sum, T m, T l) {
  const T top = finite_or_zero(m > *max ? m : *max);
  *sum = *sum * exp(*max - top) + l * exp(m - top);
  *max = m > *max ? m : *max;
}

}  // namespace jrl
