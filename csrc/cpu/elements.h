// Loops over the elements of several columns: they read, widen, compute, narrow and write in one pass.
//
// A column is an array of numbers, weights that lie in two arrays, or bfloat16 that is rounded stochastically
// (math/storage.h).
#pragma once

#include <type_traits>
#include <utility>

#include "../math/random.h"
#include "../math/storage.h"
#include "halves.h"

// Inlines a lambda, so that it is compiled for the caller's instruction set.
#if defined(__GNUC__)
#define TRAINOPS_INLINE __attribute__((always_inline))
#else
#define TRAINOPS_INLINE
#endif

// Tells compilers that the columns of the following loop do not overlap.
#if defined(__clang__)
#define TRAINOPS_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define TRAINOPS_INDEPENDENT _Pragma("GCC ivdep")
#else
#define TRAINOPS_INDEPENDENT
#endif

// GCC unrolls a short loop before it would vectorise it, and then cannot where the formula has a condition.
#if defined(__GNUC__) && !defined(__clang__)
#define TRAINOPS_KEEP_LOOP _Pragma("GCC unroll 1")
#else
#define TRAINOPS_KEEP_LOOP
#endif

namespace trainops::cpu {

// Weights of float32 in two arrays: what lies there is const if it is only read.
template <typename Param, typename Rest>
struct Split {
  Param* param;
  Rest* remainder;
};
using SplitWeights = Split<BFloat16, Remainder>;
using ConstSplitWeights = Split<const BFloat16, const Remainder>;

struct StochasticColumn {
  BFloat16* values;
  Random random;
};

template <typename S>
TRAINOPS_HOST_DEVICE auto get(S* column, int64_t i) {
  return widen(column[i]);
}
template <typename Param, typename Rest>
TRAINOPS_HOST_DEVICE float get(Split<Param, Rest> column, int64_t i) {
  return widen(column.param[i], column.remainder[i]);
}

// Writes back the value of a formula, to columns that are not const.
template <typename T, typename S>
TRAINOPS_HOST_DEVICE void put(T value, S* column, int64_t i) {
  if constexpr (!std::is_const_v<S>) narrow(value, column[i]);
}
template <typename Param, typename Rest>
TRAINOPS_HOST_DEVICE void put(float value, Split<Param, Rest> column, int64_t i) {
  if constexpr (!std::is_const_v<Param>) narrow(value, column.param[i], column.remainder[i]);
}

TRAINOPS_HOST_DEVICE float get(StochasticColumn column, int64_t i) { return widen(column.values[i]); }
TRAINOPS_HOST_DEVICE void put(float value, StochasticColumn column, int64_t i) {
  narrow(value, column.random.bits(i), column.values[i]);
}

// A column without its first elements.
template <typename S>
TRAINOPS_HOST_DEVICE S* from(S* column, int64_t begin) {
  return column + begin;
}
template <typename Param, typename Rest>
TRAINOPS_HOST_DEVICE Split<Param, Rest> from(Split<Param, Rest> column, int64_t begin) {
  return {column.param + begin, column.remainder + begin};
}
TRAINOPS_HOST_DEVICE StochasticColumn from(StochasticColumn column, int64_t begin) {
  return {column.values + begin, column.random.from(begin)};
}

// Two 16-bit numbers side by side, as the halves of one word: widened and narrowed by shifts and masks within 32
// bits. Element by element, compilers spread 16-bit lanes over 32-bit ones and gather them again, which takes longer.
struct Pair {
  float low, high;
};

TRAINOPS_HOST_DEVICE uint32_t word_at(const void* column, int64_t pair) {
  uint32_t word;
  std::memcpy(&word, static_cast<const uint16_t*>(column) + 2 * pair, sizeof(word));
  return word;
}
TRAINOPS_HOST_DEVICE void put_word(uint32_t word, void* column, int64_t pair) {
  std::memcpy(static_cast<uint16_t*>(column) + 2 * pair, &word, sizeof(word));
}

TRAINOPS_HOST_DEVICE Pair get_pair(const BFloat16* column, int64_t pair) {
  const uint32_t word = word_at(column, pair);
  return {bit_cast<float>(word << 16), bit_cast<float>(word & 0xffff0000u)};
}
template <typename Param, typename Rest>
TRAINOPS_HOST_DEVICE Pair get_pair(Split<Param, Rest> column, int64_t pair) {
  const uint32_t word = word_at(column.param, pair), rest = word_at(column.remainder, pair);
  return {with_remainder(word << 16, rest), with_remainder(word & 0xffff0000u, rest >> 16)};
}

TRAINOPS_HOST_DEVICE void put_pair(Pair values, BFloat16* column, int64_t pair) {
  put_word((round_to_bfloat16(values.low) >> 16) | (round_to_bfloat16(values.high) & 0xffff0000u), column, pair);
}
TRAINOPS_HOST_DEVICE void put_pair(Pair, const BFloat16*, int64_t) {}
TRAINOPS_HOST_DEVICE void put_pair(Pair values, SplitWeights column, int64_t pair) {
  const uint32_t low = bits_to_split(values.low), high = bits_to_split(values.high);
  put_word(((low + kHalfOfBFloat16) >> 16) | ((high + kHalfOfBFloat16) & 0xffff0000u), column.param, pair);
  put_word((low & 0xffffu) | (high << 16), column.remainder, pair);
}

TRAINOPS_HOST_DEVICE Pair get_pair(StochasticColumn column, int64_t pair) { return get_pair(column.values, pair); }
TRAINOPS_HOST_DEVICE void put_pair(Pair values, StochasticColumn column, int64_t pair) {
  const uint32_t low = round_stochastically(values.low, column.random.bits(2 * pair));
  const uint32_t high = round_stochastically(values.high, column.random.bits(2 * pair + 1));
  put_word((low >> 16) | (high & 0xffff0000u), column.values, pair);
}

template <typename Column>
constexpr bool has_pairs = false;
template <>
inline constexpr bool has_pairs<BFloat16*> = true;
template <>
inline constexpr bool has_pairs<const BFloat16*> = true;
template <>
inline constexpr bool has_pairs<SplitWeights> = true;
template <>
inline constexpr bool has_pairs<StochasticColumn> = true;

template <typename Column>
constexpr bool is_half = std::is_same_v<std::remove_const_t<std::remove_pointer_t<Column>>, Float16>;

// Whether instructions of Isa convert some of the columns.
template <typename Isa, typename... Column>
constexpr bool has_halves = Isa::halves > 0 && (is_half<Column> || ...);

// As many elements of a column, of any type, as one instruction converts.
template <int size, typename Column>
TRAINOPS_HOST_DEVICE void get_block(Column column, float* values) {
  if constexpr (is_half<Column>) return widen_block<size>(column, values);
  for (int i = 0; i < size; ++i) values[i] = get(column, i);
}
template <int size, typename Column>
TRAINOPS_HOST_DEVICE void put_block(const float* values, Column column) {
  if constexpr (std::is_same_v<Column, Float16*>) return narrow_block<size>(values, column);
  for (int i = 0; i < size; ++i) put(values[i], column, i);
}

// Applies a formula to a block of every column.
template <int size, typename Formula, size_t... k, typename... Column>
TRAINOPS_HOST_DEVICE void for_block(Formula formula, std::index_sequence<k...>, Column... columns) {
  float values[sizeof...(columns)][size];
  (get_block<size>(columns, values[k]), ...);
  TRAINOPS_INDEPENDENT
  TRAINOPS_KEEP_LOOP
  for (int i = 0; i < size; ++i) formula(values[k][i]...);
  (put_block<size>(values[k], columns), ...);
}

// Processors read ahead within one array, and lose the thread where a loop has many. They are told what comes next.
constexpr int64_t kPrefetchBlock = 64, kPrefetchAhead = 512;  // elements

template <typename S>
TRAINOPS_HOST_DEVICE void prefetch(S* column, int64_t i) {
#if defined(__GNUC__)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(column) + (i + kPrefetchAhead) * sizeof(S);
  for (uintptr_t byte = 0; byte < kPrefetchBlock * sizeof(S); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(begin + byte), !std::is_const_v<S>);
  }
#endif
}
template <typename Param, typename Rest>
TRAINOPS_HOST_DEVICE void prefetch(Split<Param, Rest> column, int64_t i) {
  prefetch(column.param, i);
  prefetch(column.remainder, i);
}
TRAINOPS_HOST_DEVICE void prefetch(StochasticColumn column, int64_t i) { prefetch(column.values, i); }

