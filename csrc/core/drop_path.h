// The arguments of DropPath's kernels.
#pragma once

#include <cstdint>

#include "table.h"

namespace trainops {

// out = residual + branch * layer_scale * mask[sample]
struct DropPath {
  Cell out, residual, branch, layer_scale, mask;
  const int64_t* rows;  // sample i of the result takes branch[rows[i]]; null: branch[i]
  int64_t samples, sample_numel, channels;
  int device;
};

// of_branch = grad * layer_scale * mask[sample], and layer scale's gradient: the sum of grad * mask[sample] * branch.
struct DropPathBackward {
  Cell of_branch, of_layer_scale, grad, branch, layer_scale, mask;
  const int64_t* rows;  // sample i of the branch takes grad[rows[i]]; null: grad[i]
  int64_t samples, sample_numel, channels;
  int device;
};

}  // namespace trainops
