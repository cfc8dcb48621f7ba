// Reads and writes the elements of a chunk.
//
// Each thread takes 32 bytes at a time (counted in the type of the arithmetic; 16 bytes of float64). It first reads
// all tensors in accesses of 16 bytes, so that the reads overlap, and then converts them. All threads branch alike on
// the type of a tensor. Elements that do not fill 16 bytes, and rows with an address that is no multiple of 16, are
// read and written one by one, with the same arithmetic.
#pragma once

#include "../math/storage.h"
#include "common.cuh"

namespace trainops::cuda {

// Elements that a thread takes of each tensor at a time: two halves of 16 bytes as float, one as double, which needs
// more registers.
template <typename T>
constexpr int kHalf = 16 / sizeof(T);
template <typename T>
constexpr int kPack = sizeof(T) == 8 ? kHalf<T> : 2 * kHalf<T>;

// Assigns the elements of [begin, end) to threads. If no tensor is 16-bit, adjacent threads read adjacent halves. A
// 16-bit tensor needs both halves of a pack adjacent.
template <typename T>
struct VectorRange {
  int64_t begin, body, end;  // [begin, body): in whole halves or packs; [body, end): one by one
  int stride, second;        // of a thread's first half from its neighbour's; of its second half from its first

  __device__ VectorRange(int64_t from, int64_t to, int threads) : begin(from), end(to) {
    address_bits_ = 0;
    has_16_bit_ = mixes_float64_ = false;
    threads_ = threads;
  }

  __device__ void add(const Cell& cell) {
    address_bits_ |= reinterpret_cast<uintptr_t>(cell.address);
    if (cell.address == nullptr) return;
    has_16_bit_ |= itemsize(cell.dtype) == 2;
    // Packs cannot mix 8-byte types with others, so such rows go element by element.
    mixes_float64_ |= (itemsize(cell.dtype) == 8) != (sizeof(T) == 8);
  }

  // Called after all tensors are added. If not `regular`, elements go one by one.
  __device__ void close(bool regular = true) {
    const int64_t granule = has_16_bit_ ? kPack<T> : kHalf<T>;
    body = address_bits_ % 16 != 0 || mixes_float64_ || !regular ? begin : begin + ((end - begin) & -granule);
    stride = static_cast<int>(granule);
    second = has_16_bit_ ? kHalf<T> : kHalf<T> * threads_;
  }

 private:
  uintptr_t address_bits_;  // of all addresses, or-ed
  bool has_16_bit_, mixes_float64_;
  int threads_;
};

// A thread's pack of one tensor as it lies in memory. A tensor of 16-bit numbers fills the first half.
struct Raw {
  uint4 halves[2];
};

// The elements that a thread's halves begin at, and whether they are inside the range's body.
struct LaneOffset {
  int64_t first, second;
  bool has_first, has_second;

  LaneOffset() = default;

  // A pack that is read whole if it begins before `body`, else not at all.
  template <typename T>
  __device__ static LaneOffset of_pack(int64_t first, int64_t body) {
    LaneOffset offset;
    offset.first = first;
    offset.second = first + kHalf<T>;
    offset.has_first = offset.has_second = first < body;
    return offset;
  }

  template <typename T>
  __device__ LaneOffset(const VectorRange<T>& range, int64_t tile, int thread)
      : first(tile + thread * range.stride), second(first + range.second) {
    has_first = first < range.body;
    has_second = sizeof(T) == 4 && second < range.body;
  }
};

// Written in PTX, because compilers split 16-byte accesses and do not always join them again.
__device__ inline uint4 load_half(const char* address) {
#ifdef __CUDA_ARCH__
  uint4 half;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(half.x), "=r"(half.y), "=r"(half.z), "=r"(half.w)
               : "l"(__cvta_generic_to_global(address)));
  return half;
#else
  return *reinterpret_cast<const uint4*>(address);
#endif
}

__device__ inline void store_half(char* address, const uint4& half) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(half.x),
               "r"(half.y), "r"(half.z), "r"(half.w)
               : "memory");
#else
  *reinterpret_cast<uint4*>(address) = half;
#endif
}

template <typename T>
__device__ Raw fetch(const Cell& cell, const LaneOffset& offset) {
  Raw raw{};
  if (cell.address == nullptr) return raw;
  const char* const address = static_cast<const char*>(cell.address);
  const int size = sizeof(T) == 8 ? 8 : itemsize(cell.dtype);
  if (offset.has_first) raw.halves[0] = load_half(address + offset.first * size);
  if (size == 4 && offset.has_second) raw.halves[1] = load_half(address + offset.second * size);
  return raw;
}

template <typename T>
__device__ void put(const Cell& cell, const LaneOffset& offset, const Raw& raw) {
  char* const address = static_cast<char*>(cell.address);
  const int size = sizeof(T) == 8 ? 8 : itemsize(cell.dtype);
  if (offset.has_first) store_half(address + offset.first * size, raw.halves[0]);
  if (size == 4 && offset.has_second) store_half(address + offset.second * size, raw.halves[1]);
}

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
  } else if (dtype == DType::bfloat16) {
    unpack_words<BFloat16>(raw.halves[0], x);
  } else {
    unpack_words<Float16>(raw.halves[0], x);
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

// `has_float64`: whether the tensor may be float64.
template <typename T, bool has_float64 = true>
__device__ T load(const Cell& cell, int64_t i) {
  switch (cell.dtype) {
    case DType::float32:
      return static_cast<T>(static_cast<const float*>(cell.address)[i]);
    case DType::float64:
      if constexpr (!has_float64) __builtin_unreachable();
      return static_cast<T>(static_cast<const double*>(cell.address)[i]);
    case DType::bfloat16:
      return static_cast<T>(widen(static_cast<const BFloat16*>(cell.address)[i]));
    default:
      return static_cast<T>(widen(static_cast<const Float16*>(cell.address)[i]));
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

template <typename T>
__device__ void store(const Cell& cell, int64_t i, T x) {
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
