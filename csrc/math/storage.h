// bfloat16 and float16 to and from the type that the arithmetic is done in, rounding to nearest even.
//
// bfloat16 widens by a shift. The other conversions are branch-free on the CPU, so that compilers vectorise them for
// every instruction set: integer arithmetic, and a float addition for subnormal float16. Some loops use instructions
// for float16 where there are such (cpu/halves.h), with the same bits. CUDA devices use their instructions, which
// give the same bits but for the payload of NaNs.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace trainops {

template <typename To, typename From>
TRAINOPS_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

TRAINOPS_HOST_DEVICE float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

TRAINOPS_HOST_DEVICE float widen(Float16 x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Normal numbers: move exponent and mantissa, and rebias the exponent from 15 to 127; infinity and NaN go on to
  // 255. NaNs become quiet ones, as in any arithmetic. Subnormals: put the mantissa below 0.5, whose last place is
  // 2^-24, and take the 0.5 away again.
  const uint32_t rebias = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
  const uint32_t quiet = magnitude > 0x7c00u ? 0x00400000u : 0u;
  const uint32_t normal = ((magnitude << 13) + rebias) | quiet;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude | 0x3f000000u) - 0.5f);
  return bit_cast<float>(sign | (magnitude < 0x0400u ? subnormal : normal));
#endif
}

// The result's upper 16 bits hold `x` rounded to bfloat16.
TRAINOPS_HOST_DEVICE uint32_t round_to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return x != x ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

TRAINOPS_HOST_DEVICE void narrow(float x, BFloat16& to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to.bits = static_cast<uint16_t>(round_to_bfloat16(x) >> 16);
#endif
}

TRAINOPS_HOST_DEVICE void narrow(float x, Float16& to) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 lets the floating-point unit round to a multiple of 2^-24, the last place of a subnormal.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;  // 65536 and above
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  to.bits = static_cast<uint16_t>((bits >> 16 & 0x8000u) | result);
#endif
}

// Rounds to one of the two neighbours, to each with a probability that makes the mean right: adds random bits below
// the last place and truncates. What bfloat16 has stays as it is, and so do infinities. The result is in the upper 16
// bits.
TRAINOPS_HOST_DEVICE uint32_t round_stochastically(float x, uint32_t random_bits) {
  return x != x ? 0x7fc00000u : bit_cast<uint32_t>(x) + random_bits;
}

TRAINOPS_HOST_DEVICE void narrow(float x, uint32_t random_bits, BFloat16& to) {
  to.bits = static_cast<uint16_t>(round_stochastically(x, random_bits) >> 16);
}

// A float32 weight in two places: a bfloat16 parameter, and a master that holds what the parameter lacks.
//
// A remainder is the signed difference of the bit patterns:
//
//   float32 bits = (bfloat16 bits << 16) + remainder
//
// The parameter is the weight rounded to nearest, ties away from zero. (With ties to even, half a unit up and half a
// unit down would need a 17th bit.) Both together are that weight, bit for bit, but for NaN: it is stored as
// bfloat16's with the remainder 0. Otherwise 0x7fffffff, CUDA's NaN, would be rounded up to -0.0.
//
// A parameter that others have written no longer belongs to its master. Parameters win: the weight that is read is
// never further from the parameter than rounding explains.
struct Remainder {
  int16_t bits;
};

constexpr uint32_t kHalfOfBFloat16 = 0x8000u;  // half a unit in the last place, in bits of float32

// `bits` are those of a bfloat16, in the upper half; the remainder is in the lower half of `rest`.
TRAINOPS_HOST_DEVICE float with_remainder(uint32_t bits, uint32_t rest) {
  const float weight = bit_cast<float>(bits + ((rest & 0xffffu) ^ 0x8000u) - 0x8000u);
  return weight != weight ? bit_cast<float>(bits) : weight;
}
TRAINOPS_HOST_DEVICE float widen(BFloat16 param, Remainder remainder) {
  return with_remainder(static_cast<uint32_t>(param.bits) << 16, static_cast<uint16_t>(remainder.bits));
}

// The bits of which the upper half, rounded, is stored as the parameter, and the lower half as the remainder.
TRAINOPS_HOST_DEVICE uint32_t bits_to_split(float weight) {
  return weight != weight ? 0x7fc00000u : bit_cast<uint32_t>(weight);
}
TRAINOPS_HOST_DEVICE void narrow(float weight, BFloat16& param, Remainder& remainder) {
  const uint32_t bits = bits_to_split(weight);
  param.bits = static_cast<uint16_t>((bits + kHalfOfBFloat16) >> 16);
  remainder.bits = static_cast<int16_t>(bits);
}

// A master may also be the whole weight, in float32. bfloat16 parameters are rounded as above.
TRAINOPS_HOST_DEVICE float widen(BFloat16 param, float master) {
  const uint32_t bits = static_cast<uint32_t>(param.bits) << 16;
  const bool belongs = bit_cast<uint32_t>(master) - bits + kHalfOfBFloat16 <= 2 * kHalfOfBFloat16;
  return belongs ? master : bit_cast<float>(bits);
}
TRAINOPS_HOST_DEVICE void narrow(float weight, BFloat16& param, float& master) {
  Remainder remainder;
  narrow(weight, param, remainder);
  master = weight;
}
TRAINOPS_HOST_DEVICE float widen(Float16 param, float master) {
  Float16 rounded;
  narrow(master, rounded);
  return rounded.bits == param.bits ? master : widen(param);
}
TRAINOPS_HOST_DEVICE void narrow(float weight, Float16& param, float& master) {
  narrow(weight, param);
  master = weight;
}

// Conversions among float32 and float64. float64 reaches 16 bits through float32, as in PyTorch.
TRAINOPS_HOST_DEVICE float widen(float x) { return x; }
TRAINOPS_HOST_DEVICE double widen(double x) { return x; }
TRAINOPS_HOST_DEVICE void narrow(float x, float& to) { to = x; }
TRAINOPS_HOST_DEVICE void narrow(double x, double& to) { to = x; }
TRAINOPS_HOST_DEVICE void narrow(double x, float& to) { to = static_cast<float>(x); }
TRAINOPS_HOST_DEVICE void narrow(float x, double& to) { to = x; }
TRAINOPS_HOST_DEVICE void narrow(double x, BFloat16& to) { narrow(static_cast<float>(x), to); }
TRAINOPS_HOST_DEVICE void narrow(double x, Float16& to) { narrow(static_cast<float>(x), to); }

}  // namespace trainops
