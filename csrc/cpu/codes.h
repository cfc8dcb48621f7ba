// Moments in 8 bits as numbers, and back (math/codes.h). Tiles begin with a block.
#pragma once

#include "../math/codes.h"
#include "convert.h"

namespace trainops::cpu {

static_assert(kTileNumel % kCodeBlock == 0 && kChunkNumel % kTileNumel == 0, "tiles begin with a block");

// The values of a tile before a step, which bfloat16 has exactly, and those after it: even elements and odd ones
// apart, as registers have them where two 16-bit numbers lie in a word.
struct CodesColumn {
  const BFloat16* before;
  float *even, *odd;
};

// `begin` is even.
TRAINOPS_HOST_DEVICE CodesColumn from(CodesColumn column, int64_t begin) {
  return {column.before + begin, column.even + begin / 2, column.odd + begin / 2};
}
TRAINOPS_HOST_DEVICE float get(CodesColumn column, int64_t i) { return widen(column.before[i]); }
TRAINOPS_HOST_DEVICE void put(float value, CodesColumn column, int64_t i) {
  (i % 2 == 0 ? column.even : column.odd)[i / 2] = value;
}
TRAINOPS_HOST_DEVICE Pair get_pair(CodesColumn column, int64_t pair) { return get_pair(column.before, pair); }
TRAINOPS_HOST_DEVICE void put_pair(Pair values, CodesColumn column, int64_t pair) {
  column.even[pair] = values.low;
  column.odd[pair] = values.high;
}
template <>
inline constexpr bool has_pairs<CodesColumn> = true;
TRAINOPS_HOST_DEVICE void prefetch(CodesColumn, int64_t) {}  // read_codes does

// The words of random bits for a tile, one for each pair of elements.
void random_words(const Random& random, int64_t begin, int64_t size, uint32_t* words);

void read_codes(const Cell& cell, int64_t begin, int64_t size, BFloat16* values);

void write_codes(const Cell& cell, int64_t begin, int64_t size, const float* values, const uint32_t* words);

// Of a whole tile's length: what follows the elements of its last block becomes zero.
void write_codes(const Cell& cell, int64_t begin, int64_t size, float* even, float* odd, const uint32_t* words);

}  // namespace trainops::cpu
