// Codes are decoded and encoded in 16-bit lanes: the value of a code has no more bits, and two elements, an even and
// an odd one, lie side by side in a word. The fast loops serve elements that are finite and not below the smallest
// code. Few blocks have others, and take the formulas of math/codes.h. Both give the same bits.
#include "codes.h"

#include <algorithm>

namespace trainops::cpu {
namespace {

constexpr int kPairs = kCodeBlock / 2;

// What of an element's bits is its size. A sign where there should be none makes it large, and is looked at with
// care.
template <bool is_signed>
constexpr uint32_t kMask = is_signed ? 0x7fffffffu : 0xffffffffu;

template <typename T, int bytes>
using Lanes __attribute__((vector_size(bytes))) = T;

template <bool is_signed>
TRAINOPS_HOST_DEVICE void decode_blocks(const uint8_t* __restrict codes, const uint8_t* scales,
                                        BFloat16* __restrict values, int64_t blocks) {
  constexpr uint16_t last = Code<is_signed>::last;
  uint8_t largest = 0;
  for (int64_t i = 0; i < blocks * kCodeBlock; ++i) {
    const uint8_t magnitude = codes[i] & last;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool are_finite = largest < last - 1;
  for (int64_t block = 0; block < blocks; ++block, codes += kCodeBlock, values += kCodeBlock) {
    const int32_t first = Code<is_signed>::first(scales[block]);
    const auto upper = static_cast<uint16_t>(first >> 16);
#if defined(__GNUC__)
    if (block % 2 == 0) __builtin_prefetch(codes + 2 * kTileNumel, 1);  // of a later tile, while this one computes
#endif
    if (are_finite) {  // decode_finite in the upper half of its word
      TRAINOPS_KEEP_LOOP
      for (int i = 0; i < kCodeBlock; ++i) {
        const uint16_t code = codes[i], magnitude = code & last;
        uint16_t bits = static_cast<uint16_t>((magnitude << 4) + upper);
        bits = magnitude == 0 ? 0 : bits;
        values[i].bits = is_signed ? static_cast<uint16_t>(bits | (code & 0x80) << 8) : bits;
      }
    } else {
      for (int i = 0; i < kCodeBlock; ++i) narrow(Code<is_signed>::decode(codes[i], first), values[i]);
    }
  }
}

// The codes of a block of any elements.
template <bool is_signed>
void encode_with_care(const float* even, const float* odd, const uint32_t* words, uint8_t* codes, uint8_t* scale) {
  int32_t largest = 0;
  for (int i = 0; i < kPairs; ++i) {
    largest = std::max({largest, finite_size(even[i]), finite_size(odd[i])});
  }
  *scale = static_cast<uint8_t>(scale_of(largest));
  const int32_t first = Code<is_signed>::first(*scale);
  for (int i = 0; i < kPairs; ++i) {
    for (int k = 0; k < 2; ++k) {
      const float x = k == 0 ? even[i] : odd[i];
      codes[2 * i + k] =
          static_cast<uint8_t>(Code<is_signed>::encode(x, first, Code<is_signed>::random(words[i], k)));
    }
  }
}

// Whether encode_with_care has to look at a block of these codes: whether one might be of an element below the
// smallest code, which with its random bits makes one more at most.
template <bool is_signed>
TRAINOPS_HOST_DEVICE bool may_be_odd(const uint8_t* codes, int64_t size) {
  uint8_t least = 255;
  for (int64_t i = 0; i < size; ++i) {
    const uint8_t magnitude = codes[i] & Code<is_signed>::last;
    least = magnitude < least ? magnitude : least;
  }
  return least <= (is_signed ? 1 : 0);
}

// The bits of a block's largest element, those of a NaN or an infinity among them.
template <bool is_signed>
TRAINOPS_HOST_DEVICE uint32_t largest_of(const float* even, const float* odd) {
  constexpr uint32_t mask = kMask<is_signed>;
  uint32_t largest = 0;
  TRAINOPS_KEEP_LOOP
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t x = bit_cast<uint32_t>(even[i]) & mask, y = bit_cast<uint32_t>(odd[i]) & mask;
    const uint32_t larger = x > y ? x : y;
    largest = largest > larger ? largest : larger;
  }
  return largest;
}

template <typename Isa, bool is_signed>
TRAINOPS_HOST_DEVICE void encode_blocks(const float* __restrict even, const float* __restrict odd,
                                        const uint32_t* __restrict words, uint8_t* __restrict codes,
                                        uint8_t* __restrict scales, int64_t blocks) {
  using Words = Lanes<uint32_t, Isa::width>;
  using Halves = Lanes<uint16_t, Isa::width>;
  using SignedHalves = Lanes<int16_t, Isa::width>;
  using Bytes = Lanes<uint8_t, Isa::width / 2>;
  constexpr uint32_t mask = kMask<is_signed>;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kPairs;
    const uint32_t largest = largest_of<is_signed>(even + begin, odd + begin);
    if (largest >= static_cast<uint32_t>(kInfinity)) {
      encode_with_care<is_signed>(even + begin, odd + begin, words + begin, codes + 2 * begin, scales + block);
      continue;
    }
    const int32_t scale = scale_of(static_cast<int32_t>(largest));
    scales[block] = static_cast<uint8_t>(scale);
    const auto upper = static_cast<int16_t>(Code<is_signed>::first(scale) >> 16);
    for (int64_t i = begin; i < begin + kPairs; i += Isa::width / 4) {
      Words x, y, random;
      std::memcpy(&x, even + i, sizeof(x));
      std::memcpy(&y, odd + i, sizeof(y));
      std::memcpy(&random, words + i, sizeof(random));
      const Words lower_half = (random << 4 & 0xffff0u) | 8u, upper_half = (random >> 12 & 0xffff0u) | 8u;
      const Words a = (x & mask) + (is_signed ? lower_half : upper_half);
      const Words b = (y & mask) + (is_signed ? upper_half : lower_half);
      const auto above = reinterpret_cast<SignedHalves>(a >> 16 | (b & 0xffff0000u)) - upper;
      auto code = reinterpret_cast<Halves>(above > 0 ? above : SignedHalves{}) >> 4;
      if (is_signed) code |= reinterpret_cast<Halves>((x >> 16 & 0x8000u) | (y & 0x80000000u)) >> 8;
      const Bytes bytes = __builtin_convertvector(code, Bytes);
      std::memcpy(codes + 2 * i, &bytes, sizeof(bytes));
    }
  }
  if (!may_be_odd<is_signed>(codes, blocks * kCodeBlock)) return;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kPairs;
    if (!may_be_odd<is_signed>(codes + 2 * begin, kCodeBlock)) continue;
    if (largest_of<is_signed>(even + begin, odd + begin) == 0) continue;
    encode_with_care<is_signed>(even + begin, odd + begin, words + begin, codes + 2 * begin, scales + block);
  }
}

