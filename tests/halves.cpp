// Faults of csrc/cpu/halves.h: how many numbers a block of each size converts to other bits than widen and narrow do.
#include "../csrc/cpu/halves.h"

namespace trainops::cpu {
namespace {

template <int size>
TRAINOPS_HOST_DEVICE int64_t widen_faults() {
  int64_t faults = 0;
  for (uint32_t first = 0; first < 0x10000u; first += size) {
    Float16 halves[size];
    float values[size];
    for (int i = 0; i < size; ++i) halves[i].bits = static_cast<uint16_t>(first + i);
    widen_block<size>(halves, values);
    for (int i = 0; i < size; ++i) faults += bit_cast<uint32_t>(values[i]) != bit_cast<uint32_t>(widen(halves[i]));
  }
  return faults;
}

// Of the numbers whose bits are `first`, `first + stride` and so on.
template <int size>
TRAINOPS_HOST_DEVICE int64_t narrow_faults(uint64_t first, uint64_t stride) {
  int64_t faults = 0;
  for (uint64_t bits = first; bits < 0x100000000u; bits += size * stride) {
    float values[size];
    Float16 blocks[size];
    for (int i = 0; i < size; ++i) values[i] = bit_cast<float>(static_cast<uint32_t>(bits + i * stride));
    narrow_block<size>(values, blocks);
    for (int i = 0; i < size; ++i) {
      Float16 half;
      narrow(values[i], half);
      faults += half.bits != blocks[i].bits;
    }
  }
  return faults;
}

}  // namespace
}  // namespace trainops::cpu

using namespace trainops::cpu;
#define FUNCTIONS(Isa, target)                                                           \
  extern "C" target int64_t widen_faults_##Isa() { return widen_faults<Isa::halves>(); } \
  extern "C" target int64_t narrow_faults_##Isa(uint64_t first, uint64_t stride) {       \
    return narrow_faults<Isa::halves>(first, stride);                                    \
  }
FUNCTIONS(AVX2, __attribute__((target("avx2,f16c"))))
FUNCTIONS(AVX512, TRAINOPS_TARGET_AVX512)
