// Stochastic depth (Huang et al., https://arxiv.org/abs/1603.09382) with layer scale (Touvron et al.,
// https://arxiv.org/abs/2103.17239) and the residual:
//
//   out = residual + (branch * layer_scale) * mask[sample]          mask: 0, or 1 / keep_prob
//
// Each product is rounded to the type that PyTorch gives it, so the result is that of
// `residual + drop_path(branch * layer_scale)` bit for bit, in 16-bit types as well. One difference: a dropped sample
// keeps the residual's bits. PyTorch turns -0.0 into 0.0.
// Agrees with: timm.layers.drop_path (timm/layers/drop.py).
#pragma once

#include "host_device.h"
#include "storage.h"

namespace trainops {

struct RoundNothing {
  template <typename T>
  TRAINOPS_HOST_DEVICE T operator()(T x) const {
    return x;
  }
};
template <typename Narrow>
struct RoundTo {
  TRAINOPS_HOST_DEVICE float operator()(float x) const {
    Narrow narrowed;
    narrow(x, narrowed);
    return widen(narrowed);
  }
};

// The term that is added to the residual. `round` rounds to the type of the products.
template <bool has_layer_scale, typename T, typename Round>
TRAINOPS_HOST_DEVICE T drop_path_element(T branch, T layer_scale, T mask, Round round) {
  const T scaled = has_layer_scale ? round(branch * layer_scale) : branch;
  return round(scaled * mask);
}

}  // namespace trainops
