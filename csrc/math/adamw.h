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

#include "../core/schema.h"
#include "host_device.h"

namespace trainops {

// 1 - beta^step without the cancellation, which costs float64 three digits where beta is 0.999; 1 for a beta of 0.
TRAINOPS_HOST_DEVICE double bias_correction(double beta, double step) {
  return beta > 0.0 ? -std::expm1(step * std::log(beta)) : 1.0;
}

TRAINOPS_HOST_DEVICE float square_root(float x) { return sqrtf(x); }
TRAINOPS_HOST_DEVICE double square_root(double x) { return sqrt(x); }

#define TRAINOPS_ADAMW_STATE(column)                                                                             \
  column(kExpAvg, "exp_avg", kWritten | kSignedCodes) column(kExpAvgSq, "exp_avg_sq", kWritten | kUnsignedCodes) \
      column(kMaxExpAvgSq, "max_exp_avg_sq", kWritten | kOptional | kUnsignedCodes)

#define TRAINOPS_ADAMW_SETTINGS(setting) \
  setting(lr) setting(beta1) setting(beta2) setting(eps) setting(weight_decay) setting(maximize)

// A rule (CONTRIBUTING.md, "Adding a rule", lists its parts).
struct AdamW {
  enum State : int { TRAINOPS_ADAMW_STATE(TRAINOPS_ENUMERATOR) kStates };
  static constexpr Column state[] = {TRAINOPS_ADAMW_STATE(TRAINOPS_COLUMN)};

  // The settings of one parameter group.
  struct Settings {
    TRAINOPS_ADAMW_SETTINGS(TRAINOPS_FIELD)
  };
  static constexpr const char* setting_names[] = {TRAINOPS_ADAMW_SETTINGS(TRAINOPS_NAME)};

  // The scalars of one parameter at its step count.
  template <typename T>
  struct Scalars {
    T coefficient, keep, weight1, beta1, beta2, weight2, step_size, scaled_eps;
  };

  TRAINOPS_HOST_DEVICE static Scalars<double> scalars(const Settings& s, double step, double grad_coefficient) {
    const double correction2_sqrt = std::sqrt(bias_correction(s.beta2, step));
    Scalars<double> result;
    result.coefficient = s.maximize != 0.0 ? -grad_coefficient : grad_coefficient;
    result.keep = 1.0 - s.lr * s.weight_decay;
    result.weight1 = 1.0 - s.beta1;
    result.beta1 = s.beta1;
    result.beta2 = s.beta2;
    result.weight2 = 1.0 - s.beta2;
    result.step_size = s.lr / bias_correction(s.beta1, step) * correction2_sqrt;
    result.scaled_eps = s.eps * correction2_sqrt;
    return result;
  }

  // Calls function(formula). The formula depends on the number of state columns. If 1 - beta1 < 0.5, as with any
  // usual beta1, it may omit the other branch of lerp.
  template <bool may_omit_branch, typename T, typename Function>
  TRAINOPS_HOST_DEVICE static void with_formula(int states, const Scalars<T>& s, Function function) {
    if (states == kStates) return function(Formula<true, false>{});
    if (may_omit_branch && s.weight1 < T(0.5)) return function(Formula<false, may_omit_branch>{});
    function(Formula<false, false>{});
  }

  // `small_weight`: the caller guarantees weight1 < 0.5.
  template <bool amsgrad, bool small_weight>
  struct Formula {
    static constexpr int states = amsgrad ? kStates : kMaxExpAvgSq;

    template <typename T>
    TRAINOPS_HOST_DEVICE void operator()(T& param, T grad, T* state, const Scalars<T>& s) const {
      take(param, s.coefficient * grad, state, s);
    }

    template <typename T>
    TRAINOPS_HOST_DEVICE static void take(T& param, T g, T* state, const Scalars<T>& s) {
      const T difference = g - state[kExpAvg];
      const T m =
          small_weight || s.weight1 < T(0.5) ? state[kExpAvg] + s.weight1 * difference : g - s.beta1 * difference;
      const T v = state[kExpAvgSq] * s.beta2 + s.weight2 * g * g;
      T second_moment = v;
      if constexpr (amsgrad) {
        // As torch.maximum: a NaN on either side wins.
        const T largest = state[kMaxExpAvgSq];
        second_moment = (largest > v || largest != largest) ? largest : v;
        state[kMaxExpAvgSq] = second_moment;
      }
      state[kExpAvg] = m;
      state[kExpAvgSq] = v;
      param = param * s.keep - s.step_size * m / (square_root(second_moment) + s.scaled_eps);
    }
  };
};

}  // namespace trainops
