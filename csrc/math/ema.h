// ema <- ema + (1 - decay) * (param - ema)
//
// Written as torch.lerp writes it. Special cases avoid inf - inf: decay 0 copies, decay 1 keeps, equal values stay (a
// -inf attention mask in a buffer).
// Agrees with: torch._foreach_lerp_(ema, params, 1 - decay).
#pragma once

#include "host_device.h"

namespace trainops {

template <typename T>
struct EMAWeight {
  T weight;      // 1 - decay
  T complement;  // decay

  TRAINOPS_HOST_DEVICE explicit EMAWeight(double decay)
      : weight(static_cast<T>(1.0 - decay)), complement(static_cast<T>(decay)) {}

  TRAINOPS_HOST_DEVICE EMAWeight(T weight, T complement) : weight(weight), complement(complement) {}

  TRAINOPS_HOST_DEVICE bool small() const { return weight > T(0) && weight < T(0.5); }
};

// With `small`, the caller guarantees 0 < weight < 0.5, the usual case. The loop then has one choice left.
template <bool small = false, typename T>
TRAINOPS_HOST_DEVICE T ema_element(T average, T param, EMAWeight<T> w) {
  const T difference = param - average;
  if (small) return param == average ? average : average + w.weight * difference;
  const T moved = w.weight < T(0.5) ? average + w.weight * difference : param - w.complement * difference;
  const T kept = (param == average || w.weight == T(0)) ? average : moved;
  return w.complement == T(0) ? param : kept;
}

}  // namespace trainops
