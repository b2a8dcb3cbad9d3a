// Searching a tile of scores that cuBLAS has filled: best positives, counts for ranks, the largest k of each row.
//
// As on the CPU, a tile's score decides only where rounding cannot matter; the rest is computed again in float64 by a
// warp, in the CPU's order. Nothing depends on the order in which threads arrive: what they gather is sorted by unique
// keys.

#include <cstdint>
#include <cstring>

#include "jrl/cuda_launch.h"
#include "jrl/registry.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 4;  // a warp each
constexpr int kUnroll = 8;        // loads in flight a lane
constexpr int kThreads = 256;     // of a block that selects
constexpr int kTile = 64, kDepth = 16, kPerThread = 4;

enum Metric { kDot, kCosine, kOrder, kMin, kMax };
enum Type { kFloat32, kBfloat16, kFloat16 };

struct Pairs {
  int metric, type;
  const void *x, *y;
  int64_t depth;
  const double *x_norm, *y_norm;  // of a cosine
  const void *a, *b;              // the second pair of embeddings of an agreement
  int64_t other_depth;
};

// What an entry of a tile stands for, s * row * column, and how far rounding can have moved it.
struct Rounding {
  const float *row_scale, *column_scale, *row_error, *column_error;
  float relative;
};

template <typename To, typename From>
__device__ To bits_as(From from) {
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

__device__ float load(const void* p, int type, int64_t at) {
  if (type == kFloat32) return static_cast<const float*>(p)[at];
  const uint32_t half = static_cast<const uint16_t*>(p)[at];
  if (type == kBfloat16) return bits_as<float>(half << 16);
  const uint32_t magnitude = half & 0x7fff;
  const float size = magnitude >= 0x7c00 ? bits_as<float>(0x7f800000u | (magnitude & 0x3ff) << 13)
                                         : bits_as<float>(magnitude << 13) * 0x1p112f;
  return half & 0x8000 ? -size : size;
}

// By a whole warp; every lane has the result.
__device__ double warp_sum(const void* x, const void* y, int type, int64_t i, int64_t j, int64_t depth, bool order) {
  double total = 0;
  for (int64_t d = threadIdx.x % kWarp; d < depth; d += kWarp) {
    const double a = load(x, type, i * depth + d), b = load(y, type, j * depth + d);
    const double v = 0.0 > b - a ? 0.0 : b - a;
    total += order ? v * v : a * b;
  }
  for (int width = kWarp / 2; width > 0; width /= 2) total += __shfl_xor_sync(kAll, total, width);
  return total;
}

__device__ double exact(const Pairs& p, int64_t i, int64_t j) {
  const double s = warp_sum(p.x, p.y, p.type, i, j, p.depth, p.metric == kOrder);
  if (p.metric == kOrder) return -s;
  if (p.metric == kDot) return s;
  if (p.metric == kCosine) return s / (p.x_norm[i] * p.y_norm[j]);
  const double t = warp_sum(p.a, p.b, p.type, i, j, p.other_depth, false);
  if (s != s || t != t) return s + t;
  return (p.metric == kMin) == (s < t) ? s : t;
}

__global__ void best_kernel(Pairs p, int64_t rows, const int64_t* starts, const int64_t* ends, const int64_t* listed,
                            double* best) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (i >= rows) return;
  double top = -bits_as<double>(int64_t{0x7ff0000000000000});
  for (int64_t q = starts[i]; q < ends[i] && top == top; ++q) {
    const double s = exact(p, i, listed[q]);
    top = s <= top ? top : s;
  }
  if (threadIdx.x % kWarp == 0) best[i] = top;
}

__device__ bool contains(const int64_t* listed, int64_t begin, int64_t end, int64_t column) {
  const int64_t last = end;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (listed[middle] < column) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin < last && listed[begin] == column;
}

// counts[i] += how many columns of the tile at (r0, c0) are not below best[i] and not listed as positives of i.
__global__ void count_kernel(const float* s, int64_t rows, int64_t columns, int64_t r0, int64_t c0, Rounding r, Pairs p,
                             const int64_t* starts, const int64_t* ends, const int64_t* listed, const float* low,
                             const float* high, const double* best, int64_t* counts) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp, i = r0 + row;
  if (row >= rows) return;
  const float* line = s + row * columns;
  const float scale = r.row_scale[i], error = r.row_error[i], under = low[i], over = high[i];
  int total = 0;
  for (int64_t base = 0; base < columns; base += kUnroll * kWarp) {
    bool unsure[kUnroll], any = false;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t j = base + u * kWarp + lane;
      unsure[u] = j < columns;
      if (j < columns) {
        const float score = line[j] * (scale * r.column_scale[c0 + j]);
        const float tolerance = error * r.column_error[c0 + j] + r.relative * fabsf(score);
        const bool above = score - tolerance > over;
        total += above;
        unsure[u] = !(above || score + tolerance < under);
      }
      any |= unsure[u];
    }
    if (!__any_sync(kAll, any)) continue;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      for (unsigned left = __ballot_sync(kAll, unsure[u]); left; left &= left - 1) {
        const int64_t j = c0 + base + u * kWarp + __ffs(left) - 1;
        const double score = exact(p, i, j);
        if (lane == 0) total += !(score < best[i]) && !contains(listed, starts[i], ends[i], j);
      }
    }
  }
  for (int width = kWarp / 2; width > 0; width /= 2) total += __shfl_xor_sync(kAll, total, width);
  if (lane == 0) counts[i] += total;
}

