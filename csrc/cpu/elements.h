// Loops over the elements of several columns: they read, widen, compute, narrow and write in one pass.
#pragma once

#include <type_traits>

#include "../math/storage.h"

// Inlines a lambda, so that it is compiled for the caller's instruction set.
#if defined(__GNUC__)
#define TRAINOPS_INLINE __attribute__((always_inline))
#else
#define TRAINOPS_INLINE
#endif

namespace trainops::cpu {

// Two bfloat16 side by side, as the halves of one word: widened and narrowed by shifts and masks within 32 bits.
// Element by element, compilers spread 16-bit lanes over 32-bit ones and gather them again, which takes longer.
struct BFloat16Pair {
  float low, high;
};

TRAINOPS_HOST_DEVICE BFloat16Pair widen_pair(const BFloat16* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof(word));
  return {bit_cast<float>(word << 16), bit_cast<float>(word & 0xffff0000u)};
}

// Writes back the values of a formula, to columns that are not const.
TRAINOPS_HOST_DEVICE void put_pair(BFloat16Pair pair, BFloat16* to) {
  const uint32_t word = (round_to_bfloat16(pair.low) >> 16) | (round_to_bfloat16(pair.high) & 0xffff0000u);
  std::memcpy(to, &word, sizeof(word));
}
TRAINOPS_HOST_DEVICE void put_pair(BFloat16Pair, const BFloat16*) {}

template <typename T, typename S>
TRAINOPS_HOST_DEVICE void put(T value, S* to) {
  if constexpr (!std::is_const_v<S>) narrow(value, *to);
}

// Calls formula(value...) for every element, with one value, widened, from each of the columns.
template <typename Formula, typename... S>
TRAINOPS_HOST_DEVICE void for_each_element(int64_t size, Formula formula, S* __restrict... columns) {
  const auto apply = [&](int64_t i) TRAINOPS_INLINE {
    [&](auto... values) TRAINOPS_INLINE {
      formula(values...);
      (put(values, columns + i), ...);
    }(widen(columns[i])...);
  };
  if constexpr ((std::is_same_v<std::remove_const_t<S>, BFloat16> && ...)) {
    for (int64_t i = 0; i < size / 2; ++i) {
      [&](auto... pairs) TRAINOPS_INLINE {
        formula(pairs.low...);
        formula(pairs.high...);
        (put_pair(pairs, columns + 2 * i), ...);
      }(widen_pair(columns + 2 * i)...);
    }
    if (size % 2 == 1) apply(size - 1);
  } else {
    for (int64_t i = 0; i < size; ++i) apply(i);
  }
}

}  // namespace trainops::cpu
