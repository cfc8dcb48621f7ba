// The statistic behind trainops.tensor_stats: extremes, mean, deviation, sums and counts of the finite elements.
//
//   of some elements:  count, mean, m2 = their number, their mean, the sum of (x - mean)^2
//   of two parts:      n = na + nb,  d = mean_b - mean_a,  mean = mean_a + d nb / n,  m2 = m2_a + m2_b + d^2 na nb /
//   n
//
// Nothing is subtracted that could cancel, as squares would that are far larger than their deviations. Elements are
// not added one by one: a pack of them is gathered in two passes, around its own mean.
//
// Agrees with: trainops/reference_statistics.py. See Chan, Golub, LeVeque, "Updating formulae and a pairwise
// algorithm for computing sample variances" (1979).
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "storage.h"

namespace trainops {

// Expands macro(name) for each number of a part, in their order.
#define TRAINOPS_MOMENTS(macro) \
  macro(count) macro(nonfinite) macro(zeros) macro(min) macro(max) macro(l1) macro(mean) macro(m2)

// Elements by binary exponent: bin i counts 2^(i - 127) <= |x| < 2^(i - 126); the first has all smaller numbers but
// 0, the last all larger ones.
constexpr int kExponentBins = 255;

// The bin of a number; negative if it is 0 or not finite.
TRAINOPS_HOST_DEVICE int exponent_bin(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x) & 0x7fffffffu;
  return bits == 0 || bits >= 0x7f800000u ? -1 : static_cast<int>(bits >> 23);
}
TRAINOPS_HOST_DEVICE int exponent_bin(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x) & 0x7fffffffffffffffu;
  if (bits == 0 || bits >= 0x7ff0000000000000u) return -1;
  const int bin = static_cast<int>(bits >> 52) - 1023 + 127;
  return bin < 0 ? 0 : bin < kExponentBins ? bin : kExponentBins - 1;
}

struct Moments {
  static constexpr bool ignores_zeros = false, has_packs = true;

  // Counts are exact in float, of chunks, and in double.
  template <typename T>
  struct Part {
    T count = 0, nonfinite = 0, zeros = 0, min = T(INFINITY), max = -T(INFINITY), l1 = 0, mean = 0, m2 = 0;
  };
  template <typename T>
  using Run = Part<T>;
  using State = Part<double>;

  // The first `count` elements of a pack.
  template <typename T, typename S, int size>
  TRAINOPS_HOST_DEVICE static Part<T> gather(const S (&pack)[size], int count) {
    Part<T> part;
    T sum = 0;
    for (int i = 0; i < size; ++i) {
      const T x = static_cast<T>(pack[i]);
      if (i >= count) continue;
      if (!(x - x == T(0))) {
        part.nonfinite += T(1);
        continue;
      }
      part.count += T(1);
      part.zeros += x == T(0) ? T(1) : T(0);
      part.min = x < part.min ? x : part.min;
      part.max = x > part.max ? x : part.max;
      part.l1 += x < T(0) ? -x : x;
      sum += x;
    }
    if (part.count == T(0)) return part;
    part.mean = sum / part.count;
    T rest = 0;
    for (int i = 0; i < size; ++i) {
      const T x = static_cast<T>(pack[i]), d = x - part.mean;
      if (i >= count || !(x - x == T(0))) continue;
      rest += d;
      part.m2 += d * d;
    }
    part.mean += rest / part.count;  // what the first sum has lost
    return part;
  }

  template <typename T>
  TRAINOPS_HOST_DEVICE static Part<T> join(const Part<T>& a, const Part<T>& b) {
    Part<T> part;
    part.count = a.count + b.count;
    part.nonfinite = a.nonfinite + b.nonfinite;
    part.zeros = a.zeros + b.zeros;
    part.min = b.min < a.min ? b.min : a.min;
    part.max = b.max > a.max ? b.max : a.max;
    part.l1 = a.l1 + b.l1;
    const T share = part.count > T(0) ? b.count / part.count : T(0), weight = a.count * share;
    const T d = b.mean - a.mean;
    part.mean = share == T(1) ? b.mean : a.mean + d * share;
    part.m2 = a.m2 + b.m2 + (weight > T(0) ? d * d * weight : T(0));
    return part;
  }

  template <typename T>
  TRAINOPS_HOST_DEVICE static State widen(const Part<T>& part) {
    return {part.count, part.nonfinite, part.zeros, part.min, part.max, part.l1, part.mean, part.m2};
  }

  // Sums may overflow. Squares of a deviation in float may be off by 2^-150, as in L2Norm.
  template <typename T>
  TRAINOPS_HOST_DEVICE static bool is_doubtful(const Part<T>& part) {
    return !(part.l1 < T(INFINITY)) || !(part.m2 < T(INFINITY)) || (part.m2 < T(0x1p-100) && part.min < part.max);
  }

  static constexpr int results = sizeof(State) / sizeof(double);
  TRAINOPS_HOST_DEVICE static void finish(const State& state, double (&out)[results]) {
#define TRAINOPS_RESULT(name) state.name,
    const double numbers[] = {TRAINOPS_MOMENTS(TRAINOPS_RESULT)};
#undef TRAINOPS_RESULT
    for (int i = 0; i < results; ++i) out[i] = numbers[i];
  }
};

}  // namespace trainops