// Keys sort as (score, then lower index); NaN is the largest score. INT32_MIN in the upper half marks a place not yet
// taken.
__device__ int64_t key_of(float score, int64_t index) {
  const int32_t bits = score != score ? 0x7fc00000 : bits_as<int32_t>(score + 0.0f);
  const int32_t ordered = bits >= 0 ? bits : bits ^ 0x7fffffff;
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(ordered)) << 32 |
                              (0xffffffffu - static_cast<uint32_t>(index)));
}

// Below this a score cannot reach the key's place.
__device__ float threshold(int64_t key) {
  const int32_t ordered = static_cast<int32_t>(key >> 32);
  if (ordered == INT32_MIN) return -bits_as<float>(0x7f800000);
  const float score = bits_as<float>(ordered >= 0 ? ordered : ordered ^ 0x7fffffff);
  return score - fabsf(score) * 0x1p-22f;
}

// Sorts a power of two of keys in shared memory, largest first.
__device__ void sort_keys(int64_t* keys, int count) {
  for (int size = 2; size <= count; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int t = threadIdx.x; t < count / 2; t += kThreads) {
        const int at = 2 * t - (t & (stride - 1));
        const int64_t one = keys[at], other = keys[at + stride];
        if ((one < other) == ((at & size) == 0)) {
          keys[at] = other;
          keys[at + stride] = one;
        }
      }
      __syncthreads();
    }
  }
}

// Merges what the tile at (r0, c0) holds into the keys [M, k], largest first; pairs with equal exclude ids stay out.
// Possible columns gather behind the keys until no thread's next one is sure of a place; then their scores are computed
// and sorted in.
__global__ void select_kernel(const float* s, int64_t columns, int64_t r0, int64_t c0, Rounding r, Pairs p,
                              const int64_t* exclude_x, const int64_t* exclude_y, int k, int capacity, int64_t* keys) {
  JRL_DYNAMIC_SHARED(int64_t, select_buffer);
  __shared__ int waiting;
  const int64_t i = r0 + blockIdx.x;
  const float* line = s + blockIdx.x * columns;
  const float scale = r.row_scale[i], error = r.row_error[i];
  for (int t = threadIdx.x; t < k; t += kThreads) select_buffer[t] = keys[i * k + t];
  if (threadIdx.x == 0) waiting = 0;
  __syncthreads();
  for (int64_t base = 0; base < columns; base += kThreads) {
    const int64_t j = base + threadIdx.x;
    if (j < columns && !(exclude_x && exclude_x[i] == exclude_y[c0 + j])) {
      const float score = line[j] * (scale * r.column_scale[c0 + j]);
      const float tolerance = error * r.column_error[c0 + j] + r.relative * fabsf(score);
      if (!(score + tolerance < threshold(select_buffer[k - 1]))) select_buffer[k + atomicAdd(&waiting, 1)] = c0 + j;
    }
    __syncthreads();
    const int count = waiting;
    __syncthreads();
    if (count == 0 || (base + kThreads < columns && count <= capacity - k - kThreads)) continue;
    for (int q = threadIdx.x / kWarp; q < count; q += kThreads / kWarp) {
      const int64_t column = select_buffer[k + q];
      const float score = static_cast<float>(exact(p, i, column));
      __syncwarp();
      if (threadIdx.x % kWarp == 0) select_buffer[k + q] = key_of(score, column);
    }
    for (int t = k + count + threadIdx.x; t < capacity; t += kThreads) select_buffer[t] = INT64_MIN;
    if (threadIdx.x == 0) waiting = 0;
    __syncthreads();
    sort_keys(select_buffer, capacity);
  }
  for (int t = threadIdx.x; t < k; t += kThreads) keys[i * k + t] = select_buffer[t];
}

