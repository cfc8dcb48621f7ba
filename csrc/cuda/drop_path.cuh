// What DropPath and its derivative have in common: which samples they take, and products, each rounded to the type
// that PyTorch gives it.
#pragma once

#include "../math/drop_path.h"
#include "packs.cuh"

namespace trainops::cuda {

// How far ahead of a sample's elements those are that it takes of another tensor: of sample rows[sample].
__device__ inline int64_t ahead(const int64_t* rows, int64_t sample, int64_t sample_numel) {
  return rows == nullptr ? 0 : (rows[sample] - sample) * sample_numel;
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

// `x` is rounded first: a gradient may come in another type. Without a layer scale, that is 1.
template <typename T, typename Round>
__device__ T term(T x, T layer_scale, T mask, Round round) {
  return drop_path_element<true>(round(x), layer_scale, mask, round);
}

}  // namespace trainops::cuda
