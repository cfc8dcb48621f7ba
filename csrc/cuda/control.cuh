// Controls a step of any rule by numbers that lie on the device: the formulas are in math/control.h.
#pragma once

#include "../math/rule.h"
#include "../math/storage.h"
#include "common.cuh"

namespace trainops::cuda {

__device__ inline double real(int64_t word) { return bit_cast<double>(word); }

// A setting as a number, wherever it lies.
__device__ inline double setting(const int64_t* words) {
  const int64_t value = words[kValue];
  if (words[kForm] == kFloatAddress) return *global<const float>(value);
  if (words[kForm] == kDoubleAddress) return *global<const double>(value);
  return real(value);
}

// Every block evaluates this, with the same result.
__device__ inline Decision decide_step(const UpdateArgs& args, const int64_t* words) {
  Control control;
  control.clips = args.clips;
  control.skip_nonfinite = args.skip_nonfinite;
  control.max_norm = setting(words + kMaxNorm);
  const double norm = args.norm == nullptr ? 0.0 : *args.norm;
  const double grad_scale = args.grad_scale == nullptr ? 1.0 : *args.grad_scale;
  const bool found_inf = args.found_inf != nullptr && *args.found_inf != 0.0f;
  Decision decision = decide(control, norm, grad_scale, found_inf);
  decision.skips |= args.guard != nullptr && args.guard->verdict != 0.0;
  return decision;
}

template <typename Rule>
__device__ typename Rule::Settings settings_of(const int64_t* words, int64_t group) {
  const int64_t* const own = words + kGroups + group * kSettings<Rule> * kSettingWords;
  double numbers[kSettings<Rule>];
#pragma unroll
  for (int i = 0; i < kSettings<Rule>; ++i) numbers[i] = setting(own + i * kSettingWords);
  return settings_from<Rule>(numbers);
}

// Advances the step counts. One block does this, after the others have read the old ones.
__device__ inline void advance_steps(const DeviceTable& table) {
  constexpr int ahead = 4;
  for (int64_t base = threadIdx.x; base < table.row_count; base += ahead * kThreads) {
    float* addresses[ahead];
    float steps[ahead] = {};
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      const int64_t row = base + k * kThreads;
      addresses[k] = row < table.row_count ? static_cast<float*>(row_of(table, row).address(kStep)) : nullptr;
    }
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (addresses[k] != nullptr) steps[k] = *addresses[k];
    }
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (addresses[k] != nullptr) *addresses[k] = steps[k] + 1.0f;
    }
  }
}

// Ends a step that was taken: the last block advances the step counts.
__device__ inline void finish_step(const UpdateArgs& args) {
  if (!is_last_block(args.counters)) return;
  advance_steps(args.table);
  if (threadIdx.x == 0 && args.skip != nullptr) *args.skip = false;
}

// Ends a step that is skipped. Nobody waits: no block has written what another one reads.
__device__ inline void skip_step(const UpdateArgs& args) {
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  if (args.skip != nullptr) *args.skip = true;
  if (args.skipped_steps != nullptr) *args.skipped_steps += 1;
}

}  // namespace trainops::cuda
