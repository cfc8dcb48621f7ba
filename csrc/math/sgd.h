// Stochastic gradient descent with momentum (Sutskever et al., https://proceedings.mlr.press/v28/sutskever13.html, in
// the form that PyTorch gives it), optionally Nesterov's:
//
//   g <- coefficient * g + weight_decay * p
//   b <- g                                      in the first step
//   b <- momentum * b + (1 - dampening) * g     later
//   p <- p - lr * b                             or, with nesterov, lr * (g + momentum * b); without momentum, lr * g
//
// Agrees with: torch.optim.SGD (torch/optim/sgd.py, _single_tensor_sgd).
#pragma once

#include "../core/schema.h"
#include "host_device.h"
#include "rule.h"

namespace trainops {

#define TRAINOPS_SGD_STATE(column) column(kMomentumBuffer, "momentum_buffer", kWritten | kOptional | kSignedCodes)

#define TRAINOPS_SGD_SETTINGS(setting) \
  setting(lr) setting(momentum) setting(dampening) setting(weight_decay) setting(nesterov) setting(maximize)

// A rule (CONTRIBUTING.md, "Adding a rule", lists its parts).
struct SGD {
  enum State : int { TRAINOPS_SGD_STATE(TRAINOPS_ENUMERATOR) kStates };
  static constexpr Column state[] = {TRAINOPS_SGD_STATE(TRAINOPS_COLUMN)};

  // The settings of one parameter group.
  struct Settings {
    TRAINOPS_SGD_SETTINGS(TRAINOPS_FIELD)
  };
  static constexpr const char* setting_names[] = {TRAINOPS_SGD_SETTINGS(TRAINOPS_NAME)};

  // The scalars of one parameter at its step count. `look_ahead`: the momentum with nesterov, else 0.
  template <typename T>
  struct Scalars {
    T coefficient, penalty, keep, take, look_ahead, lr;
  };

  TRAINOPS_HOST_DEVICE static Scalars<double> scalars(const Settings& s, double step, double grad_coefficient) {
    const bool is_first = step == 1.0;
    Scalars<double> result;
    result.coefficient = s.maximize != 0.0 ? -grad_coefficient : grad_coefficient;
    result.penalty = s.weight_decay;
    result.keep = is_first ? 0.0 : s.momentum;
    result.take = is_first ? 1.0 : 1.0 - s.dampening;
    result.look_ahead = s.nesterov != 0.0 ? s.momentum : 0.0;
    result.lr = s.lr;
    return result;
  }

  // Whether there is Nesterov's term. `by_scalars`: the formula asks `look_ahead`.
  enum class Nesterov { no, yes, by_scalars };

  // Calls function(formula). The formula depends on the number of state columns. It may be made for either value of
  // `nesterov`: GCC does not vectorise a loop over bfloat16 whose formula has two conditions.
  template <bool may_omit_branch, typename T, typename Function>
  TRAINOPS_HOST_DEVICE static void with_formula(int states, const Scalars<T>& s, Function function) {
    if (states < kStates) return function(Formula<false, Nesterov::no>{});
    if constexpr (may_omit_branch) {
      if (s.look_ahead != T(0)) return function(Formula<true, Nesterov::yes>{});
      function(Formula<true, Nesterov::no>{});
    } else {
      function(Formula<true, Nesterov::by_scalars>{});
    }
  }

  template <bool has_momentum, Nesterov nesterov>
  struct Formula {
    static constexpr int states = has_momentum ? kStates : 0;

    template <typename T>
    TRAINOPS_HOST_DEVICE void operator()(T& param, T grad, T* state, const Scalars<T>& s) const {
      const T g = penalized(s.coefficient * grad, s.penalty, param);
      T direction = g;
      if constexpr (has_momentum) {
        const T b = s.keep * state[kMomentumBuffer] + s.take * g;
        state[kMomentumBuffer] = b;
        const bool looks_ahead = nesterov == Nesterov::by_scalars ? s.look_ahead != T(0) : nesterov == Nesterov::yes;
        direction = looks_ahead ? g + s.look_ahead * b : b;
      }
      param = param - s.lr * direction;
    }
  };
};

}  // namespace trainops
