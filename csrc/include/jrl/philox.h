// Philox4x32-10 (Salmon et al. 2011), a random function of a counter: every backend draws the same numbers, and a
// backward pass draws the forward's again instead of keeping them.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define JRL_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define JRL_HOST_DEVICE static inline __attribute__((always_inline))
#else
#define JRL_HOST_DEVICE static inline
#endif

namespace jrl {

struct Philox {
  uint32_t word[4];
};

// Four random words of a counter of four words under a key of two.
JRL_HOST_DEVICE Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * c0, second = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Words of the elements 4 block to 4 block + 3 of an op's random tensor.
JRL_HOST_DEVICE Philox philox(uint64_t block, uint32_t stream, uint64_t seed) {
  return philox(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream, 0,
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// In (0, 1), exact in float32: the upper 23 bits and a half.
JRL_HOST_DEVICE float uniform(uint32_t word) {
  return (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * (1.0f / 8388608.0f);
}

}  // namespace jrl