// One named function for each, because only those can be compiled for several instruction sets.
#define TRAINOPS_DECODE(name, is_signed)                                                                  \
  TRAINOPS_MULTIVERSION void decode_##name(const uint8_t* codes, const uint8_t* scales, BFloat16* values, \
                                           int64_t blocks) {                                              \
    decode_blocks<is_signed>(codes, scales, values, blocks);                                              \
  }
TRAINOPS_DECODE(signed, true)
TRAINOPS_DECODE(unsigned, false)
#undef TRAINOPS_DECODE

#define TRAINOPS_ENCODE(Isa, target, name, is_signed)                                                   \
  target void encode_##name(const float* even, const float* odd, const uint32_t* words, uint8_t* codes, \
                            uint8_t* scales, int64_t blocks) {                                          \
    encode_blocks<Isa, is_signed>(even, odd, words, codes, scales, blocks);                             \
  }
TRAINOPS_VERSIONS(TRAINOPS_ENCODE, signed, true)
TRAINOPS_VERSIONS(TRAINOPS_ENCODE, unsigned, false)
#undef TRAINOPS_ENCODE

void take_apart(const float* __restrict values, int64_t pairs, float* __restrict even, float* __restrict odd) {
  for (int64_t i = 0; i < pairs; ++i) {
    even[i] = values[2 * i];
    odd[i] = values[2 * i + 1];
  }
}

TRAINOPS_MULTIVERSION void random_words_of(Random random, int64_t pairs, uint32_t* words) {
  for (int64_t i = 0; i < pairs; ++i) words[i] = random.word(2 * i);
}

}  // namespace

void random_words(const Random& random, int64_t begin, int64_t size, uint32_t* words) {
  random_words_of(random.from(begin), count_code_blocks(size) * kPairs, words);
}

void read_codes(const Cell& cell, int64_t begin, int64_t size, BFloat16* values) {
  const auto decode = cell.dtype == DType::signed_codes ? decode_signed : decode_unsigned;
  const uint8_t* const codes = static_cast<const uint8_t*>(cell.address) + begin;
  const uint8_t* const scales = cell.scales + begin / kCodeBlock;
  const int64_t blocks = size / kCodeBlock, whole = blocks * kCodeBlock;
  decode(codes, scales, values, blocks);
  if (whole == size) return;
  uint8_t last_codes[kCodeBlock] = {};
  BFloat16 last[kCodeBlock];
  std::copy(codes + whole, codes + size, last_codes);
  decode(last_codes, scales + blocks, last, 1);
  std::copy(last, last + (size - whole), values + whole);
}

void write_codes(const Cell& cell, int64_t begin, int64_t size, const float* values, const uint32_t* words) {
  float even[kTileNumel / 2], odd[kTileNumel / 2];
  take_apart(values, size / 2, even, odd);
  if (size % 2 == 1) even[size / 2] = values[size - 1];
  write_codes(cell, begin, size, even, odd, words);
}

void write_codes(const Cell& cell, int64_t begin, int64_t size, float* even, float* odd, const uint32_t* words) {
  const auto encode = [&](auto... operands) {
    return cell.dtype == DType::signed_codes ? encode_signed(operands...) : encode_unsigned(operands...);
  };
  uint8_t* const codes = static_cast<uint8_t*>(cell.address) + begin;
  uint8_t* const scales = cell.scales + begin / kCodeBlock;
  const int64_t blocks = size / kCodeBlock, whole = blocks * kCodeBlock;
  encode(even, odd, words, codes, scales, blocks);
  if (whole == size) return;
  std::fill(even + (size + 1) / 2, even + whole / 2 + kPairs, 0.0f);
  std::fill(odd + size / 2, odd + whole / 2 + kPairs, 0.0f);
  uint8_t last_codes[kCodeBlock];
  encode(even + whole / 2, odd + whole / 2, words + whole / 2, last_codes, scales + blocks, 1);
  std::copy(last_codes, last_codes + (size - whole), codes + whole);
}

}  // namespace trainops::cpu
