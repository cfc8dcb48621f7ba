// ema <- ema + (1 - decay) * (param - ema)
//
// Written as torch.lerp writes it, so that both ends are exact: weight 0 keeps the average, weight 1 copies the
// parameter. Equal values stay as they are, which also keeps an infinity (a -inf attention mask in a buffer)
// from becoming inf - inf.
// Agrees with: torch._foreach_lerp_(ema, params, 1 - decay).
#pragma once

#include "host_device.h"

namespace trainops {

template <typename T>
struct EMAWeight {
  T weight;      // 1 - decay
  T complement;  // decay

  explicit EMAWeight(double decay) : weight(static_cast<T>(1.0 - decay)), complement(static_cast<T>(decay)) {}
};

template <typename T>
TRAINOPS_HOST_DEVICE T ema_element(T average, T param, EMAWeight<T> w) {
  const T difference = param - average;
  const T moved = w.weight < T(0.5) ? average + w.weight * difference : param - w.complement * difference;
  return param == average ? average : moved;
}

}  // namespace trainops
