// AdamW with decoupled weight decay (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, algorithm 2),
// optionally with AMSGrad (https://arxiv.org/abs/1904.09237):
//
//   g     <- coefficient * g                       clipping, unscaling and `maximize` in one factor
//   p     <- p * (1 - lr * weight_decay)
//   m     <- m + (1 - beta1) * (g - m)
//   v     <- beta2 * v + (1 - beta2) * g^2
//   p     <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// The last line is evaluated with one division instead of two, by multiplying both sides of the fraction with
// sqrt(1 - beta2^t):  p - step_size * m / (sqrt(v) + scaled_eps).
// Agrees with: torch.optim.AdamW (torch/optim/adam.py, _single_tensor_adam).
#pragma once

#include <cmath>

#include "host_device.h"

namespace trainops {

// The settings of one parameter group, as the user gave them.
struct AdamWSettings {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

// 1 - beta^step without the cancellation, which costs float64 three digits where beta is 0.999; 1 for a beta of 0.
TRAINOPS_HOST_DEVICE double bias_correction(double beta, double step) {
  return beta > 0.0 ? -std::expm1(step * std::log(beta)) : 1.0;
}

// The settings for one parameter at its step count, evaluated in double and rounded once.
template <typename T>
struct AdamWScalars {
  T coefficient, keep, weight1, beta1, beta2, weight2, step_size, scaled_eps;

  AdamWScalars() = default;

  TRAINOPS_HOST_DEVICE AdamWScalars(const AdamWSettings& s, double step, double grad_coefficient) {
    const double correction1 = bias_correction(s.beta1, step);
    const double correction2_sqrt = std::sqrt(bias_correction(s.beta2, step));
    coefficient = static_cast<T>(s.maximize ? -grad_coefficient : grad_coefficient);
    keep = static_cast<T>(1.0 - s.lr * s.weight_decay);
    weight1 = static_cast<T>(1.0 - s.beta1);
    beta1 = static_cast<T>(s.beta1);
    beta2 = static_cast<T>(s.beta2);
    weight2 = static_cast<T>(1.0 - s.beta2);
    step_size = static_cast<T>(s.lr / correction1 * correction2_sqrt);
    scaled_eps = static_cast<T>(s.eps * correction2_sqrt);
  }

  template <typename Wide>
  TRAINOPS_HOST_DEVICE explicit AdamWScalars(const AdamWScalars<Wide>& s)
      : coefficient(static_cast<T>(s.coefficient)),
        keep(static_cast<T>(s.keep)),
        weight1(static_cast<T>(s.weight1)),
        beta1(static_cast<T>(s.beta1)),
        beta2(static_cast<T>(s.beta2)),
        weight2(static_cast<T>(s.weight2)),
        step_size(static_cast<T>(s.step_size)),
        scaled_eps(static_cast<T>(s.scaled_eps)) {}

  // Whether the first moment takes less than half of the gradient, as it does with any betas in use.
  TRAINOPS_HOST_DEVICE bool small() const { return weight1 < T(0.5); }
};

TRAINOPS_HOST_DEVICE float square_root(float x) { return sqrtf(x); }
TRAINOPS_HOST_DEVICE double square_root(double x) { return sqrt(x); }

// `max_exp_avg_sq` is for AMSGrad alone. `small` asserts s.small(): a loop is shorter without the choice.
template <bool amsgrad, bool small = false, typename T>
TRAINOPS_HOST_DEVICE void adamw_element(T& param, T grad, T& exp_avg, T& exp_avg_sq, T* max_exp_avg_sq,
                                        const AdamWScalars<T>& s) {
  const T g = s.coefficient * grad;
  const T difference = g - exp_avg;
  const T m = small || s.weight1 < T(0.5) ? exp_avg + s.weight1 * difference : g - s.beta1 * difference;
  const T v = exp_avg_sq * s.beta2 + s.weight2 * g * g;
  T second_moment = v;
  if (amsgrad) {
    // As torch.maximum: a NaN on either side wins.
    const T largest = *max_exp_avg_sq;
    second_moment = (largest > v || largest != largest) ? largest : v;
    *max_exp_avg_sq = second_moment;
  }
  exp_avg = m;
  exp_avg_sq = v;
  param = param * s.keep - s.step_size * m / (square_root(second_moment) + s.scaled_eps);
}

}  // namespace trainops
