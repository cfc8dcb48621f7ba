// A step of any rule (math/adamw.h) with clipping, unscaling, skipping and averages (math/ema.h), in one launch:
// every column is read and, where it is written, written once. With AdamW in float32, that is 28 bytes per element, 8
// more with AMSGrad and 8 more with each average. (Those beyond the first read the weights of a chunk again, from a
// cache.) A moment in 8 bits has 2.06 in place of 8. Arithmetic in float32, or float64 for float64 parameters.
#include "../core/rules.h"
#include "cells.cuh"
#include "control.cuh"

namespace trainops::cuda {
namespace {

template <bool is_special, typename Rule, typename T>
__device__ void update_pack(const Row& row, const Cells<Rule>& cells, const LaneOffset& offset,
                            const typename Rule::template Scalars<T>& scalars, const SharedDecay& ema_decay,
                            const RowRandom& random) {
  constexpr int count = Cells<Rule>::count;
  Raw raw[count];
#pragma unroll
  for (int column = 0; column < count; ++column) {
    if (column == kStep || column == kAverage) continue;
    raw[column] = column < kState ? fetch<T>(cells.at[column], offset)
                                  : fetch_state<is_special, T>(cells.at[column], row.numel(), offset);
  }
  T param[kPack<T>], grad[kPack<T>];
  const Weight weight = cells.weight();
  unpack(raw[kParam], raw[kMaster], weight, param);
  unpack(raw[kGrad], cells.at[kGrad].dtype, grad);
  Rule::template with_formula<false>(cells.states(), scalars, [&](auto formula) {
    constexpr int states = decltype(formula)::states;
    T state[kLength<states>][kPack<T>];
#pragma unroll
    for (int i = 0; i < states; ++i) {
      unpack_state<is_special, T>(raw[kState + i], cells.at[kState + i].dtype, cells.is_signed(i), state[i]);
    }
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      T own[kLength<states>];
#pragma unroll
      for (int i = 0; i < states; ++i) own[i] = state[i][j];
      formula(param[j], grad[j], own, scalars);
#pragma unroll
      for (int i = 0; i < states; ++i) state[i][j] = own[i];
    }
#pragma unroll
    for (int i = 0; i < states; ++i) {
      put_state<is_special, T>(cells.at[kState + i], row.numel(), offset, cells.is_signed(i), state[i], random);
    }
  });
  // Only now, when most registers are free again: all columns at once would spill some. That the reads do not all
  // overlap costs nothing: with two blocks, a multiprocessor of an H100 still has over 100 KB on their way.
  const Cell average = average_of<is_special>(row, ema_decay);
  raw[kAverage] = fetch<T>(average, offset);
  // The average follows the weight as it is stored: rounded, or in full where there is a master.
  Raw followed = pack_param<is_special>(param, with_random<is_special>(weight, random), offset.first);
  DType followed_dtype = weight.param.dtype;
  put<T>(weight.param, offset, followed);
  if constexpr (sizeof(T) == 4) {
    if (weight.has_master()) {
      put<T>(weight.master, offset, pack_master(param, weight));
      followed_dtype = DType::float32;
      followed = pack(param, followed_dtype);
    }
  }
  if (average.address == nullptr) return;
  const auto ema_weight = ema_decay.template of_loop<T>();
  put<T>(average, offset,
         ema_pack<is_special>(raw[kAverage], average, offset.first, followed, followed_dtype, ema_weight));
}

// `exists`: false for a lane that has no element, and helps to find scales.
template <bool is_special, typename Rule, typename T>
__device__ void update_one(const Row& row, const Cells<Rule>& cells, int64_t i, bool exists,
                           const typename Rule::template Scalars<T>& scalars, const SharedDecay& ema_decay,
                           const RowRandom& random) {
  const Weight weight = cells.weight();
  T param = exists ? load<T>(weight, i) : T(0);
  const T grad = exists ? load<T>(cells.at[kGrad], i) : T(0);
  Rule::template with_formula<false>(cells.states(), scalars, [&](auto formula) {
    constexpr int states = decltype(formula)::states;
    T state[kLength<states>];
#pragma unroll
    for (int k = 0; k < states; ++k) {
      state[k] = load_state<is_special, T>(cells.at[kState + k], row.numel(), i, cells.is_signed(k), exists);
    }
    formula(param, grad, state, scalars);
#pragma unroll
    for (int k = 0; k < states; ++k) {
      store_state<is_special, T>(cells.at[kState + k], row.numel(), i, cells.is_signed(k), exists, state[k], random);
    }
  });
  if (!exists) return;
  store<is_special>(with_random<is_special>(weight, random), i, param);
  const Cell average = average_of<is_special>(row, ema_decay);
  if (average.address != nullptr) ema_one<is_special>(average, weight, i, ema_decay.decay);
}

template <bool is_special, typename Rule, typename T>
__device__ void update_chunk(const Chunk& chunk, const typename Rule::template Scalars<double>& wide,
                             const SharedDecay& ema_decay, const RowRandom& random) {
  const auto scalars = rounded<Rule, T>(wide);
  const Cells<Rule> cells(chunk.row);
  VectorRange<T> range(chunk.begin, chunk.end, kThreads);
#pragma unroll
  for (int column = 0; column < Cells<Rule>::count; ++column) {
    if (column == kStep) continue;
    range.template add<is_special>(column == kAverage ? chunk.row.cell(kAverage) : cells.at[column]);
  }
  // Beside rows that are special, packs of float64 would need more registers than there are.
  range.close(!is_special || sizeof(T) == 4);
  for (int64_t tile = range.begin; tile < range.body; tile += kThreads * kPack<T>) {
    const LaneOffset offset(range, tile, threadIdx.x);
    update_pack<is_special, Rule, T>(chunk.row, cells, offset, scalars, ema_decay, random);
  }
  // Where a warp looks for scales, lanes behind the last element take part.
  constexpr bool may_have_codes = kMayHaveCodes<is_special, T>;
  const int64_t end = may_have_codes ? range.end + threadIdx.x % kWarp : range.end;
  for (int64_t i = range.body + threadIdx.x; i < end; i += kThreads) {
    const bool exists = !may_have_codes || i < range.end;
    update_one<is_special, Rule, T>(chunk.row, cells, i, exists, scalars, ema_decay, random);
  }
}

// A gradient without elements has a type.
__device__ inline bool is_buffer(const Row& row) { return row.cell(kGrad).dtype == DType::none; }

// Moves the averages of a chunk that update_chunk does not, or copies what they follow.
template <bool is_special, typename Rule>
__device__ void move_averages(const Chunk& chunk, int count, const SharedDecay* ema_decays) {
  const Weight weight{chunk.row.cell(kParam), chunk.row.cell(kMaster)};
#pragma unroll 1
  for (int i = is_buffer(chunk.row) ? 0 : 1; i < count; ++i) {
    Cell average = chunk.row.cell(column_of_average<Rule>(i));
    if (average.address == nullptr) continue;
    if constexpr (is_special) average.random = chunk.row.random(kAveragePlace + i, ema_decays[i].seed);
    if (weight.param.dtype == DType::byte) {
      copy_chunk(average, weight.param, chunk);
    } else {
      move_chunk<is_special>(average, weight, chunk, ema_decays[i].decay);
    }
  }
}

// The scalars of a row, and what they depend on.
template <typename Rule>
struct RowScalars {
  int64_t group;
  double step;
  typename Rule::template Scalars<double> scalars;
};

// What all rows depend on.
struct ForRows {
  const int64_t* words;
  double coefficient;
};

// `is_special`: whether some of the table is rounded stochastically, or holds codes.
template <typename Rule, bool is_special>
__global__ void __launch_bounds__(kThreads, 2) update_kernel(const __grid_constant__ UpdateArgs args) {
  __shared__ RowScalars<Rule> of_slots[2];
  __shared__ RowRandom randoms[is_special ? 2 : 1];
  __shared__ ForRows for_rows;
  __shared__ SharedDecay ema_decays[kMaxAverages];
  const int64_t* const words = args.words == nullptr ? args.inline_words : args.words;
  const Decision decision = decide_step(args, words);
  if (decision.skips) return skip_step(args);
  if (threadIdx.x < kMaxAverages) {
    const int i = threadIdx.x;
    ema_decays[i].set(real(words[kEMADecay + i]), static_cast<uint32_t>(words[kEMASeed + i]));
  }
  if (threadIdx.x == kThreads - kWarp) {  // the one that prepares rows: it alone reads this
    for_rows = {words, decision.coefficient};
    of_slots[1].group = -1;  // which the first row is compared with
    of_slots[1].step = 0.0;
  }
  // One thread evaluates two powers and a root while the others work. Rows of a group nearly always share their step
  // count, and with it these. Where they do not, it does so for every row that the block meets: with AdamW some 500
  // instructions, 170 of them in float64 (sm_90), which only chunks of little work do not hide.
  const auto prepare = [&](const Row& row, int slot) {
    __syncwarp();
    if (threadIdx.x % kWarp != 0 || is_buffer(row)) return;  // after one, all that are drawn are buffers
    const int64_t group = row.words[kGroup];
    const double step = *static_cast<const float*>(row.address(kStep)) + 1.0f;
    const RowScalars<Rule>& last = of_slots[slot ^ 1];
    if (last.group == group && last.step == step) {
      of_slots[slot] = last;
    } else {
      of_slots[slot] = {group, step,
                        Rule::scalars(settings_of<Rule>(for_rows.words, group), step, for_rows.coefficient)};
    }
    if constexpr (is_special) {
      const uint32_t seed = static_cast<uint32_t>(for_rows.words[kSeed]);
      const Random param = {random_key(seed, row.words[kFirstPlace], step),
                            static_cast<uint32_t>(row.words[kOrigin])};
      randoms[slot] = {param, random_of_codes(param)};
    }
  };
  // Backwards: after a pass over the gradients for their norm, the last are still in the cache.
  ChunkQueue queue(args.table, args.table.all_chunks, &args.counters->chunks, true, prepare);
  for (Chunk chunk; queue.next(chunk);) {
    const auto& scalars = of_slots[chunk.slot].scalars;
    const RowRandom& random = randoms[is_special ? chunk.slot : 0];
    const bool is_updated = !is_buffer(chunk.row);
    if (is_updated && chunk.row.cell(kParam).dtype == DType::float64) {
      update_chunk<is_special, Rule, double>(chunk, scalars, ema_decays[0], random);
    } else if (is_updated) {
      update_chunk<is_special, Rule, float>(chunk, scalars, ema_decays[0], random);
    }
    const int averages = averages_in<Rule>(args.table.row_words - kAddresses);
    if (averages == 1 && args.table.all_chunks == args.table.chunk_count) continue;
    __syncthreads();  // other threads may have written the weights
    move_averages<is_special, Rule>(queue.current(), averages, ema_decays);
  }
  finish_step(args);
}

}  // namespace

void update(const std::string& rule, const UpdateArgs& args, const Queue& queue) {
  with_rule(rule, [&](auto its) {
    using Rule = decltype(its);
    const auto kernel = args.table.is_special ? update_kernel<Rule, true> : update_kernel<Rule, false>;
    launch(kernel, rule.c_str(), args.table.all_chunks, queue, args);
  });
}

}  // namespace trainops::cuda
