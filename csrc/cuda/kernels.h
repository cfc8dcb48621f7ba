// The CUDA kernels, as the bindings call them. A function makes one launch on a stream of a device unless it says
// otherwise, and waits for nothing. It throws a std::runtime_error that names the kernel if the launch fails, and a
// std::invalid_argument for an unknown rule or statistic. Addresses are device addresses. Null means absent.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../core/drop_path.h"
#include "../core/schema.h"
#include "../core/table.h"
#include "../math/control.h"
#include "../math/guard.h"

// The type of device that these kernels run on, as DLPack numbers them. (Tests run them on the CPU.)
#ifndef TRAINOPS_DEVICE_TYPE
#define TRAINOPS_DEVICE_TYPE 2
#endif

namespace trainops::cuda {

// Elements of a chunk, the unit of a block's work. Also the unit of the partial results of a statistic.
// benchmarks/simulate_balance.py shows why it is of this size.
constexpr int64_t kChunkNumel = 4096;

// The names of the devices. `error` says why they cannot be counted, if so. Makes no context.
struct Devices {
  std::vector<std::string> names;
  std::string error;
};
Devices devices();

// Why kernels do not load on a device; empty if they do. Makes a context there, as the first launch would.
std::string refusal(int device);

// The device and the stream that a kernel is launched on.
struct Queue {
  int device;
  void* stream;
};

// A table in the device's memory (core/device_words.h). Its first `whole_chunks` chunks have kChunkNumel elements. Of
// its `all_chunks`, those of buffers follow the first `chunk_count`; their rows follow the first `row_count`.
// `is_special`: whether some of it is rounded stochastically, or holds codes.
struct DeviceTable {
  const int64_t* rows;
  const int64_t* chunks;
  int64_t row_count, chunk_count, all_chunks, whole_chunks, row_words;
  bool is_special;
};

// Counters of a launch. All must be 0 on entry, and kernels reset them.
struct Counters {
  unsigned chunks;  // drawn from the queue
  unsigned blocks;  // that have ended
};

// Those of a reduction.
struct ReduceCounters : Counters {
  unsigned rows[1];  // one for each row: its chunks that are done
};

// The results of a statistic (math/statistics.h) of each row of a column and of all of them, divided by `grad_scale`.
struct ReduceArgs {
  DeviceTable table;
  int64_t column;
  const float* grad_scale;
  ReduceCounters* counters;
  void* partials;   // room for a State of the statistic per chunk (math/statistics.h)
  double* total;    // the first result
  void* total_out;  // all results, and the rows', as float or double
  void* rows_out;
  unsigned long long* histogram;  // or null; of Moments: kExponentBins counts for each row, to which are added
  bool out_is_double;
  Guard* guard;  // or null; of L2Norm: judges the step, which `found_inf` may skip
  const float* found_inf;
};
void reduce(const std::string& statistic, const ReduceArgs& args, const Queue& queue);

// Judges a step whose norm is known already.
struct JudgeArgs {
  Guard* guard;
  const double* norm;
  const float* found_inf;  // or null
};
void judge(const JudgeArgs& args, const Queue& queue);

// Multiplies by a float or double that lies on the device; 1 leaves the tensors unread.
void scale(const DeviceTable& table, const Cell& coefficient, Counters* counters, const Queue& queue);
void clamp(const DeviceTable& table, double bound, Counters* counters, const Queue& queue);

// A true `skip` leaves the averages alone.
// `seed`: of averages that are rounded stochastically.
void ema(const DeviceTable& table, double decay, uint32_t seed, const bool* skip, Counters* counters,
         const Queue& queue);

// Step words (core/schema.h) of a few groups travel with the launch; those of many have an address.
constexpr int kInlineWords = 256;

// A step of a rule with clipping, unscaling, skipping and averages. Advances the step counts after the last block.
struct UpdateArgs {
  DeviceTable table;
  const int64_t* words;
  int64_t inline_words[kInlineWords];
  const double* norm;
  const float* grad_scale;
  const float* found_inf;
  bool clips, skip_nonfinite;
  const Guard* guard;      // which has judged the step
  bool* skip;              // written: whether the step was skipped
  int64_t* skipped_steps;  // incremented if the step is skipped
  Counters* counters;
};
void update(const std::string& rule, const UpdateArgs& args, const Queue& queue);

void drop_path(const DropPath& args, void* stream);

// Two launches. `partials`: room for drop_path_partials(...) sums.
struct DropPathBackwardArgs : DropPathBackward {
  double* partials;
};
void drop_path_backward(const DropPathBackwardArgs& args, void* stream);

// Without a launch.
int64_t drop_path_partials(int64_t samples, int64_t sample_numel, int64_t channels);

}  // namespace trainops::cuda