// The elements [begin, end) of the columns. Isa: the instruction set that the caller is compiled for.
template <typename Isa, typename Formula, typename... Column>
TRAINOPS_HOST_DEVICE void for_elements(int64_t begin, int64_t end, Formula formula, Column... columns) {
  const auto apply = [&](int64_t i) TRAINOPS_INLINE {
    [&](auto... values) TRAINOPS_INLINE {
      formula(values...);
      (put(values, columns, i), ...);
    }(get(columns, i)...);
  };
  if constexpr (has_halves<Isa, Column...>) {
    constexpr int size = Isa::halves;
    const int64_t blocks = (end - begin) / size;
    for (int64_t block = 0; block < blocks; ++block) {
      for_block<size>(formula, std::index_sequence_for<Column...>{}, columns + (begin + block * size)...);
    }
    for (int64_t i = begin + blocks * size; i < end; ++i) apply(i);
  } else if constexpr ((has_pairs<Column> && ...)) {
    const int64_t pairs = (end - begin) / 2;
    [&](auto... rest) TRAINOPS_INLINE {
      TRAINOPS_INDEPENDENT
      for (int64_t pair = 0; pair < pairs; ++pair) {
        [&](auto... values) TRAINOPS_INLINE {
          formula(values.low...);
          formula(values.high...);
          (put_pair(values, rest, pair), ...);
        }(get_pair(rest, pair)...);
      }
    }(from(columns, begin)...);
    if ((end - begin) % 2 == 1) apply(end - 1);
  } else {
    TRAINOPS_INDEPENDENT
    for (int64_t i = begin; i < end; ++i) apply(i);
  }
}

// Calls formula(value...) for every element, with one value, widened, from each of the columns.
template <typename Isa = Baseline, typename Formula, typename... Column>
TRAINOPS_HOST_DEVICE void for_each_element(int64_t size, Formula formula, Column... columns) {
  int64_t i = 0;
  for (; i + kPrefetchBlock <= size; i += kPrefetchBlock) {
    (prefetch(columns, i), ...);
    for_elements<Isa>(i, i + kPrefetchBlock, formula, columns...);
  }
  for_elements<Isa>(i, size, formula, columns...);
}

}  // namespace trainops::cpu