// out = - sum_d max(0, y - x)^2, kTile x kTile of it a block.
__global__ void order_kernel(int type, const void* x, const void* y, int64_t rows, int64_t columns, int64_t depth,
                             float* out) {
  __shared__ float xs[kDepth][kTile + 1], ys[kDepth][kTile + 1];
  const int64_t r0 = static_cast<int64_t>(blockIdx.x) * kTile, c0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int tx = threadIdx.x % (kTile / kPerThread), ty = threadIdx.x / (kTile / kPerThread);
  float total[kPerThread][kPerThread] = {};
  for (int64_t d0 = 0; d0 < depth; d0 += kDepth) {
    for (int t = threadIdx.x; t < kTile * kDepth; t += kThreads) {
      const int line = t / kDepth, d = t % kDepth;
      const bool inside = d0 + d < depth;
      xs[d][line] = inside && r0 + line < rows ? load(x, type, (r0 + line) * depth + d0 + d) : 0.0f;
      ys[d][line] = inside && c0 + line < columns ? load(y, type, (c0 + line) * depth + d0 + d) : 0.0f;
    }
    __syncthreads();
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int u = 0; u < kPerThread; ++u)
#pragma unroll
        for (int w = 0; w < kPerThread; ++w) {
          const float t = ys[d][tx + w * (kTile / kPerThread)] - xs[d][ty + u * (kTile / kPerThread)];
          const float v = 0.0f > t ? 0.0f : t;
          total[u][w] += v * v;
        }
    __syncthreads();
  }
  for (int u = 0; u < kPerThread; ++u)
    for (int w = 0; w < kPerThread; ++w) {
      const int64_t row = r0 + ty + u * (kTile / kPerThread), column = c0 + tx + w * (kTile / kPerThread);
      if (row < rows && column < columns) out[row * columns + column] = -total[u][w];
    }
}

unsigned blocks(int64_t rows, int64_t each) { return static_cast<unsigned>((rows + each - 1) / each); }

cudaError_t similarity_best_cuda(int metric, int type, const void* x, const void* y, int64_t depth,
                                 const double* x_norm, const double* y_norm, int64_t rows, const int64_t* starts,
                                 const int64_t* ends, const int64_t* listed, double* best, cudaStream_t stream) {
  const Pairs p{metric, type, x, y, depth, x_norm, y_norm, nullptr, nullptr, 0};
  JRL_LAUNCH(best_kernel, blocks(rows, kRowsPerBlock), kRowsPerBlock * kWarp, 0, stream, p, rows, starts, ends, listed,
             best);
  return cudaGetLastError();
}

cudaError_t similarity_count_cuda(const float* s, int64_t rows, int64_t columns, int64_t r0, int64_t c0,
                                  const float* row_scale, const float* column_scale, const float* row_error,
                                  const float* column_error, float relative, int metric, int type, const void* x,
                                  const void* y, int64_t depth, const double* x_norm, const double* y_norm,
                                  const int64_t* starts, const int64_t* ends, const int64_t* listed, const float* low,
                                  const float* high, const double* best, int64_t* counts, cudaStream_t stream) {
  const Pairs p{metric, type, x, y, depth, x_norm, y_norm, nullptr, nullptr, 0};
  const Rounding r{row_scale, column_scale, row_error, column_error, relative};
  JRL_LAUNCH(count_kernel, blocks(rows, kRowsPerBlock), kRowsPerBlock * kWarp, 0, stream, s, rows, columns, r0, c0, r,
             p, starts, ends, listed, low, high, best, counts);
  return cudaGetLastError();
}

// `capacity`, a power of two, is at least k + 2 kThreads.
cudaError_t similarity_select_cuda(const float* s, int64_t rows, int64_t columns, int64_t r0, int64_t c0,
                                   const float* row_scale, const float* column_scale, const float* row_error,
                                   const float* column_error, float relative, int metric, int type, const void* x,
                                   const void* y, int64_t depth, const double* x_norm, const double* y_norm,
                                   const void* a, const void* b, int64_t other_depth, const int64_t* exclude_x,
                                   const int64_t* exclude_y, int k, int capacity, int64_t* keys, cudaStream_t stream) {
  const Pairs p{metric, type, x, y, depth, x_norm, y_norm, a, b, other_depth};
  const Rounding r{row_scale, column_scale, row_error, column_error, relative};
  JRL_LAUNCH(select_kernel, static_cast<unsigned>(rows), kThreads, capacity * sizeof(int64_t), stream, s, columns, r0,
             c0, r, p, exclude_x, exclude_y, k, capacity, keys);
  return cudaGetLastError();
}

cudaError_t similarity_order_cuda(int type, const void* x, const void* y, int64_t rows, int64_t columns, int64_t depth,
                                  float* out, cudaStream_t stream) {
  const dim3 grid(blocks(rows, kTile), blocks(columns, kTile));
  JRL_LAUNCH(order_kernel, grid, kThreads, 0, stream, type, x, y, rows, columns, depth, out);
  return cudaGetLastError();
}

}  // namespace

JRL_LAUNCHER(similarity_best_cuda);
JRL_LAUNCHER(similarity_count_cuda);
JRL_LAUNCHER(similarity_select_cuda);
JRL_LAUNCHER(similarity_order_cuda);
