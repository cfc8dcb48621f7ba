// The arguments of DropPath's kernels.
#pragma once

#include <cstdint>

#include "table.h"

namespace trainops {

// The arguments of both. `rows`: see below.
struct DropPathOperands {
  Cell branch, layer_scale, mask;
  const int64_t* rows;
  int64_t samples, sample_numel, channels;
  int device;
};

// out = residual + branch * layer_scale * mask[sample]. Sample i takes branch[rows[i]]; without rows, branch[i].
struct DropPath : DropPathOperands {
  Cell out, residual;
};

// of_branch = grad * layer_scale * mask[sample], and layer scale's gradient: the sum of grad * mask[sample] * branch.
// Sample i of the branch takes grad[rows[i]]; without rows, grad[i].
struct DropPathBackward : DropPathOperands {
  Cell of_branch, of_layer_scale, grad;
};

}  // namespace trainops
