// The tensors of a step's row.
#pragma once

#include "codes.cuh"
#include "ema.cuh"

namespace trainops::cuda {

// A row's cells by column. Those of the step count and of the average stay empty.
template <typename Rule>
struct Cells {
  static constexpr int count = kState + Rule::kStates;
  Cell at[count];

  __device__ explicit Cells(const Row& row) {
#pragma unroll
    for (int column = 0; column < count; ++column) {
      if (column != kStep && column != kAverage) at[column] = row.cell(column);
    }
  }

  __device__ Weight weight() const { return {at[kParam], at[kMaster]}; }

  // The number of state columns that the row has. Optional ones are last.
  __device__ int states() const {
    int states = 0;
#pragma unroll
    for (int i = 0; i < Rule::kStates; ++i) states += at[kState + i].address != nullptr;
    return states;
  }

  // Whether codes of a state have a sign.
  __device__ static bool is_signed(int i) { return kSignedStates<Rule> >> i & 1u; }
};

template <bool is_special>
__device__ Weight with_random(Weight weight, const RowRandom& random) {
  if constexpr (is_special) weight.param.random = read_again(random.param);
  return weight;
}

// The first average of a row.
template <bool is_special>
__device__ Cell average_of(const Row& row, const SharedDecay& ema_decay) {
  Cell average = row.cell(kAverage);
  if constexpr (is_special) average.random = row.random(kAveragePlace, ema_decay.seed);
  return average;
}

}  // namespace trainops::cuda
