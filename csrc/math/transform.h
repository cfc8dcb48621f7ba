// Operations on the elements of one tensor, in place.
#pragma once

#include "host_device.h"

namespace trainops {

template <typename T>
struct Scale {
  T coefficient;
  TRAINOPS_HOST_DEVICE T operator()(T x) const { return x * coefficient; }
};

// Limits to [-bound, bound]. A NaN stays.
template <typename T>
struct Clamp {
  T bound;
  TRAINOPS_HOST_DEVICE T operator()(T x) const {
    const T at_least = x < -bound ? -bound : x;
    return at_least > bound ? bound : at_least;
  }
};

}  // namespace trainops
