// Moments in 8 bits as values of float, and back (math/codes.h). Tiles begin with a block.
#pragma once

#include "convert.h"

namespace trainops::cpu {

// A word of random bits for each element, which serves all state of a parameter.
void random_words(Random random, int64_t size, uint32_t* words);

void read_codes(const Cell& cell, int64_t begin, int64_t size, float* values);
void write_codes(const Cell& cell, int64_t begin, int64_t size, const float* values, const uint32_t* words);

}  // namespace trainops::cpu
