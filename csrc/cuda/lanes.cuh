// Which elements of a chunk each thread takes, and its accesses to memory.
//
// Each thread takes 32 bytes at a time (counted in the type of the arithmetic; 16 bytes of float64). It first reads
// all tensors in accesses of 16 bytes, so that the reads overlap. A tensor whose address is no multiple of 16 is read
// and written in narrower accesses, whatever the others of its row are.
#pragma once

#include "../math/codes.h"
#include "common.cuh"

namespace trainops::cuda {

// Elements that a thread takes of each tensor at a time: two halves of 16 bytes as float, one as double, which needs
// more registers.
template <typename T>
constexpr int kHalf = 16 / sizeof(T);
template <typename T>
constexpr int kPack = sizeof(T) == 8 ? kHalf<T> : 2 * kHalf<T>;

// Assigns the elements of [begin, end) to threads. If no tensor is 16-bit, adjacent threads read adjacent halves. A
// 16-bit tensor, or one of codes, needs both halves of a pack adjacent. Codes are taken in whole blocks.
template <typename T>
struct VectorRange {
  int64_t begin, body, end;  // [begin, body): in whole halves or packs; [body, end): one by one
  int stride, second;        // of a thread's first half from its neighbour's; of its second half from its first

  __device__ VectorRange(int64_t from, int64_t to, int threads) : begin(from), end(to) {
    has_narrow_ = has_codes_ = mixes_float64_ = false;
    threads_ = threads;
  }

  template <bool may_have_codes = false>
  __device__ void add(const Cell& cell) {
    if (cell.address == nullptr) return;
    has_narrow_ |= itemsize(cell.dtype) <= 2;
    has_codes_ |= may_have_codes && is_codes(cell.dtype);
    // Packs cannot mix 8-byte types with others, so such rows go element by element.
    mixes_float64_ |= (itemsize(cell.dtype) == 8) != (sizeof(T) == 8);
  }

  // Called after all tensors are added. If not `regular`, elements go one by one.
  __device__ void close(bool regular = true) {
    stride = has_narrow_ ? kPack<T> : kHalf<T>;
    second = has_narrow_ ? kHalf<T> : kHalf<T> * threads_;
    const int64_t granule = has_codes_ ? kCodeBlock : stride;
    body = mixes_float64_ || !regular ? begin : begin + ((end - begin) & -granule);
  }

 private:
  bool has_narrow_, has_codes_, mixes_float64_;
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
__device__ inline uint4 load_16(const char* address) {
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

__device__ inline void store_16(char* address, const uint4& half) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(half.x),
               "r"(half.y), "r"(half.z), "r"(half.w)
               : "memory");
#else
  *reinterpret_cast<uint4*>(address) = half;
#endif
}

__device__ inline bool is_multiple(const void* address, int bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// In one access, or in words of 4 bytes or, of 16-bit elements at an odd address, of 2.
__device__ inline uint4 load_half(const char* address) {
  if (is_multiple(address, 16)) return load_16(address);
  uint32_t words[4];
  if (is_multiple(address, 4)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = reinterpret_cast<const uint32_t*>(address)[i];
  } else {
    const auto* const shorts = reinterpret_cast<const uint16_t*>(address);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = shorts[2 * i] | static_cast<uint32_t>(shorts[2 * i + 1]) << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

__device__ inline void store_half(char* address, const uint4& half) {
  if (is_multiple(address, 16)) return store_16(address, half);
  const uint32_t words[4] = {half.x, half.y, half.z, half.w};
  if (is_multiple(address, 4)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(address)[i] = words[i];
  } else {
    auto* const shorts = reinterpret_cast<uint16_t*>(address);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      shorts[2 * i] = static_cast<uint16_t>(words[i]);
      shorts[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
    }
  }
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

}  // namespace trainops::cuda
