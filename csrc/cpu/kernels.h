// The CPU kernels, as the module calls them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../core/drop_path.h"
#include "../math/control.h"
#include "chunks.h"

namespace trainops::cpu {

// The instruction set of the kernels, by the loader's rule (parallel.h).
const char* instruction_set();

// The results of a statistic of each row of a column, one row after the other, and the first of all of them together
// as one vector.
struct Result {
  std::vector<double> rows;
  double total;
};
Result reduce(const std::string& statistic, const Table& table, const Chunks& chunks, int64_t column);

// Adds the elements of each row to its kExponentBins counts (math/moments.h).
void count_exponents(const Table& table, const Chunks& chunks, int64_t column, int64_t* counts);

// The settings of each group of rows, as numbers in the order of the rule's names.
struct GroupSettings {
  const std::vector<int64_t>& rows;  // how many each group has
  const std::vector<std::vector<double>>& numbers;
};

// Advances the step counts, then updates every row by a rule and moves its averages, tile by tile in one pass. The
// rule takes gradients times `grad_coefficient`; the gradients in memory are not changed. Then the averages of
// buffers follow. `chunks`: those of the rows that have a gradient.
void update(const std::string& rule, const Table& table, const Chunks& chunks, const GroupSettings& groups,
            double grad_coefficient, const std::vector<double>& ema_decays, const Seeds& seeds);

// `seed`: of averages that are rounded stochastically.
void ema(const Table& table, double decay, uint32_t seed);
void scale(const Table& table, double coefficient);
void clamp(const Table& table, double bound);

void drop_path(const DropPath& args);
void drop_path_backward(const DropPathBackward& args);

// Divides a mask of one value per sample, 0 or 1, by `keep_prob`.
void scale_kept(const Cell& mask, int64_t samples, double keep_prob);

// Copies every sample whose mask is 0 from `residual` to `out`, which has the same dtype.
struct RestoreDropped {
  Cell out, residual, mask;
  int64_t samples, sample_numel;
};
void restore_dropped(const RestoreDropped& args);

}  // namespace trainops::cpu
