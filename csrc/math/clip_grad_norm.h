// The norm of all gradients taken as one vector, and the coefficient that brings it down to max_norm:
//
//   norm        = (sum over tensors and elements of |g|^p)^(1/p)
//   coefficient = min(1, max_norm / (norm + 1e-6))
//
// Agrees with: torch.nn.utils.get_total_norm and clip_grads_with_norm_ (torch/nn/utils/clip_grad.py).
#pragma once

#include <cmath>

#include "host_device.h"

namespace trainops {

enum class Norm { l1, l2, inf };

// How one element enters the accumulator, and how two accumulators are joined. A NaN stays.
template <Norm norm, typename T>
TRAINOPS_HOST_DEVICE T accumulate(T total, T x) {
  const T magnitude = x < T(0) ? -x : x;
  if (norm == Norm::l1) return total + magnitude;
  if (norm == Norm::l2) return total + x * x;
  return (magnitude > total || magnitude != magnitude) ? magnitude : total;
}

template <Norm norm, typename T>
TRAINOPS_HOST_DEVICE T join(T a, T b) {
  if (norm != Norm::inf) return a + b;
  return (b > a || b != b) ? b : a;
}

// A NaN norm gives a NaN coefficient, as torch.clamp does.
TRAINOPS_HOST_DEVICE double clip_coefficient(double norm, double max_norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

// What gradients that are `grad_scale` times too large are multiplied with. `norm` is that of the unscaled ones.
TRAINOPS_HOST_DEVICE double step_coefficient(bool clips, double norm, double max_norm, double grad_scale) {
  return (clips ? clip_coefficient(norm, max_norm) : 1.0) / grad_scale;
}

TRAINOPS_HOST_DEVICE bool is_finite(double x) { return x - x == 0.0; }

// A NaN stays.
template <typename T>
TRAINOPS_HOST_DEVICE T clamp_element(T x, T bound) {
  const T at_least = x < -bound ? -bound : x;
  return at_least > bound ? bound : at_least;
}

}  // namespace trainops
