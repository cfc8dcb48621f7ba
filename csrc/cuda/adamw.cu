// AdamW with clipping, unscaling, skipping and EMA in one launch: the formulas are in math/adamw.h and math/ema.h.
// Reads grad, reads and writes param, exp_avg, exp_avg_sq (28 bytes per float32 element), max_exp_avg_sq with
// AMSGrad (8 more) and ema where there is one (8 more). Arithmetic in float32, or float64 for float64 parameters.
#include "ema.cuh"

namespace trainops::cuda {
namespace {

struct Decision {
  double coefficient;
  bool skips;
};

__device__ double real(int64_t word) { return bit_cast<double>(word); }

// Every block decides for itself, from what lies on the device.
__device__ Decision decide(const AdamWArgs& args, const int64_t* settings) {
  const double grad_scale = args.grad_scale == nullptr ? 1.0 : *args.grad_scale;
  const double norm = args.norm == nullptr ? 0.0 : *args.norm;
  const bool found_inf = args.found_inf != nullptr && *args.found_inf != 0.0f;
  return {step_coefficient(args.clips, norm, real(settings[kMaxNorm]), grad_scale),
          found_inf || (args.skip_nonfinite && !is_finite(norm))};
}

__device__ AdamWSettings settings_of(const int64_t* group) {
  double lr = real(group[kLR]);
  if (group[kLRFloat32] != 0) lr = *global<const float>(group[kLRFloat32]);
  if (group[kLRFloat64] != 0) lr = *global<const double>(group[kLRFloat64]);
  return {lr,
          real(group[kBeta1]),
          real(group[kBeta2]),
          real(group[kEps]),
          real(group[kWeightDecay]),
          group[kMaximize] != 0};
}

template <typename T>
__device__ void update_pack(const Cell (&cells)[kStep], const Place& place, const AdamWScalars<T>& scalars,
                            double ema_decay) {
  Raw raw[kStep];
#pragma unroll
  for (int column = 0; column < kStep; ++column) raw[column] = fetch<T>(cells[column], place);
  T param[kPack<T>], grad[kPack<T>], exp_avg[kPack<T>], exp_avg_sq[kPack<T>];
  unpack(raw[kParam], cells[kParam].dtype, param);
  unpack(raw[kGrad], cells[kGrad].dtype, grad);
  unpack(raw[kExpAvg], cells[kExpAvg].dtype, exp_avg);
  unpack(raw[kExpAvgSq], cells[kExpAvgSq].dtype, exp_avg_sq);
  if (cells[kMaxExpAvgSq].address != nullptr) {
    T max_exp_avg_sq[kPack<T>];
    unpack(raw[kMaxExpAvgSq], cells[kMaxExpAvgSq].dtype, max_exp_avg_sq);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      adamw_element<true>(param[j], grad[j], exp_avg[j], exp_avg_sq[j], &max_exp_avg_sq[j], scalars);
    }
    put<T>(cells[kMaxExpAvgSq], place, pack(max_exp_avg_sq, cells[kMaxExpAvgSq].dtype));
  } else {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      T* const none = nullptr;
      adamw_element<false>(param[j], grad[j], exp_avg[j], exp_avg_sq[j], none, scalars);
    }
  }
  put<T>(cells[kExpAvg], place, pack(exp_avg, cells[kExpAvg].dtype));
  put<T>(cells[kExpAvgSq], place, pack(exp_avg_sq, cells[kExpAvgSq].dtype));
  const Raw stored = pack(param, cells[kParam].dtype);
  put<T>(cells[kParam], place, stored);
  if (cells[kEMA].address == nullptr) return;
  put<T>(cells[kEMA], place, ema_pack<T>(raw[kEMA], cells[kEMA].dtype, stored, cells[kParam].dtype, ema_decay));
}

