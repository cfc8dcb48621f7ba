// What DropPath and its derivative have in common: how samples are cut into tiles, and in which types tiles are read.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../math/drop_path.h"
#include "convert.h"
#include "kernels.h"

namespace trainops::cpu {

template <typename S>
constexpr bool is_narrow = std::is_same_v<S, BFloat16> || std::is_same_v<S, Float16>;

// The type of the arithmetic on values that are stored as S.
template <typename S>
using Wide = std::conditional_t<is_narrow<S>, float, S>;

// The elements of `cell` from `begin` on, as S: 16-bit ones are read where they lie, others as `load` does.
template <typename S>
const S* read(const Cell& cell, int64_t begin, int64_t size, S* buffer) {
  if (cell.address == nullptr) return nullptr;
  if constexpr (is_narrow<S>) {
    return static_cast<const S*>(cell.address) + begin;
  } else {
    return load(cell, begin, size, buffer);
  }
}

// Where to write elements before `written`.
template <typename S>
S* room(const Cell& cell, int64_t begin, S* buffer) {
  if constexpr (is_narrow<S>) {
    return static_cast<S*>(cell.address) + begin;
  } else {
    return place(cell, begin, buffer);
  }
}

template <typename S>
void written(const Cell& cell, int64_t begin, int64_t size, const S* values) {
  if constexpr (!is_narrow<S>) store(cell, begin, size, values);
}

// Calls function(S{}) with the type that tiles are read in: that of all of `cells` where they have one, else the
// type of the arithmetic.
template <typename Function>
void with_type(std::initializer_list<Cell> cells, Function function) {
  const DType dtype = cells.begin()->dtype;
  const bool same = std::all_of(cells.begin(), cells.end(),
                                [&](const Cell& cell) { return cell.address == nullptr || cell.dtype == dtype; });
  if (dtype == DType::float64) return function(double{});
  if (same && dtype == DType::bfloat16) return function(BFloat16{});
  if (same && dtype == DType::float16) return function(Float16{});
  function(float{});
}

// Layer scale, repeated so often that tiles of whole rows can start at its first element; nothing where there is
// none.
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
