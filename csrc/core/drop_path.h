// What DropPath's kernels are told.
#pragma once

#include <cstdint>

#include "table.h"

namespace trainops {

// out = residual + branch * layer_scale * mask[sample]
struct DropPath {
  Cell out, residual, branch, layer_scale, mask;
  const int64_t* rows;  // the sample of the branch that a sample of the result takes; null: its own
  int64_t samples, sample_numel, channels;
  int device;
};

// of_branch = grad * layer_scale * mask[sample], and layer scale's gradient: the sum of grad * mask[sample] * branch.
struct DropPathBackward {
  Cell of_branch, of_layer_scale, grad, branch, layer_scale, mask;
  const int64_t* rows;  // the sample of the gradient that a sample of the branch takes; null: its own
  int64_t samples, sample_numel, channels;
  int device;
};

}  // namespace trainops
