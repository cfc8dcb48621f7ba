// Adam (Kingma and Ba, https://arxiv.org/abs/1412.6980, algorithm 1), whose weight decay is an L2 penalty, optionally
// with AMSGrad (https://arxiv.org/abs/1904.09237):
//
//   g     <- coefficient * g + weight_decay * p
//
// and then AdamW (adamw.h) without a decay of its own.
// Agrees with: torch.optim.Adam (torch/optim/adam.py, _single_tensor_adam).
#pragma once

#include "adamw.h"
#include "rule.h"

namespace trainops {

struct Adam : AdamW {
  template <typename T>
  struct Scalars : AdamW::Scalars<T> {
    T penalty;
  };

  TRAINOPS_HOST_DEVICE static Scalars<double> scalars(const Settings& s, double step, double grad_coefficient) {
    Settings without_decay = s;
    without_decay.weight_decay = 0.0;
    return {AdamW::scalars(without_decay, step, grad_coefficient), s.weight_decay};
  }

  // As AdamW's.
  template <bool may_omit_branch, typename T, typename Function>
  TRAINOPS_HOST_DEVICE static void with_formula(int states, const Scalars<T>& s, Function function) {
    if (states == kStates) return function(Formula<AdamW::Formula<true, false>>{});
    if (may_omit_branch && s.weight1 < T(0.5)) return function(Formula<AdamW::Formula<false, may_omit_branch>>{});
    function(Formula<AdamW::Formula<false, false>>{});
  }

  template <typename AdamWs>
  struct Formula {
    static constexpr int states = AdamWs::states;

    template <typename T>
    TRAINOPS_HOST_DEVICE void operator()(T& param, T grad, T* state, const Scalars<T>& s) const {
      AdamWs::take(param, penalized(s.coefficient * grad, s.penalty, param), state, s);
    }
  };
};

}  // namespace trainops
