// Statistics of tensors: the norms, of which a NaN stays, and Moments (moments.h), which counts what is not finite.
//
// A statistic gathers elements in two steps. A Run<T> holds a few elements of a tensor. T is the type of their
// arithmetic: float for float32 and 16 bits, so that no inner loop needs float64, which many GPUs do at 1/64 of the
// rate. A State holds any number of elements: it is a double, or a struct of doubles and 64-bit integers.
//
// add() takes one element into a run, join() combines two runs or two states, widen() makes a state of a run, and
// finish() writes the `results` of a state. If a statistic `has_packs`, it has no add(): gather() makes a run of a
// pack of elements, which can be looked at twice while they are in registers or in a cache. Run<T>{} and State{} are
// the beginning: they change nothing that they are joined with. If a statistic `ignores_zeros`, adding 0 changes no
// run: kernels then need not ask whether each element exists.
//
// A run in float rounds every sum, so kernels keep runs short, and join few of them in float. Its range is smaller
// than that of a double, too: kernels ask whether what they joined of all of a chunk, a run or a state,
// is_doubtful(), and if it is, gather the chunk again in Run<double>.
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
#include "moments.h"

namespace trainops {

template <typename T>
TRAINOPS_HOST_DEVICE T magnitude(T x) {
  return x < T(0) ? -x : x;
}

// Sums of numbers that are not negative.
struct Sum {
  using State = double;
  template <typename T>
  using Run = T;
  static constexpr bool ignores_zeros = true, has_packs = false;
  static constexpr int results = 1;
  template <typename T>
  TRAINOPS_HOST_DEVICE static T join(T a, T b) {
    return a + b;
  }
  TRAINOPS_HOST_DEVICE static State widen(double sum) { return sum; }
};

struct L1Norm : Sum {
  template <typename T>
  TRAINOPS_HOST_DEVICE static T add(T sum, T x) {
    return sum + magnitude(x);
  }
  // Float sums may overflow. Small numbers lose nothing: a sum of two floats is exact wherever it is subnormal.
  template <typename T>
  TRAINOPS_HOST_DEVICE static bool is_doubtful(T sum) {
    return sum == T(INFINITY);
  }
  TRAINOPS_HOST_DEVICE static void finish(State sum, double (&out)[1]) { out[0] = sum; }
};

struct L2Norm : Sum {
  template <typename T>
  TRAINOPS_HOST_DEVICE static T add(T sum, T x) {
    return sum + x * x;
  }
  // The squares of 1e20 overflow. A square in float may be off by 2^-150, half of the smallest number: 2^16 of them
  // by 2^-34 of a sum of 2^-100.
  template <typename T>
  TRAINOPS_HOST_DEVICE static bool is_doubtful(T sum) {
    return sum == T(INFINITY) || sum < T(0x1p-100);
  }
  TRAINOPS_HOST_DEVICE static void finish(State sum, double (&out)[1]) { out[0] = std::sqrt(sum); }
};

struct InfNorm {
  using State = double;
  template <typename T>
  using Run = T;
  static constexpr bool ignores_zeros = true, has_packs = false;
  static constexpr int results = 1;
  template <typename T>
  TRAINOPS_HOST_DEVICE static T add(T largest, T x) {
    return join(largest, magnitude(x));
  }
  template <typename T>
  TRAINOPS_HOST_DEVICE static T join(T a, T b) {
    return (b > a || b != b) ? b : a;
  }
  TRAINOPS_HOST_DEVICE static State widen(double largest) { return largest; }
  template <typename T>
  TRAINOPS_HOST_DEVICE static bool is_doubtful(T) {
    return false;
  }
  TRAINOPS_HOST_DEVICE static void finish(State largest, double (&out)[1]) { out[0] = largest; }
};

// Joins a power of 2 of runs in pairs, so that each is rounded only so often as the logarithm of their number.
template <typename Statistic, typename Run, int count>
TRAINOPS_HOST_DEVICE Run join_runs(const Run (&runs)[count]) {
  Run joined[count];
  for (int i = 0; i < count; ++i) joined[i] = runs[i];
  for (int width = count / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) joined[i] = Statistic::join(joined[i], joined[i + width]);
  }
  return joined[0];
}

// Expands macro(Statistic, name) for each.
#define TRAINOPS_NORMS(macro) macro(L1Norm, "l1_norm") macro(L2Norm, "l2_norm") macro(InfNorm, "inf_norm")
#define TRAINOPS_STATISTICS(macro) TRAINOPS_NORMS(macro) macro(Moments, "moments")

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
