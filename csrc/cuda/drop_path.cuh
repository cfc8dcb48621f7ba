// Common to DropPath and its derivative: which samples they read, and products, each rounded to the type that PyTorch
// gives it.
#pragma once

#include "../math/drop_path.h"
#include "packs.cuh"

namespace trainops::cuda {

// Offset from a sample's elements to those of sample rows[sample] in another tensor.
__device__ inline int64_t sample_offset(const int64_t* rows, int64_t sample, int64_t sample_numel) {
  return rows == nullptr ? 0 : (rows[sample] - sample) * sample_numel;
}

// An element of an operand. None is float64 where arithmetic is in float32: its loops need no conversion.
template <typename T>
__device__ T load_operand(const Cell& operand, int64_t i) {
  return load<T, sizeof(T) == 8>(operand, i);
}

// Calls function(round), where round rounds to the type of the products.
template <typename T, typename Function>
__device__ void with_rounding(DType products, Function function) {
  if constexpr (sizeof(T) == 4) {
    if (products == DType::bfloat16) return function(RoundTo<BFloat16>{});
    if (products == DType::float16) return function(RoundTo<Float16>{});
  }
  function(RoundNothing{});
}

// Rounds `x` first, since a gradient may have a wider type. Pass 1 if there is no layer scale.
template <typename T, typename Round>
__device__ T term(T x, T layer_scale, T mask, Round round) {
  return drop_path_element<true>(round(x), layer_scale, mask, round);
}

}  // namespace trainops::cuda
