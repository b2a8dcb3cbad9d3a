// How a CUDA source launches its kernels and names its dynamic shared memory, so that the tests can run the same source
// on a CPU (JRL_CUDA_ON_HOST).
#pragma once

#ifdef JRL_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#define JRL_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define JRL_DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* name = reinterpret_cast<type*>(name##_bytes)
#endif
