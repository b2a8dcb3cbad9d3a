// CUDA's execution model on a CPU, for tests of csrc/cuda where there is no GPU: blocks one after another, the threads
// of a block as fibers that give way at barriers and warp collectives. Slow, deterministic, and strict: a barrier that
// some threads of a block miss, or a collective whose lanes disagree about what they call, ends the process with a
// message.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class F>
cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) {
  return cudaSuccess;
}

namespace cuda_on_host {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 256 << 10;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_on_host: %s\n", message);
  std::abort();
}

enum class Waits { no, block, warp, done };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  Waits waits = Waits::no;
  const char* call = "";  // the collective it waits in
  unsigned mask = 0;
  uint64_t slot = 0;  // what it contributes to a collective
};

struct Block {
  std::vector<Thread> threads;
  dim3 block_index, block_size, grid_size;
  std::function<void()> body;
  std::vector<unsigned char> shared;
  ucontext_t scheduler;
  int current = 0;
};

inline Block*& active() {
  static Block* block = nullptr;
  return block;
}

inline Thread& self() { return active()->threads[active()->current]; }

inline void wait(Waits what, const char* call, unsigned mask) {
  Thread& thread = self();
  thread.waits = what;
  thread.call = call;
  thread.mask = mask;
  swapcontext(&thread.context, &active()->scheduler);
}

inline void enter() {
  active()->body();
  self().waits = Waits::done;
  swapcontext(&self().context, &active()->scheduler);
}

// Threads that wait for each other go on together once all of them have arrived.
inline bool release(Block& block) {
  bool released = false, all_at_barrier = true, any = false;
  for (const Thread& thread : block.threads) {
    if (thread.waits == Waits::done) continue;
    any = true;
    all_at_barrier &= thread.waits == Waits::block;
  }
  if (any && all_at_barrier) {
    for (Thread& thread : block.threads)
      if (thread.waits == Waits::block) thread.waits = Waits::no;
    return true;
  }
  const int count = static_cast<int>(block.threads.size());
  for (int first = 0; first < count; first += kWarp) {
    const int last = std::min(first + kWarp, count);
    const Thread* leader = nullptr;
    bool complete = true;
    for (int i = first; i < last; ++i)
      if (block.threads[i].waits == Waits::warp && !leader) leader = &block.threads[i];
    if (!leader) continue;
    const unsigned mask = leader->mask;
    const char* call = leader->call;
    for (int i = first; i < last; ++i) {
      const Thread& thread = block.threads[i];
      if (!(mask >> (i - first) & 1) || thread.waits == Waits::done) continue;
      if (thread.waits != Waits::warp) {
        complete = false;
      } else if (thread.mask != mask || std::strcmp(thread.call, call) != 0) {
        fail("lanes of a warp are in different collectives, or with different masks");
      }
    }
    if (!complete) continue;
    for (int i = first; i < last; ++i)
      if ((mask >> (i - first) & 1) && block.threads[i].waits == Waits::warp) block.threads[i].waits = Waits::no;
    released = true;
  }
  return released;
}

inline void run(Block& block) {
  int left = static_cast<int>(block.threads.size());
  for (Thread& thread : block.threads) {
    thread.waits = Waits::no;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &enter, 0);
  }
  while (left > 0) {
    for (std::size_t i = 0; i < block.threads.size(); ++i) {
      if (block.threads[i].waits != Waits::no) continue;
      block.current = static_cast<int>(i);
      swapcontext(&block.scheduler, &block.threads[i].context);
      left -= block.threads[i].waits == Waits::done;
    }
    if (left > 0 && !release(block)) fail("threads of a block wait for others that never come");
  }
}

inline void launch(dim3 grid, dim3 size, std::size_t shared, std::function<void()> body) {
  if (size.x * size.y * size.z > 1024 || size.x * size.y * size.z == 0) fail("a block has 1 to 1024 threads");
  if (shared > 227 << 10) fail("more dynamic shared memory than any chip has");
  Block block;
  block.threads = std::vector<Thread>(size.x * size.y * size.z);
  block.block_size = size;
  block.grid_size = grid;
  block.body = std::move(body);
  block.shared.resize(shared + 16);
  active() = &block;
  for (std::size_t i = 0; i < block.threads.size(); ++i)
    block.threads[i].index = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block.block_index = dim3(x, y, z);
        std::fill(block.shared.begin(), block.shared.end(), 0xff);  // NaN, should anybody read before writing
        run(block);
      }
  active() = nullptr;
}

inline void* shared_memory() {
  const auto address = reinterpret_cast<std::uintptr_t>(active()->shared.data());
  return reinterpret_cast<void*>((address + 15) / 16 * 16);
}

// Everybody's contribution, read between two barriers.
template <class Read>
auto collective(const char* call, unsigned mask, uint64_t slot, Read read) {
  self().slot = slot;
  wait(Waits::warp, call, mask);
  const int lane = active()->current % kWarp, first = active()->current - lane;
  const auto result = read(lane, [first](int other) { return active()->threads[first + other].slot; });
  wait(Waits::warp, call, mask);
  return result;
}

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8, "a lane gives at most 8 bytes");
  uint64_t slot = 0;
  std::memcpy(&slot, &value, sizeof(T));
  return slot;
}

template <class T>
T unpack(uint64_t slot) {
  T value;
  std::memcpy(&value, &slot, sizeof(T));
  return value;
}

template <class T, class Source>
T shuffle(const char* call, unsigned mask, T value, int width, Source source) {
  return collective(call, mask, pack(value), [&](int lane, auto slot) {
    const int base = lane / width * width, from = source(lane - base);
    const bool inside = from >= 0 && from < width && base + from < kWarp;
    const int other = inside ? base + from : lane;
    const std::size_t index = active()->current - lane + other;
    return index < active()->threads.size() ? unpack<T>(slot(other)) : value;
  });
}

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::self().index)
#define blockIdx (cuda_on_host::active()->block_index)
#define blockDim (cuda_on_host::active()->block_size)
#define gridDim (cuda_on_host::active()->grid_size)
#define warpSize 32

#define JRL_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), cuda_on_host::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); }))
#define JRL_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(cuda_on_host::shared_memory())

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::Waits::block, "__syncthreads", 0); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_on_host::wait(cuda_on_host::Waits::warp, "__syncwarp", mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  return cuda_on_host::shuffle("__shfl", mask, value, width, [=](int) { return from % width; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return cuda_on_host::shuffle("__shfl_xor", mask, value, width, [=](int lane) { return lane ^ bits; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32) {
  return cuda_on_host::shuffle("__shfl_down", mask, value, width, [=](int lane) { return lane + by; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = 32) {
  return cuda_on_host::shuffle("__shfl_up", mask, value, width, [=](int lane) { return lane - by; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_on_host::collective("__ballot", mask, predicate != 0, [&](int lane, auto slot) {
    const int first = cuda_on_host::active()->current - lane;
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) {
      const std::size_t index = first + i;
      const auto& threads = cuda_on_host::active()->threads;
      if (index < threads.size() && (mask >> i & 1) && threads[index].waits != cuda_on_host::Waits::done && slot(i))
        bits |= 1u << i;
    }
    return bits;
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline float __int_as_float(int x) { return cuda_on_host::unpack<float>(cuda_on_host::pack(x)); }
inline int __float_as_int(float x) { return cuda_on_host::unpack<int>(cuda_on_host::pack(x)); }
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "a float's atomics would add in any order");
  const T before = *address;
  *address += value;
  return before;
}
using std::fabs;
using std::max;
using std::min;
