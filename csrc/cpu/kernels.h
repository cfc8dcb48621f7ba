// The CPU kernels, as the bindings call them. Columns are positions in the table's rows.
#pragma once

#include <cstdint>
#include <vector>

#include "../math/adamw.h"
#include "../math/clip_grad_norm.h"
#include "../tensor_table.h"

namespace trainops::cpu {

// The instruction set of the kernels, by the loader's rule (parallel.h).
const char* instruction_set();

// The norm of each row of `column`, and of all of them together as one vector.
struct Norms {
  std::vector<double> rows;
  double total;
};
Norms norms(const TensorTable& table, int64_t column, Norm norm);

void scale(const TensorTable& table, int64_t column, double coefficient);
void clamp(const TensorTable& table, int64_t column, double bound);

void ema(const TensorTable& table, int64_t ema_column, int64_t param_column, double decay);

// The columns of an AdamW table. max_exp_avg_sq and ema may have no address; step is one float32.
enum AdamWColumn : int64_t { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kEMA, kStep, kAdamWColumns };

// The next `rows` rows of the table, and their settings.
struct AdamWGroup {
  int64_t rows;
  AdamWSettings settings;
};

// Advances the step counts and updates every row. All gradients are first multiplied with `grad_coefficient`.
void adamw(const TensorTable& table, const std::vector<AdamWGroup>& groups, double grad_coefficient,
           double ema_decay);

// out = residual + branch * layer_scale * mask[sample]; null residual or layer_scale leave their term out.
struct DropPath {
  Cell out, residual, branch, layer_scale, mask;
  const int64_t* rows;  // the sample of the branch that a sample of the result takes; null: its own
  int64_t samples, sample_numel, channels;
};
void drop_path(const DropPath& args);

// of_branch = grad * layer_scale * mask[sample], and layer scale's gradient: the sum of grad * mask[sample] * branch.
struct DropPathBackward {
  Cell of_branch, of_layer_scale, grad, branch, layer_scale, mask;
  const int64_t* rows;  // the sample of the gradient that a sample of the branch takes; null: its own
  int64_t samples, sample_numel, channels;
};
void drop_path_backward(const DropPathBackward& args);

}  // namespace trainops::cpu
