// Packs: the elements that a thread takes at a time, as they lie in memory and in the type of their arithmetic.
//
// All threads branch alike on the type of a tensor. Elements that do not fill 16 bytes are read and written one by
// one, with the same arithmetic.
#pragma once

#include "../math/storage.h"
#include "lanes.cuh"

namespace trainops::cuda {

template <typename Narrow>
__device__ void unpack_words(const uint4& half, float* x) {
  const uint32_t words[4] = {half.x, half.y, half.z, half.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = widen(Narrow{static_cast<uint16_t>(words[i] & 0xffffu)});
    x[2 * i + 1] = widen(Narrow{static_cast<uint16_t>(words[i] >> 16)});
  }
}

template <typename Narrow>
__device__ uint32_t pack_word(const float* x) {
  Narrow low, high;
  narrow(x[0], low);
  narrow(x[1], high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

template <typename Narrow>
__device__ uint4 pack_words(const float* x) {
  return {pack_word<Narrow>(x), pack_word<Narrow>(x + 2), pack_word<Narrow>(x + 4), pack_word<Narrow>(x + 6)};
}

__device__ inline void unpack(const Raw& raw, DType dtype, float (&x)[8]) {
  if (dtype == DType::float32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x[4 * i] = bit_cast<float>(raw.halves[i].x);
      x[4 * i + 1] = bit_cast<float>(raw.halves[i].y);
      x[4 * i + 2] = bit_cast<float>(raw.halves[i].z);
      x[4 * i + 3] = bit_cast<float>(raw.halves[i].w);
    }
  } else if (dtype == DType::float16) {
    unpack_words<Float16>(raw.halves[0], x);
  } else {
    unpack_words<BFloat16>(raw.halves[0], x);
  }
}

__device__ inline void unpack(const Raw& raw, DType, double (&x)[2]) {
  x[0] = bit_cast<double>(raw.halves[0].x | static_cast<uint64_t>(raw.halves[0].y) << 32);
  x[1] = bit_cast<double>(raw.halves[0].z | static_cast<uint64_t>(raw.halves[0].w) << 32);
}

__device__ inline Raw pack(const float (&x)[8], DType dtype) {
  Raw raw{};
  if (dtype == DType::bfloat16) {
    raw.halves[0] = pack_words<BFloat16>(x);
  } else if (dtype == DType::float16) {
    raw.halves[0] = pack_words<Float16>(x);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      raw.halves[i] = {bit_cast<uint32_t>(x[4 * i]), bit_cast<uint32_t>(x[4 * i + 1]),
                       bit_cast<uint32_t>(x[4 * i + 2]), bit_cast<uint32_t>(x[4 * i + 3])};
    }
  }
  return raw;
}

__device__ inline Raw pack(const double (&x)[2], DType) {
  const auto low = bit_cast<uint64_t>(x[0]), high = bit_cast<uint64_t>(x[1]);
  Raw raw{};
  raw.halves[0] = {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                   static_cast<uint32_t>(high >> 32)};
  return raw;
}

// What a cell is to hold: elements from `first` on. `is_special`: whether it may be rounded stochastically.
template <bool is_special>
__device__ Raw pack(const float (&x)[8], const Cell& cell, int64_t first) {
  if (!is_special || cell.dtype != DType::stochastic) return pack(x, cell.dtype);
  Raw raw{};
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t element = first + 2 * i;
    words[i] = round_stochastically(x[2 * i], cell.random.bits(element)) >> 16 |
               (round_stochastically(x[2 * i + 1], cell.random.bits(element + 1)) & 0xffff0000u);
  }
  raw.halves[0] = {words[0], words[1], words[2], words[3]};
  return raw;
}

template <bool is_special>
__device__ Raw pack(const double (&x)[2], const Cell& cell, int64_t) {
  return pack(x, cell.dtype);
}

// `has_float64`: whether the tensor may be float64.
template <typename T, bool has_float64 = true>
__device__ T load(const Cell& cell, int64_t i) {
  switch (cell.dtype) {
    case DType::float32:
      return static_cast<T>(static_cast<const float*>(cell.address)[i]);
    case DType::float64:
      if constexpr (!has_float64) __builtin_unreachable();
      return static_cast<T>(static_cast<const double*>(cell.address)[i]);
    case DType::float16:
      return static_cast<T>(widen(static_cast<const Float16*>(cell.address)[i]));
    default:
      return static_cast<T>(widen(static_cast<const BFloat16*>(cell.address)[i]));
  }
}

template <typename S, typename T>
__device__ void load_elements(const Cell& cell, int64_t first, int count, T (&x)[kPack<T>]) {
  const S* const elements = static_cast<const S*>(cell.address) + first;
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) x[j] = j < count ? static_cast<T>(widen(elements[j])) : T(0);
}

// The first `count` elements of a pack, one by one, in the type of their arithmetic. The others are zeros.
__device__ inline void load_pack(const Cell& cell, int64_t first, int count, double (&x)[2]) {
  load_elements<double>(cell, first, count, x);
}
__device__ inline void load_pack(const Cell& cell, int64_t first, int count, float (&x)[8]) {
  if (cell.dtype == DType::float32) return load_elements<float>(cell, first, count, x);
  if (cell.dtype == DType::bfloat16) return load_elements<BFloat16>(cell, first, count, x);
  load_elements<Float16>(cell, first, count, x);
}

template <bool is_special = false, typename T>
__device__ void store(const Cell& cell, int64_t i, T x) {
  if (is_special && cell.dtype == DType::stochastic) {
    return narrow(static_cast<float>(x), cell.random.bits(i), static_cast<BFloat16*>(cell.address)[i]);
  }
  switch (cell.dtype) {
    case DType::float32:
      static_cast<float*>(cell.address)[i] = static_cast<float>(x);
      break;
    case DType::float64:
      static_cast<double*>(cell.address)[i] = static_cast<double>(x);
      break;
    case DType::bfloat16:
      narrow(x, static_cast<BFloat16*>(cell.address)[i]);
      break;
    default:
      narrow(x, static_cast<Float16*>(cell.address)[i]);
  }
}

}  // namespace trainops::cuda
