// State of a rule, which may be kept in 8 bits (math/codes.h). The elements of a block are those of neighbouring
// lanes of a warp: 8 of each lane in packs, one of each where elements go one by one. All lanes of a warp look for a
// scale together, also those that have no elements.
#pragma once

#include "../core/schema.h"
#include "packs.cuh"

namespace trainops::cuda {

static_assert(kChunkNumel % kCodeBlock == 0 && kCodeBlock % kPack<float> == 0, "chunks and packs fill blocks");
static_assert(kCodeBlock == kWarp && kThreads % kWarp == 0, "a warp has one block, or several");

// Whether a kernel knows codes, which float64 has not.
template <bool is_special, typename T>
constexpr bool kMayHaveCodes = is_special && sizeof(T) == 4;

// A bit for each state of a rule: whether its codes have a sign.
template <typename Rule>
constexpr unsigned signed_states() {
  unsigned bits = 0;
  for (int i = 0; i < Rule::kStates; ++i) bits |= (Rule::state[i].use & kSignedCodes ? 1u : 0u) << i;
  return bits;
}
template <typename Rule>
constexpr unsigned kSignedStates = signed_states<Rule>();

// What the random bits of a row depend on. It is in shared memory, and read anew for each pack: else it would take
// registers that are scarce.
struct RowRandom {
  Random param, codes;
};
__device__ inline Random read_again(const volatile Random& random) { return {random.key, random.origin}; }

__device__ inline uint8_t& scale_at(const Cell& cell, int64_t numel, int64_t i) {
  return (static_cast<uint8_t*>(cell.address) + numel)[static_cast<uint64_t>(i) / kCodeBlock];
}

// The scale of a block that lies in so many lanes, of which each has the largest of its own elements. All lanes have
// then read the block's old scale, which one of them writes.
template <int lanes>
__device__ int32_t scale_of_lanes(int32_t largest) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    const int32_t other = __shfl_xor_sync(kAllLanes, largest, distance);
    largest = other > largest ? other : largest;
  }
  __syncwarp();
  return scale_of(largest);
}

// 8 codes, in one access or in narrower ones, and the scale of their block.
__device__ inline Raw fetch_codes(const Cell& cell, int64_t numel, const LaneOffset& offset) {
  Raw raw{};
  if (!offset.has_first) return raw;
  const uint8_t* const address = static_cast<const uint8_t*>(cell.address) + offset.first;
  uint64_t codes = 0;
  if (is_multiple(address, 8)) {
    codes = *reinterpret_cast<const uint64_t*>(address);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) codes |= static_cast<uint64_t>(address[j]) << (8 * j);
  }
  raw.halves[0] = {static_cast<uint32_t>(codes), static_cast<uint32_t>(codes >> 32),
                   scale_at(cell, numel, offset.first), 0u};
  return raw;
}

__device__ inline void put_codes(const Cell& cell, int64_t numel, const LaneOffset& offset, const Raw& raw) {
  if (!offset.has_first) return;
  uint8_t* const address = static_cast<uint8_t*>(cell.address) + offset.first;
  const uint64_t codes = raw.halves[0].x | static_cast<uint64_t>(raw.halves[0].y) << 32;
  if (is_multiple(address, 8)) {
    *reinterpret_cast<uint64_t*>(address) = codes;
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) address[j] = static_cast<uint8_t>(codes >> (8 * j));
  }
  if (offset.first % kCodeBlock == 0) scale_at(cell, numel, offset.first) = static_cast<uint8_t>(raw.halves[0].z);
}

// Whether one of four codes is infinity or NaN, the last two.
template <bool is_signed>
__device__ bool has_last(uint32_t codes) {
  const uint32_t above = (codes & 0x7f7f7f7fu) + 0x02020202u;
  return ((is_signed ? above : above & codes) & 0x80808080u) != 0;
}

template <bool is_signed>
__device__ void unpack_codes(const Raw& raw, float (&x)[8]) {
  const uint32_t words[2] = {raw.halves[0].x, raw.halves[0].y};
  const int32_t first = Code<is_signed>::first(static_cast<int32_t>(raw.halves[0].z));
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] = Code<is_signed>::decode_finite(words[j / 4] >> (8 * (j % 4)) & 0xffu, first);
  if (!has_last<is_signed>(words[0]) && !has_last<is_signed>(words[1])) return;
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] = Code<is_signed>::decode(words[j / 4] >> (8 * (j % 4)) & 0xffu, first);
}

// The words of random bits of a pack, one for each pair of elements.
__device__ inline void random_words(const Random& random, int64_t begin, uint32_t (&words)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) words[j] = word_of_codes(random, begin + 2 * j);
}

