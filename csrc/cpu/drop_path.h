// Common to DropPath and its derivative: roundings, layer scale, and the cut of samples into tiles.
#pragma once

#include <algorithm>
#include <vector>

#include "../math/drop_path.h"
#include "convert.h"
#include "kernels.h"

namespace trainops::cpu {

// Expands macro(S, Round) for every type S that tiles are read in and every rounding of products that it comes with.
#define TRAINOPS_FOR_EACH_ROUNDING(macro)                                                \
  macro(float, RoundNothing) macro(double, RoundNothing) macro(float, RoundTo<BFloat16>) \
      macro(float, RoundTo<Float16>) macro(BFloat16, RoundTo<BFloat16>) macro(Float16, RoundTo<Float16>)

// Calls function(round), where round rounds to the type of the products. Tiles of a 16-bit type have products of it.
template <typename S, typename Function>
void with_rounding(DType products, Function function) {
  if constexpr (is_narrow<S>) {
    function(RoundTo<S>{});
  } else {
    if constexpr (std::is_same_v<S, float>) {
      if (products == DType::bfloat16) return function(RoundTo<BFloat16>{});
      if (products == DType::float16) return function(RoundTo<Float16>{});
    }
    function(RoundNothing{});
  }
}

// Rounds an operand that may be wider than the products. 16-bit operands need no rounding.
template <typename S, typename Round>
TRAINOPS_HOST_DEVICE Wide<S> read_operand(S x, Round round) {
  return is_narrow<S> ? widen(x) : round(widen(x));
}

// Repeats layer scale to fill a tile. Empty if there is none.
template <typename T>
std::vector<T> repeat_layer_scale(const Cell& layer_scale, int64_t channels) {
  if (layer_scale.address == nullptr) return {};
  std::vector<T> once(channels);
  const T* values = load(layer_scale, 0, channels, once.data());
  std::vector<T> repeated;
  do {
    repeated.insert(repeated.end(), values, values + channels);
  } while (static_cast<int64_t>(repeated.size()) + channels <= kTileNumel);
  return repeated;
}

// Elements [begin, begin + size) of one sample.
struct SampleTile {
  int64_t sample, begin, size;
};

// Calls body(chunk, tile) for all tiles, chunks in parallel. No tile crosses a sample's end or a multiple of
// `period`.
template <typename Body>
void for_each_sample_tile(int64_t samples, int64_t sample_numel, int64_t period, int64_t chunk_numel, Body body) {
  const int64_t numel = samples * sample_numel;
  for_each_in_parallel((numel + chunk_numel - 1) / chunk_numel, [&](int64_t chunk) {
    const int64_t end = std::min(numel, (chunk + 1) * chunk_numel);
    SampleTile tile{chunk * chunk_numel / sample_numel, chunk * chunk_numel % sample_numel, 0};
    for (int64_t i = chunk * chunk_numel; i < end; i += tile.size) {
      tile.size = std::min({kTileNumel, period - i % period, sample_numel - tile.begin, end - i});
      body(chunk, tile);
      tile.begin += tile.size;
      if (tile.begin == sample_numel) tile = {tile.sample + 1, 0, tile.size};
    }
  });
}

// One value of the mask.
template <typename T>
T mask_of(const Cell& mask, int64_t sample) {
  T buffer[1];
  return *load(mask, sample, 1, buffer);
}

inline int64_t row_of(const int64_t* rows, int64_t sample) { return rows == nullptr ? sample : rows[sample]; }

}  // namespace trainops::cpu
