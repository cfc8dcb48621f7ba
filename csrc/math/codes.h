// Moments in 8 bits: a code for each element, and a scale for each block of 32 elements that follow each other in
// memory. A tensor of codes holds those of all elements, then the scales.
//
// A code is a small floating-point number: 3 bits of mantissa below 4 bits of exponent and a sign (of first moments),
// or below 5 bits of exponent (of second moments, which are not negative). Its value is that of the float32 with
// these bits:
//
//   (code << 20) + ((scale - octaves) << 23)      octaves: 15; without a sign 31
//
// Code 0 is zero, the last code is NaN, the last but one infinity. The scale is such that the block's largest finite
// element rounds to no more than 1.625 * 2^(scale - 127), and so large that no arithmetic meets subnormal numbers.
//
// Codes are rounded to one of the two neighbours, to each with a probability that makes the mean right: nearest codes
// would stand still where a step moves a moment by less than half a code. Between zero and the smallest code a first
// moment is rounded so, too. A second moment becomes the smallest code: as zero, it would make an update infinite.
//
// Agrees with: trainops/reference_codes.py, which says how large the error is.
#pragma once

#include <cstdint>

#include "random.h"
#include "storage.h"

namespace trainops {

constexpr int kCodeBlock = 32, kCodeMantissa = 20;  // elements; bits of float32's mantissa that codes lack
constexpr int32_t kInfinity = 0x7f800000, kSmallestScale = 40;
// Added to a largest element of more than 1.625 times a power of two, it makes the next power of it.
constexpr int32_t kRoundScale = 0x2fffff;
constexpr uint32_t kOfCodes = 0x636f6465u;  // "code": other random bits than those of the parameter

constexpr int64_t count_code_blocks(int64_t numel) { return (numel + kCodeBlock - 1) / kCodeBlock; }

// A kind of code. All numbers are not negative, and compare as signed ones, which more processors can do.
template <bool is_signed>
struct Code {
  static constexpr int32_t octaves = is_signed ? 15 : 31, last = is_signed ? 127 : 255;

  // The bits of code 0, were it no zero.
  TRAINOPS_HOST_DEVICE static int32_t first(int32_t scale) {
    return static_cast<int32_t>(static_cast<uint32_t>(scale - octaves) << 23);
  }

  // Of any code but the last two.
  TRAINOPS_HOST_DEVICE static float decode_finite(uint32_t code, int32_t first) {
    const uint32_t magnitude = code & static_cast<uint32_t>(last);
    uint32_t bits = (magnitude << kCodeMantissa) + static_cast<uint32_t>(first);
    bits = magnitude == 0 ? 0u : bits;
    return bit_cast<float>(is_signed ? bits | (code & 0x80u) << 24 : bits);
  }

  TRAINOPS_HOST_DEVICE static float decode(uint32_t code, int32_t first) {
    const uint32_t magnitude = code & static_cast<uint32_t>(last);
    if (magnitude < last - 1u) return decode_finite(code, first);
    const uint32_t bits = 0x7f800000u + ((magnitude & 1u) << 22);
    return bit_cast<float>(is_signed ? bits | (code & 0x80u) << 24 : bits);
  }

  // Of the element i of a tensor: 16 of the 20 bits that codes lack of a mantissa. Two elements share a word, and so
  // do both kinds. The bit below makes the mean right.
  TRAINOPS_HOST_DEVICE static int32_t random(uint32_t word, int64_t i) {
    const uint32_t half = (i & 1) == (is_signed ? 0 : 1) ? word & 0xffffu : word >> 16;
    return static_cast<int32_t>(half << 4 | 8u);
  }

  // Whether encode_even does not serve an element that is finite.
  TRAINOPS_HOST_DEVICE static bool is_odd(float x, int32_t first) {
    const uint32_t size = bit_cast<uint32_t>(x) & 0x7fffffffu;  // 0 is none below the smallest code
    return is_signed && size - 1u < static_cast<uint32_t>(first) + (1u << kCodeMantissa) - 1u;
  }

  TRAINOPS_HOST_DEVICE static uint32_t encode_even(float x, int32_t first, int32_t random) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const auto size = static_cast<int32_t>(bits & 0x7fffffffu);
    const int32_t above = size + random - first;
    const uint32_t code = static_cast<uint32_t>(above > 0 ? above : 0) >> kCodeMantissa;
    if constexpr (is_signed) return code | (bits >> 24 & 0x80u);
    const uint32_t least = size < 1 ? 0u : 1u;
    return code > least ? code : least;
  }

  TRAINOPS_HOST_DEVICE static uint32_t encode(float x, int32_t first, int32_t random) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const auto size = static_cast<int32_t>(bits & 0x7fffffffu);
    if (size > kInfinity) return static_cast<uint32_t>(last);
    const uint32_t sign = is_signed ? bits >> 24 & 0x80u : 0u;
    if (size == kInfinity) return sign | (last - 1u);
    if (!is_odd(x, first)) return encode_even(x, first, random);
    const float unit = bit_cast<float>(first + (1 << kCodeMantissa) - (kCodeMantissa << 23));
    return sign | (size > bit_cast<int32_t>(static_cast<float>(random) * unit) ? 1u : 0u);
  }
};

// Of an element that is finite: its bits without the sign. Else 0.
TRAINOPS_HOST_DEVICE int32_t finite_size(float x) {
  const auto size = static_cast<int32_t>(bit_cast<uint32_t>(x) & 0x7fffffffu);
  return size < kInfinity ? size : 0;
}

// The scale of a block, from the largest of these.
TRAINOPS_HOST_DEVICE int32_t scale_of(int32_t largest) {
  const int32_t scale = (largest + kRoundScale) >> 23;
  return scale > kSmallestScale ? scale : kSmallestScale;
}

// What the random bits of a parameter's codes depend on. The word of an element is that of the even one of its pair.
TRAINOPS_HOST_DEVICE Random random_of_codes(const Random& param) { return {mix(param.key ^ kOfCodes), param.origin}; }
TRAINOPS_HOST_DEVICE uint32_t word_of_codes(const Random& random, int64_t i) { return random.word(i & ~int64_t{1}); }

}  // namespace trainops
