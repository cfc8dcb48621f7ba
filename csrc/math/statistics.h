// Statistics of tensors: the norms. A statistic has a State, which begins as State{}; add() takes one element into
// it, join() combines two states, and finish() returns the result. A NaN stays.
//
//   norm = (sum over tensors and elements of |x|^p)^(1/p)
//
// Agrees with: torch.nn.utils.get_total_norm (torch/nn/utils/clip_grad.py).
#pragma once

#include <cmath>

#include "host_device.h"

namespace trainops {

struct L1Norm {
  using State = double;
  TRAINOPS_HOST_DEVICE static State add(State sum, double x) { return sum + (x < 0.0 ? -x : x); }
  TRAINOPS_HOST_DEVICE static State join(State a, State b) { return a + b; }
  TRAINOPS_HOST_DEVICE static double finish(State sum) { return sum; }
};

struct L2Norm {
  using State = double;
  TRAINOPS_HOST_DEVICE static State add(State sum, double x) { return sum + x * x; }
  TRAINOPS_HOST_DEVICE static State join(State a, State b) { return a + b; }
  TRAINOPS_HOST_DEVICE static double finish(State sum) { return std::sqrt(sum); }
};

struct InfNorm {
  using State = double;
  TRAINOPS_HOST_DEVICE static State add(State largest, double x) { return join(largest, x < 0.0 ? -x : x); }
  TRAINOPS_HOST_DEVICE static State join(State a, State b) { return (b > a || b != b) ? b : a; }
  TRAINOPS_HOST_DEVICE static double finish(State largest) { return largest; }
};

// Expands macro(Statistic, name) for each.
#define TRAINOPS_STATISTICS(macro) macro(L1Norm, "l1_norm") macro(L2Norm, "l2_norm") macro(InfNorm, "inf_norm")

}  // namespace trainops
