// The formulas of this folder compile for the CPU and for CUDA devices alike.
#pragma once

#ifdef __CUDACC__
#define TRAINOPS_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define TRAINOPS_HOST_DEVICE inline __attribute__((always_inline))
#else
#define TRAINOPS_HOST_DEVICE inline
#endif
