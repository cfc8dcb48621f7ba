#pragma once

#include "../math/ema.h"
#include "parallel.h"

namespace trainops::cpu {

// One tile of the average, moved towards one tile of parameters. Also the last act of a fused AdamW step.
void ema_tile(float* __restrict average, const float* __restrict param, int64_t size, EMAWeight<float> weight);
void ema_tile(double* __restrict average, const double* __restrict param, int64_t size, EMAWeight<double> weight);

}  // namespace trainops::cpu
