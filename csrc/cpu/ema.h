#pragma once

#include "convert.h"

namespace trainops::cpu {

// Moves `size` elements of the average, one tile at most, towards those of the weight. The arithmetic is in float64
// if either is. A fused step of any rule calls this, too.
void ema_tile(const Cell& average, const Weight& weight, int64_t begin, int64_t size, double decay);

}  // namespace trainops::cpu
