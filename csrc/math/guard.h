// A guard against spikes of the gradients' norm: which steps are skipped, and what is learned of the others.
//
//   spike:  norm is not finite, norm > max_norm, or, of a guard that is warm,
//           log(norm) - mean > deviations * max(sqrt(variance), 0.05)
//   learns: rate = max(1 - decay, 1 / (count + 1)),  d = log(norm) - mean
//           mean += rate d,  variance = (1 - rate) (variance + rate d^2),  count += 1
//
// So means and variances are those of all norms at first, then decay. A spike changes neither. Norms that have risen
// for good are learned anew after `patience` spikes in a row.
//
// Agrees with: judge in trainops/adapters/_control.py, triton_kernels/control.py.
#pragma once

#include <cmath>

#include "host_device.h"

namespace trainops {

// Expands macro(name) for each number of a guard, in the order that they have in memory: what it has learned, its
// verdict on this step, and its settings.
#define TRAINOPS_GUARD(macro)                                                                             \
  macro(mean) macro(variance) macro(count) macro(spikes) macro(verdict) macro(max_norm) macro(deviations) \
      macro(decay) macro(warmup) macro(patience)

// In memory that the optimizer keeps.
struct Guard {
#define TRAINOPS_GUARD_FIELD(name) double name;
  TRAINOPS_GUARD(TRAINOPS_GUARD_FIELD)
#undef TRAINOPS_GUARD_FIELD
};

// Norms that hardly vary would make spikes of little.
constexpr double kLeastDeviation = 0.05;

TRAINOPS_HOST_DEVICE bool is_finite(double x) { return x - x == 0.0; }

// Judges a step by the norm of its unscaled gradients. `skips`: others skip it, so that it is not learned.
TRAINOPS_HOST_DEVICE Guard judged(Guard guard, double norm, bool skips) {
  guard.verdict = !is_finite(norm) || norm > guard.max_norm ? 1.0 : 0.0;
  if (!is_finite(norm) || !(norm > 0.0)) return guard;
  const double d = std::log(norm) - guard.mean;
  const double deviation = std::sqrt(guard.variance);
  const double limit = guard.deviations * (deviation > kLeastDeviation ? deviation : kLeastDeviation);
  if (guard.count >= guard.warmup && d > limit) guard.verdict = 1.0;
  if (guard.verdict != 0.0) {
    guard.spikes += 1.0;
    if (guard.spikes >= guard.patience) guard.mean = guard.variance = guard.count = guard.spikes = 0.0;
  } else if (!skips) {
    const double first = 1.0 / (guard.count + 1.0), rate = 1.0 - guard.decay > first ? 1.0 - guard.decay : first;
    guard.mean += rate * d;
    guard.variance = (1.0 - rate) * (guard.variance + rate * d * d);
    guard.count += 1.0;
    guard.spikes = 0.0;
  }
  return guard;
}

}  // namespace trainops
