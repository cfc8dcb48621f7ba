// One element or pack of an average, for ema.cu and for a fused step of any rule. The formula is in math/ema.h.
#pragma once

#include "../math/ema.h"
#include "weights.cuh"

namespace trainops::cuda {

// The arithmetic is in float64 where either tensor is. The weight is read as it was stored.
__device__ inline void ema_one(const Cell& average, const Weight& weight, int64_t i, double decay) {
  if (average.dtype == DType::float64 || weight.param.dtype == DType::float64) {
    store(average, i, ema_element(load<double>(average, i), load<double>(weight, i), EMAWeight<double>(decay)));
  } else {
    store(average, i, ema_element(load<float>(average, i), load<float>(weight, i), EMAWeight<float>(decay)));
  }
}

// The weight of a loop, in registers. Only rows with an average need it, so that the compiler would put its
// arithmetic, which is in float64, into the loop.
template <typename T>
__device__ EMAWeight<T> weight_of_loop(double decay) {
  EMAWeight<T> weight(decay);
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) asm volatile("" : "+f"(weight.weight), "+f"(weight.complement));
#endif
  return weight;
}

// Moves a pack of the average. Takes and returns packs as they lie in memory.
template <typename T>
__device__ Raw ema_pack(const Raw& average, DType average_dtype, const Raw& param, DType param_dtype,
                        const EMAWeight<T>& weight) {
  T moved[kPack<T>], towards[kPack<T>];
  unpack(average, average_dtype, moved);
  unpack(param, param_dtype, towards);
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) moved[j] = ema_element(moved[j], towards[j], weight);
  return pack(moved, average_dtype);
}

}  // namespace trainops::cuda