// Of elements from `begin` on.
template <bool is_signed>
__device__ Raw pack_codes(const float (&x)[8], int64_t begin, const Random& random) {
  int32_t largest = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int32_t size = finite_size(x[j]);
    largest = size > largest ? size : largest;
  }
  const int32_t scale = scale_of_lanes<kCodeBlock / 8>(largest), first = Code<is_signed>::first(scale);
  uint32_t words[4];
  random_words(random, begin, words);
  uint32_t codes[2] = {};
  bool is_odd = false;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int32_t its = Code<is_signed>::random(words[j / 2], j);
    is_odd |= !(fabsf(x[j]) < INFINITY) || Code<is_signed>::is_odd(x[j], first);
    codes[j / 4] |= Code<is_signed>::encode_even(x[j], first, its) << (8 * (j % 4));
  }
  if (is_odd) {
    codes[0] = codes[1] = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int32_t its = Code<is_signed>::random(words[j / 2], j);
      codes[j / 4] |= Code<is_signed>::encode(x[j], first, its) << (8 * (j % 4));
    }
  }
  Raw raw{};
  raw.halves[0] = {codes[0], codes[1], static_cast<uint32_t>(scale), 0u};
  return raw;
}

// A pack of a state, of any type.
template <bool is_special, typename T>
__device__ Raw fetch_state(const Cell& cell, int64_t numel, const LaneOffset& offset) {
  if constexpr (kMayHaveCodes<is_special, T>) {
    if (is_codes(cell.dtype)) return fetch_codes(cell, numel, offset);
  }
  return fetch<T>(cell, offset);
}

template <bool is_special, typename T>
__device__ void unpack_state(const Raw& raw, DType dtype, bool is_signed, T (&x)[kPack<T>]) {
  if constexpr (kMayHaveCodes<is_special, T>) {
    if (is_codes(dtype)) return is_signed ? unpack_codes<true>(raw, x) : unpack_codes<false>(raw, x);
  }
  unpack(raw, dtype, x);
}

template <bool is_special, typename T>
__device__ void put_state(const Cell& cell, int64_t numel, const LaneOffset& offset, bool is_signed,
                          const T (&x)[kPack<T>], const RowRandom& random) {
  if constexpr (kMayHaveCodes<is_special, T>) {
    if (is_codes(cell.dtype)) {
      const Random its = read_again(random.codes);
      const Raw raw = is_signed ? pack_codes<true>(x, offset.first, its) : pack_codes<false>(x, offset.first, its);
      return put_codes(cell, numel, offset, raw);
    }
  }
  put<T>(cell, offset, pack(x, cell.dtype));
}

// A single element of a state. A lane that has none has a zero.
template <bool is_special, typename T>
__device__ T load_state(const Cell& cell, int64_t numel, int64_t i, bool is_signed, bool exists) {
  if (!exists) return T(0);
  if constexpr (kMayHaveCodes<is_special, T>) {
    if (is_codes(cell.dtype)) {
      const uint32_t code = static_cast<const uint8_t*>(cell.address)[i];
      const int32_t scale = scale_at(cell, numel, i);
      return is_signed ? Code<true>::decode(code, Code<true>::first(scale))
                       : Code<false>::decode(code, Code<false>::first(scale));
    }
  }
  return load<T>(cell, i);
}

template <bool is_signed>
__device__ void store_code(const Cell& cell, int64_t numel, int64_t i, bool exists, float x, const Random& random) {
  const int32_t scale = scale_of_lanes<kCodeBlock>(exists ? finite_size(x) : 0);
  if (!exists) return;
  const int32_t its = Code<is_signed>::random(word_of_codes(random, i), i);
  const uint32_t code = Code<is_signed>::encode(x, Code<is_signed>::first(scale), its);
  static_cast<uint8_t*>(cell.address)[i] = static_cast<uint8_t>(code);
  if (i % kCodeBlock == 0) scale_at(cell, numel, i) = static_cast<uint8_t>(scale);
}

template <bool is_special, typename T>
__device__ void store_state(const Cell& cell, int64_t numel, int64_t i, bool is_signed, bool exists, T x,
                            const RowRandom& random) {
  if constexpr (kMayHaveCodes<is_special, T>) {
    if (is_codes(cell.dtype)) {
      return is_signed ? store_code<true>(cell, numel, i, exists, x, random.codes)
                       : store_code<false>(cell, numel, i, exists, x, random.codes);
    }
  }
  if (exists) store(cell, i, x);
}

}  // namespace trainops::cuda
