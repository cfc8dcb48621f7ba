#pragma once

#include "../core/table.h"

namespace trainops::cpu {

// Moves `size` elements of the average, one tile at most, towards those of the parameter. The arithmetic is in
// float64 if either is. A fused step of any rule calls this, too.
void ema_tile(const Cell& average, const Cell& param, int64_t begin, int64_t size, double decay);

}  // namespace trainops::cpu
