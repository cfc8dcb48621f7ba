// What forms.py computes with floats: minima, conversions, and 16-bit numbers.
#pragma once

#include "arithmetic.h"

namespace ptx {

template <typename T>
T quiet_nan() {
  return bit_cast<T>(static_cast<Bits<sizeof(T)>>(~u64(0) >> (65 - width<T>)));
}
template <typename Integer>
Integer negative(Integer bits) {
  return bits ^ static_cast<Integer>(Integer(1) << (width<Integer> - 1));
}
template <typename Integer>
Integer magnitude(Integer bits) {
  return bits & low_bits<Integer>(width<Integer> - 1);
}
template <typename T>
T without_subnormals(T a) {
  return std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(T(0), a) : a;
}
// A NaN loses, and -0 is smaller than +0.
template <typename T>
T smaller(T a, T b) {
  if (is_nan(a)) return b;
  if (is_nan(b)) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <typename T>
T larger(T a, T b) {
  if (is_nan(a)) return b;
  if (is_nan(b)) return a;
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}
// From a float that is whole, saturating. Where either type has 64 bits, NaN becomes the highest bit alone, else 0:
// the PTX manual, cvt, since version 9.0, which no longer says 0 of all types.
template <typename Integer, typename T>
Integer to_integer(T a) {
  const bool is_signed = std::is_signed_v<Integer>;
  const T beyond = std::ldexp(T(1), width<Integer> - is_signed);
  const auto top = static_cast<Integer>(low_bits<u64>(width<Integer> - is_signed));
  if (is_nan(a))
    return sizeof(T) == 8 || sizeof(Integer) == 8 ? static_cast<Integer>(u64(1) << (width<Integer> - 1)) : Integer(0);
  if (a >= beyond) return top;
  if (a < (is_signed ? -beyond : T(0))) return is_signed ? static_cast<Integer>(-top - 1) : Integer(0);
  return static_cast<Integer>(a);
}
// 20 bits of a reciprocal: the start of the root and division that compilers write out. Subnormals are zeros.
inline f64 coarse_reciprocal(f64 a) {
  const u64 high = ~u64(0) << 32;
  const f64 x = bit_cast<f64>(bit_cast<u64>(a) & high);
  if (std::fpclassify(x) == FP_SUBNORMAL) return std::copysign(f64(INFINITY), x);
  const f64 reciprocal = bit_cast<f64>(bit_cast<u64>(1.0 / x) & high);
  return std::fpclassify(reciprocal) == FP_SUBNORMAL ? std::copysign(0.0, x) : reciprocal;
}
inline f32 widen(f16 a) { return static_cast<f32>(bit_cast<_Float16>(a)); }
inline f32 widen(bf16 a) { return bit_cast<f32>(u32{a.bits} << 16); }

template <typename T>
T narrow(f32 a) {
  if (is_nan(a)) return {0x7fff};
  if constexpr (std::is_same_v<T, f16>) {
    return {bit_cast<u16>(static_cast<_Float16>(a))};
  } else {
    const u32 bits = bit_cast<u32>(a);
    return {static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
  }
}
template <typename T>
using Half = std::conditional_t<std::is_same_v<T, f16x2>, f16, bf16>;

// Rounded to odd where it is inexact: a second rounding, to fewer bits, is then that of the exact number.
inline f64 to_odd(f64 sum, f64 lost) {
  const u64 bits = bit_cast<u64>(sum);
  if (lost == 0 || !std::isfinite(sum) || (bits & 1) != 0) return sum;
  return bit_cast<f64>((lost > 0) == (sum > 0) ? bits + 1 : bits - 1);
}
inline f32 to_odd(f64 a) {
  const f32 rounded = static_cast<f32>(a);
  if (!std::isfinite(a) || rounded == a) return rounded;
  return bit_cast<f32>((bit_cast<u32>(rounded) - (std::fabs(f64{rounded}) > std::fabs(a))) | 1);
}
template <typename T>
T one() {
  return {static_cast<u16>(std::is_same_v<T, f16> ? 0x3c00 : 0x3f80)};
}
template <typename T>
T fused(T a, T b, T c) {
  const f64 product = f64{widen(a)} * widen(b), term = widen(c), sum = product + term;
  const f64 back = sum - product, lost = (product - (sum - back)) + (term - back);
  return narrow<T>(to_odd(to_odd(sum, lost)));
}
template <typename T>
u32 pair(T half) {
  return u32{half.bits} << 16 | half.bits;
}
template <typename T>
f32 low(u32 pair) {
  return widen(get<Half<T>>(pair));
}
template <typename T>
f32 high(u32 pair) {
  return widen(get<Half<T>>(pair >> 16));
}
template <typename T>
u32 fused_pairs(u32 a, u32 b, u32 c) {
  const auto half = [&](int shift) {
    return fused(get<Half<T>>(a >> shift), get<Half<T>>(b >> shift), get<Half<T>>(c >> shift)).bits;
  };
  return u32{half(16)} << 16 | half(0);
}
template <typename T>
u32 pair_of(f32 high, f32 low) {
  return u32{narrow<Half<T>>(high).bits} << 16 | narrow<Half<T>>(low).bits;
}

}  // namespace ptx
