// Launches kernels, and finds their rows and chunks. A block takes chunk after chunk of a table.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"

#ifndef TRAINOPS_LAUNCH
#define TRAINOPS_LAUNCH(kernel, grid, stream, ...) kernel<<<grid, kThreads, 0, stream>>>(__VA_ARGS__)
#endif

namespace trainops::cuda {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// On the host

// Makes a device current for its lifetime.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* kernel);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

// Throws a std::runtime_error that names the kernel.
void check(cudaError_t status, const char* kernel);

// One of the kernels, which are all compiled for the same GPUs.
const void* any_kernel();

// The number of blocks for `chunks`. No more than run at a time, because each takes chunk after chunk.
unsigned grid_size(const void* kernel, int64_t chunks, int device, const char* name);

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const char* name, int64_t chunks, const Queue& queue, const Args&... args) {
  if (chunks == 0) return;
  const DeviceGuard device_guard(queue.device, name);
  const unsigned grid = grid_size(reinterpret_cast<const void*>(kernel), chunks, queue.device, name);
  TRAINOPS_LAUNCH(kernel, grid, static_cast<cudaStream_t>(queue.stream), args...);
  check(cudaGetLastError(), name);
}

// On the device

// An address that a table holds. Without this hint the compiler emits generic loads.
template <typename T>
__device__ T* global(int64_t word) {
  T* const address = reinterpret_cast<T*>(word);
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

struct Row {
  const int64_t* words;

  __device__ int64_t numel() const { return words[kNumel]; }
  __device__ void* address(int column) const { return global<void>(words[kAddresses + column]); }
  __device__ Cell cell(int column) const { return {address(column), dtype_of_column(words[kDTypes], column)}; }
};

__device__ inline Row row_of(const DeviceTable& table, int64_t row) { return {table.rows + row * table.row_words}; }

// Elements [begin, end) of a row.
struct Chunk {
  Row row;
  int64_t begin, end;
};

__device__ inline Chunk chunk_of(const DeviceTable& table, int64_t index) {
  const int64_t* const words = table.chunks + kChunkWords * index;
  const Row row = row_of(table, words[kChunkRow]);
  const int64_t begin = words[kChunkBegin];
  const int64_t left = row.numel() - begin;
  return {row, begin, begin + (left < kChunkNumel ? left : kChunkNumel)};
}

// True for all threads of the block that calls this last. It then sees what the other blocks have written. The
// counter must be 0 on entry. The last block resets it.
__device__ inline bool is_last_block(unsigned* counter) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace trainops::cuda
