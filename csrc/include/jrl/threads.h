// Threads of a parallel region; one where the compiler has no OpenMP.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace jrl {

#ifdef _OPENMP
inline int threads_available() { return omp_get_max_threads(); }
inline int threads_here() { return omp_get_num_threads(); }
inline int thread_index() { return omp_get_thread_num(); }
#else
inline int threads_available() { return 1; }
inline int threads_here() { return 1; }
inline int thread_index() { return 0; }
#endif

struct Range {
  std::int64_t begin, end;
};

// The calling thread's contiguous share of `count`.
inline Range share(std::int64_t count) {
  const std::int64_t each = (count + threads_here() - 1) / threads_here();
  return {std::min(count, thread_index() * each), std::min(count, (thread_index() + 1) * each)};
}

}  // namespace jrl
