// Most blocks have no element that needs a second look: none that is infinite or NaN, and of first moments none
// between zero and the smallest code. They take loops with few operations, and the others the formulas of
// math/codes.h. Both give the same bits. Loops have the length of a block, which compilers make vectors of.
#include "codes.h"

#include "../math/codes.h"

namespace trainops::cpu {
namespace {

static_assert(kTileNumel % kCodeBlock == 0 && kChunkNumel % kTileNumel == 0, "tiles begin with a block");

template <bool is_signed>
TRAINOPS_HOST_DEVICE void decode_blocks(const uint8_t* __restrict codes, const uint8_t* scales,
                                        float* __restrict values, int64_t blocks) {
  constexpr uint8_t last = Code<is_signed>::last;
  uint8_t largest = 0;
  for (int64_t i = 0; i < blocks * kCodeBlock; ++i) {
    const uint8_t magnitude = codes[i] & last;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool are_finite = largest < last - 1;
  for (int64_t block = 0; block < blocks; ++block, codes += kCodeBlock, values += kCodeBlock) {
    const int32_t first = Code<is_signed>::first(scales[block]);
#if defined(__GNUC__)
    if (block % 2 == 0) __builtin_prefetch(codes + 2 * kTileNumel, 1);  // of a later tile, while this one computes
#endif
    if (are_finite) {
      TRAINOPS_KEEP_LOOP
      for (int i = 0; i < kCodeBlock; ++i) values[i] = Code<is_signed>::decode_finite(codes[i], first);
    } else {
      for (int i = 0; i < kCodeBlock; ++i) values[i] = Code<is_signed>::decode(codes[i], first);
    }
  }
}

template <bool is_signed>
TRAINOPS_HOST_DEVICE void encode_blocks(const float* __restrict values, const uint32_t* __restrict words,
                                        uint8_t* __restrict codes, uint8_t* scales, int64_t blocks) {
  for (int64_t block = 0; block < blocks; ++block, values += kCodeBlock, words += kCodeBlock, codes += kCodeBlock) {
    int32_t largest = 0;
    TRAINOPS_KEEP_LOOP
    for (int i = 0; i < kCodeBlock; ++i) {
      const auto size = static_cast<int32_t>(bit_cast<uint32_t>(values[i]) & 0x7fffffffu);
      largest = largest > size ? largest : size;
    }
    const int32_t scale = scale_of(largest), first = Code<is_signed>::first(scale);
    uint32_t is_odd = largest >= kInfinity;
    TRAINOPS_KEEP_LOOP
    for (int i = 0; i < kCodeBlock; ++i) {
      is_odd |= static_cast<uint32_t>(Code<is_signed>::is_odd(values[i], first));
      codes[i] = static_cast<uint8_t>(Code<is_signed>::encode_even(values[i], first, words[i]));
    }
    scales[block] = static_cast<uint8_t>(scale);
    if (is_odd == 0) continue;
    largest = 0;
    for (int i = 0; i < kCodeBlock; ++i) {
      const int32_t size = finite_size(values[i]);
      largest = largest > size ? largest : size;
    }
    const int32_t of_finite = scale_of(largest);
    scales[block] = static_cast<uint8_t>(of_finite);
    for (int i = 0; i < kCodeBlock; ++i) {
      const int32_t its = Code<is_signed>::first(of_finite);
      codes[i] = static_cast<uint8_t>(Code<is_signed>::encode(values[i], its, words[i]));
    }
  }
}

// One named function for each, because only those can be compiled for several instruction sets.
#define TRAINOPS_CODES(name, is_signed)                                                                \
  TRAINOPS_MULTIVERSION void decode_##name(const uint8_t* codes, const uint8_t* scales, float* values, \
                                           int64_t blocks) {                                           \
    decode_blocks<is_signed>(codes, scales, values, blocks);                                           \
  }                                                                                                    \
  TRAINOPS_MULTIVERSION void encode_##name(const float* values, const uint32_t* words, uint8_t* codes, \
                                           uint8_t* scales, int64_t blocks) {                          \
    encode_blocks<is_signed>(values, words, codes, scales, blocks);                                    \
  }
TRAINOPS_CODES(signed, true)
TRAINOPS_CODES(unsigned, false)
#undef TRAINOPS_CODES

}  // namespace

TRAINOPS_MULTIVERSION void random_words(Random random, int64_t size, uint32_t* words) {
  for (int64_t i = 0; i < size; ++i) words[i] = random.word(i);
}

void read_codes(const Cell& cell, int64_t begin, int64_t size, float* values) {
  const auto decode = cell.dtype == DType::signed_codes ? decode_signed : decode_unsigned;
  const uint8_t* const codes = static_cast<const uint8_t*>(cell.address) + begin;
  const uint8_t* const scales = cell.scales + begin / kCodeBlock;
  const int64_t blocks = size / kCodeBlock, whole = blocks * kCodeBlock;
  decode(codes, scales, values, blocks);
  if (whole == size) return;
  uint8_t last_codes[kCodeBlock] = {};
  float last[kCodeBlock];
  std::copy(codes + whole, codes + size, last_codes);
  decode(last_codes, scales + blocks, last, 1);
  std::copy(last, last + (size - whole), values + whole);
}

void write_codes(const Cell& cell, int64_t begin, int64_t size, const float* values, const uint32_t* words) {
  const auto encode = cell.dtype == DType::signed_codes ? encode_signed : encode_unsigned;
  uint8_t* const codes = static_cast<uint8_t*>(cell.address) + begin;
  uint8_t* const scales = cell.scales + begin / kCodeBlock;
  const int64_t blocks = size / kCodeBlock, whole = blocks * kCodeBlock;
  encode(values, words, codes, scales, blocks);
  if (whole == size) return;
  uint8_t last_codes[kCodeBlock];
  float last[kCodeBlock] = {};
  uint32_t last_words[kCodeBlock] = {};
  std::copy(values + whole, values + size, last);
  std::copy(words + whole, words + size, last_words);
  encode(last, last_words, last_codes, scales + blocks, 1);
  std::copy(last_codes, last_codes + (size - whole), codes + whole);
}

}  // namespace trainops::cpu
