// float16 by the instructions that processors have for it: F16C converts 8 numbers at a time, AVX-512 converts 16.
//
// GCC does not vectorise these conversions, so they are written in assembly. They give the same bits as widen and
// narrow (math/storage.h). Loops take whole blocks with these instructions, and their last elements, or all elements
// on other processors, with widen and narrow (elements.h).
#pragma once

#include <type_traits>

#include "../math/storage.h"
#include "parallel.h"

// TRAINOPS_VERSIONS(define, ...) expands define(Isa, target, ...) once per instruction set. `define` defines one
// function, behind the attribute `target`. The loader picks the best version that the machine has, as for
// TRAINOPS_MULTIVERSION. The difference: here a version knows its instruction set, and passes it to its loops as Isa.
#ifdef TRAINOPS_AVX512
#if __GNUC__ >= 12
#define TRAINOPS_TARGET_AVX512 __attribute__((target("arch=x86-64-v4")))
#else
#define TRAINOPS_TARGET_AVX512 __attribute__((target("avx512f")))
#endif
#define TRAINOPS_VERSIONS(define, ...)                                \
  define(AVX512, TRAINOPS_TARGET_AVX512, __VA_ARGS__)                 \
      define(AVX2, __attribute__((target("avx2,f16c"))), __VA_ARGS__) \
          define(Baseline, __attribute__((target("default"))), __VA_ARGS__)
#else
#define TRAINOPS_VERSIONS(define, ...) define(Baseline, , __VA_ARGS__)
#endif

namespace trainops::cpu {

// Instruction sets. `width`: bytes of a register. `halves`: how many float16 numbers one instruction converts; 0 if
// there is none.
struct Baseline {
  static constexpr int width = 16, halves = 0;
};
struct AVX2 {
  static constexpr int width = 32, halves = 8;
};
struct AVX512 {
  static constexpr int width = 64, halves = 16;
};

// As many numbers as one instruction converts, 8 or 16.
template <int size>
void widen_block(const Float16* column, float* values);
template <int size>
void narrow_block(const float* values, Float16* column);

#ifdef TRAINOPS_AVX512
template <int size>
using Floats __attribute__((vector_size(4 * size))) = float;
template <int size>
using Words __attribute__((vector_size(4 * size))) = uint32_t;
template <int size>
using HalfBits __attribute__((vector_size(2 * size))) = uint16_t;

template <int size>
TRAINOPS_HOST_DEVICE void widen_block(const Float16* column, float* values) {
  HalfBits<size> halves;
  std::memcpy(&halves, column, sizeof(halves));
  Floats<size> floats;
  asm("vcvtph2ps %1, %0" : "=v"(floats) : "vm"(halves));
  std::memcpy(values, &floats, sizeof(floats));
}

template <int size>
TRAINOPS_HOST_DEVICE void narrow_block(const float* values, Float16* column) {
  Floats<size> floats;
  std::memcpy(&floats, values, sizeof(floats));
  // The instruction would keep a part of a NaN's payload. narrow keeps the sign alone.
  const auto bits = reinterpret_cast<Words<size>>(floats);
  floats = reinterpret_cast<Floats<size>>(floats != floats ? (bits & 0x80000000u) | 0x7fc00000u : bits);
  HalfBits<size> halves;
  asm("vcvtps2ph $0, %1, %0" : "=v"(halves) : "v"(floats));  // 0: round to nearest even
  std::memcpy(column, &halves, sizeof(halves));
}
#endif

}  // namespace trainops::cpu
