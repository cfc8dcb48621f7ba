// Clipping, unscaling and skipping, the same for every rule. A step decides after the norm, if it measures one, and
// before it updates a parameter. On CUDA, every block evaluates the same decision.
//
//   coefficient = min(1, max_norm / (norm + 1e-6)) / grad_scale
//   skips       = found_inf, or skip_nonfinite and a norm that is infinite or NaN, or a guard's verdict (guard.h)
//
// Agrees with: torch.nn.utils.clip_grads_with_norm_ (torch/nn/utils/clip_grad.py), torch.amp.GradScaler.
#pragma once

#include "guard.h"
#include "host_device.h"

namespace trainops {

// A NaN norm gives a NaN coefficient, as torch.clamp does.
TRAINOPS_HOST_DEVICE double clip_coefficient(double norm, double max_norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

// The user's settings.
struct Control {
  bool clips = false, skip_nonfinite = false;
  double max_norm = 0.0;
};

struct Decision {
  double coefficient;  // of the gradients
  bool skips;
};

// `norm` is that of the unscaled gradients; gradients are `grad_scale` times too large.
TRAINOPS_HOST_DEVICE Decision decide(const Control& control, double norm, double grad_scale, bool found_inf) {
  const double clipped = control.clips ? clip_coefficient(norm, control.max_norm) : 1.0;
  return {clipped / grad_scale, found_inf || (control.skip_nonfinite && !is_finite(norm))};
}

}  // namespace trainops
