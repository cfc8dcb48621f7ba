// Stands in for CUDA's header of this name when the .cu files are compiled as C++: the language's extensions, and the
// few functions that the kernels and launchers use. cuda_shim.cpp runs the kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, gridDim;

namespace shim {

void run(const char* kernel, unsigned grid, const std::function<void()>& thread);
void sync_block();
void sync_warp();
int any_in_block(int value);

// What lane `from` of the warp has. Slots are written between two barriers and read between the next two.
template <typename T>
T exchange(T value, unsigned from) {
  alignas(16) static char slots[2][1024][16];
  static unsigned turns[1024];
  const unsigned thread = threadIdx.x;
  auto& slot = slots[turns[thread]++ % 2];
  std::memcpy(slot[thread], &value, sizeof(T));
  sync_warp();
  std::memcpy(&value, slot[thread / 32 * 32 + from], sizeof(T));
  return value;
}

}  // namespace shim

#define TRAINOPS_LAUNCH(kernel, grid, stream, ...) \
  ((void)(stream), shim::run(name, grid, [&] { kernel(__VA_ARGS__); }))

inline void __syncthreads() { shim::sync_block(); }
inline int __syncthreads_or(int value) { return shim::any_in_block(value); }
inline void __threadfence() {}
inline void __syncwarp(unsigned = ~0u) { shim::sync_warp(); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return shim::exchange(value, static_cast<unsigned>(lane));
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32 + distance;
  return shim::exchange(value, lane < 32 ? lane : threadIdx.x % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return shim::exchange(value, threadIdx.x % 32 ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(shim::exchange(value, lane)) << lane;
  return votes;
}
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
struct cudaFuncAttributes {};
struct cudaDeviceProp {
  char name[32];
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          size_t shared);