template <typename T>
__device__ void update_one(const Cell (&cells)[kStep], int64_t i, const AdamWScalars<T>& scalars, double ema_decay) {
  T param = load<T>(cells[kParam], i), exp_avg = load<T>(cells[kExpAvg], i);
  T exp_avg_sq = load<T>(cells[kExpAvgSq], i), largest = T(0);
  if (cells[kMaxExpAvgSq].address != nullptr) {
    largest = load<T>(cells[kMaxExpAvgSq], i);
    adamw_element<true>(param, load<T>(cells[kGrad], i), exp_avg, exp_avg_sq, &largest, scalars);
    store(cells[kMaxExpAvgSq], i, largest);
  } else {
    adamw_element<false>(param, load<T>(cells[kGrad], i), exp_avg, exp_avg_sq, &largest, scalars);
  }
  store(cells[kExpAvg], i, exp_avg);
  store(cells[kExpAvgSq], i, exp_avg_sq);
  store(cells[kParam], i, param);
  if (cells[kEMA].address != nullptr) ema_one(cells[kEMA], cells[kParam], i, ema_decay);
}

template <typename T>
__device__ void update_chunk(const Chunk& chunk, const AdamWScalars<double>& wide, double ema_decay) {
  const AdamWScalars<T> scalars(wide);
  Cell cells[kStep];
  Span<T> span(chunk.begin, chunk.end, kThreads);
#pragma unroll
  for (int column = 0; column < kStep; ++column) {
    cells[column] = chunk.row.cell(column);
    span.add(cells[column]);
  }
  span.close();
  for (int64_t tile = span.begin; tile < span.body; tile += kThreads * kPack<T>) {
    update_pack<T>(cells, Place(span, tile, threadIdx.x), scalars, ema_decay);
  }
  for (int64_t i = span.body + threadIdx.x; i < span.end; i += kThreads) {
    update_one<T>(cells, i, scalars, ema_decay);
  }
}

// The last act, of one block, when no other needs the old step counts any more.
__device__ void advance_steps(const DeviceTable& table) {
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

__global__ void __launch_bounds__(kThreads, 2) adamw_kernel(const __grid_constant__ AdamWArgs args) {
  __shared__ AdamWScalars<double> scalars;
  const int64_t* const settings = args.settings == nullptr ? args.inline_settings : args.settings;
  const Decision decision = decide(args, settings);
  const double ema_decay = real(settings[kDecay]);
  // Rows of a group nearly always share their step count, and with it two powers and a root.
  int64_t group = -1;
  double step = 0.0;
  const int64_t chunks = decision.skips ? 0 : args.table.chunk_count;
  // From the last chunk to the first: after a pass over the gradients for their norm, the last are still in the
  // cache.
  for (int64_t index = chunks - 1 - blockIdx.x; index >= 0; index -= gridDim.x) {
    const Chunk chunk = chunk_of(args.table, index);
    const int64_t its_group = chunk.row.words[kGroup];
    const double its_step = *static_cast<const float*>(chunk.row.address(kStep)) + 1.0f;
    if (its_group != group || its_step != step) {
      group = its_group;
      step = its_step;
      __syncthreads();
      if (threadIdx.x == 0) {
        const AdamWSettings of_group = settings_of(settings + kGroups + group * kGroupWords);
        scalars = AdamWScalars<double>(of_group, step, decision.coefficient);
      }
      __syncthreads();
    }
    if (chunk.row.cell(kParam).dtype == DType::float64) {
      update_chunk<double>(chunk, scalars, ema_decay);
    } else {
      update_chunk<float>(chunk, scalars, ema_decay);
    }
  }
  if (!is_last_block(args.counter)) return;
  if (!decision.skips) advance_steps(args.table);
  if (threadIdx.x == 0) {
    if (args.skip != nullptr) *args.skip = decision.skips;
    if (args.skipped_steps != nullptr && decision.skips) *args.skipped_steps += 1;
  }
}

}  // namespace

void adamw(const AdamWArgs& args, const Queue& queue) {
  launch(adamw_kernel, "adamw", args.table.chunk_count, queue, args);
}

}  // namespace trainops::cuda
