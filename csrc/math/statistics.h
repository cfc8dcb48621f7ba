// Statistics of tensors: the norms. A NaN stays.
//
// A statistic has a State: a double, or a struct of doubles and 64-bit integers. It begins as State{}, which changes
// no other state that it is joined with. add() takes one element into it, join() combines two states, and finish()
// returns the result. If a statistic `ignores_zeros`, adding 0 changes no state: kernels then need not ask whether
// each element exists.
//
//   norm = (sum over tensors and elements of |x|^p)^(1/p)
//
// Agrees with: torch.nn.utils.get_total_norm (torch/nn/utils/clip_grad.py).
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "host_device.h"

namespace trainops {

struct L1Norm {
  using State = double;
  static constexpr bool ignores_zeros = true;
  TRAINOPS_HOST_DEVICE static State add(State sum, double x) { return sum + (x < 0.0 ? -x : x); }
  TRAINOPS_HOST_DEVICE static State join(State a, State b) { return a + b; }
  TRAINOPS_HOST_DEVICE static double finish(State sum) { return sum; }
};

struct L2Norm {
  using State = double;
  static constexpr bool ignores_zeros = true;
  TRAINOPS_HOST_DEVICE static State add(State sum, double x) { return sum + x * x; }
  TRAINOPS_HOST_DEVICE static State join(State a, State b) { return a + b; }
  TRAINOPS_HOST_DEVICE static double finish(State sum) { return std::sqrt(sum); }
};

struct InfNorm {
  using State = double;
  static constexpr bool ignores_zeros = true;
  TRAINOPS_HOST_DEVICE static State add(State largest, double x) { return join(largest, x < 0.0 ? -x : x); }
  TRAINOPS_HOST_DEVICE static State join(State a, State b) { return (b > a || b != b) ? b : a; }
  TRAINOPS_HOST_DEVICE static double finish(State largest) { return largest; }
};

// Expands macro(Statistic, name) for each.
#define TRAINOPS_STATISTICS(macro) macro(L1Norm, "l1_norm") macro(L2Norm, "l2_norm") macro(InfNorm, "inf_norm")

// 64-bit words of a State.
template <typename Statistic>
constexpr int state_words = sizeof(typename Statistic::State) / sizeof(int64_t);

// Calls function(Statistic{}) with the statistic of that name.
template <typename Function>
auto with_statistic(const std::string& statistic, Function function) {
#define TRAINOPS_CASE(Statistic, name) \
  if (statistic == name) return function(Statistic{});
  TRAINOPS_STATISTICS(TRAINOPS_CASE)
#undef TRAINOPS_CASE
  throw std::invalid_argument("there is no statistic " + statistic);
}

}  // namespace trainops
