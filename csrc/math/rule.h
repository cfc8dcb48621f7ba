// Functions for every rule.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace trainops {

// Rounds a rule's scalars, evaluated in double, once. `Scalars` has no members but numbers.
template <typename Rule, typename T>
TRAINOPS_HOST_DEVICE typename Rule::template Scalars<T> rounded(const typename Rule::template Scalars<double>& wide) {
  constexpr int count = sizeof(wide) / sizeof(double);
  static_assert(sizeof(typename Rule::template Scalars<T>) == count * sizeof(T), "scalars are numbers");
  double from[count];
  T to[count];
  std::memcpy(from, &wide, sizeof(from));
  for (int i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  typename Rule::template Scalars<T> result;
  std::memcpy(&result, to, sizeof(to));
  return result;
}

// The gradient of a loss with an L2 penalty. Without one, the parameter is not looked at: it may be infinite.
template <typename T>
TRAINOPS_HOST_DEVICE T penalized(T grad, T penalty, T param) {
  return penalty != T(0) ? grad + penalty * param : grad;
}

// The length of an array of so many: arrays are not empty, and a formula may have no state.
template <int count>
constexpr int kLength = count > 0 ? count : 1;

// The number of a rule's settings.
template <typename Rule>
constexpr int kSettings = sizeof(typename Rule::Settings) / sizeof(double);

// A rule's settings from numbers in the order of its names.
template <typename Rule>
TRAINOPS_HOST_DEVICE typename Rule::Settings settings_from(const double* numbers) {
  typename Rule::Settings settings;
  std::memcpy(&settings, numbers, sizeof(settings));
  return settings;
}

}  // namespace trainops
