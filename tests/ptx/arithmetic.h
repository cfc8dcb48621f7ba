// What forms.py computes with: PTX's types, and those of its functions that C++ does not have or defines differently.
// Compile with -fwrapv (integers wrap) and -ffp-contract=off.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using pred = bool;
using f32 = float;
using f64 = double;
struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};
struct f16x2 {};
struct bf16x2 {};

template <typename To, typename From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

[[noreturn]] __attribute__((visibility("default"))) void fault_of_division();

template <int bytes>
using Bits =
    std::conditional_t<bytes == 1, u8, std::conditional_t<bytes == 2, u16, std::conditional_t<bytes == 4, u32, u64>>>;

// Registers hold bits. An operand of type T takes as many of the lowest ones as T has.
template <typename T, typename Register>
T get(Register bits) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(bits);
  } else {
    return bit_cast<T>(static_cast<Bits<sizeof(T)>>(bits));
  }
}

// A narrower value is extended by its sign or by zeros. NaN in float32 has one pattern, whatever the operands carry.
template <typename T, typename Register>
void set(Register& bits, T value) {
  if constexpr (std::is_integral_v<T>) {
    bits = static_cast<Register>(value);
  } else if constexpr (std::is_same_v<T, f32>) {
    bits = value != value ? 0x7fffffffu : bit_cast<u32>(value);
  } else {
    bits = bit_cast<Bits<sizeof(T)>>(value);
  }
}

// Integers

template <typename T>
constexpr u32 width = 8 * sizeof(T);

template <typename T>
T product(T a, T b) {
  return static_cast<T>(static_cast<u64>(a) * static_cast<u64>(b));
}
template <typename T>
T product_high(T a, T b) {
  return static_cast<T>((static_cast<__int128>(a) * static_cast<__int128>(b)) >> width<T>);
}
template <typename T>
T quotient(T a, T b) {
  if (b == 0) fault_of_division();
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return static_cast<T>(-a);
  }
  return static_cast<T>(a / b);
}
template <typename T>
T remainder(T a, T b) {
  return static_cast<T>(a - product(quotient(a, b), b));
}
// Shifts past the width are shifts by the width.
template <typename T>
T shift_left(T a, u32 n) {
  return n >= width<T> ? T(0) : static_cast<T>(static_cast<u64>(a) << n);
}
template <typename T>
T shift_right(T a, u32 n) {
  return n >= width<T> ? static_cast<T>(a < 0 ? -1 : 0) : static_cast<T>(a >> n);
}
inline u32 funnel_left(u32 low, u32 high, u32 n) {
  return n == 32 ? low : static_cast<u32>(((u64{high} << 32 | low) << n) >> 32);
}
inline u32 funnel_right(u32 low, u32 high, u32 n) { return static_cast<u32>((u64{high} << 32 | low) >> n); }
template <typename T>
u32 leading_zeros(T a) {
  return a == 0 ? width<T> : __builtin_clzll(a) - (64 - width<T>);
}
template <typename T>
u32 highest_bit(T a) {
  return a == 0 ? ~u32(0) : width<T> - 1 - leading_zeros(a);
}
template <typename T>
T low_bits(u32 count) {
  return count >= width<T> ? ~T(0) : static_cast<T>((T(1) << count) - 1);
}
// Positions and lengths are 8 bits long.
template <typename T>
T insert_bits(T a, T b, u32 position, u32 length) {
  const T mask = shift_left(low_bits<T>(length & 255), position & 255);
  return (b & ~mask) | (shift_left(a, position & 255) & mask);
}
template <typename T>
T extract_bits(T a, u32 position, u32 length) {
  using Unsigned = std::make_unsigned_t<T>;
  position &= 255, length &= 255;
  const u32 last = position + length > width<T> ? width<T> - 1 : position + length - 1;
  const bool negative = std::is_signed_v<T> && length > 0 && (static_cast<Unsigned>(a) >> last & 1) != 0;
  const Unsigned mask = low_bits<Unsigned>(length);
  const auto kept = shift_right(static_cast<Unsigned>(a), position) & mask;
  const Unsigned taken = position >= width<T> ? Unsigned(0) : low_bits<Unsigned>(last + 1 - position);
  return static_cast<T>(negative ? kept | ~(mask & taken) : kept);
}
template <typename T>
T reverse_bits(T a) {
  T reversed = 0;
  for (u32 i = 0; i < width<T>; ++i) reversed |= (a >> i & 1) << (width<T> - 1 - i);
  return reversed;
}
// Each hexadecimal digit of `order` chooses a byte of b:a; its highest bit, that byte's sign instead.
inline u32 permute_bytes(u32 a, u32 b, u32 order) {
  u32 result = 0;
  for (u32 i = 0; i < 4; ++i) {
    const u32 digit = order >> (4 * i) & 15;
    u32 byte = (u64{b} << 32 | a) >> (8 * (digit & 7)) & 255;
    if ((digit & 8) != 0) byte = (byte & 128) != 0 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
// A table of three bits' logic: entry 4a + 2b + c.
inline u32 logic(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (u32 i = 0; i < 32; ++i) {
    const u32 entry = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1);
    result |= (table >> entry & 1) << i;
  }
  return result;
}

// Comparisons. Those of unsigned numbers have names of their own; those that end in u are true for NaN.

template <typename T>
bool is_nan(T a) {
  return a != a;
}
// clang-format off
template <typename T> bool eq(T a, T b) { return a == b; }
template <typename T> bool ne(T a, T b) { return a < b || a > b; }
template <typename T> bool lt(T a, T b) { return a < b; }
template <typename T> bool le(T a, T b) { return a <= b; }
template <typename T> bool gt(T a, T b) { return a > b; }
template <typename T> bool ge(T a, T b) { return a >= b; }
template <typename T> bool lo(T a, T b) { return a < b; }
template <typename T> bool ls(T a, T b) { return a <= b; }
template <typename T> bool hi(T a, T b) { return a > b; }
template <typename T> bool hs(T a, T b) { return a >= b; }
template <typename T> bool equ(T a, T b) { return !ne(a, b); }
template <typename T> bool neu(T a, T b) { return !eq(a, b); }
template <typename T> bool ltu(T a, T b) { return !ge(a, b); }
template <typename T> bool leu(T a, T b) { return !gt(a, b); }
template <typename T> bool gtu(T a, T b) { return !le(a, b); }
template <typename T> bool geu(T a, T b) { return !lt(a, b); }
template <typename T> bool nan(T a, T b) { return is_nan(a) || is_nan(b); }
template <typename T> bool num(T a, T b) { return !is_nan(a) && !is_nan(b); }
// clang-format on

}  // namespace ptx
