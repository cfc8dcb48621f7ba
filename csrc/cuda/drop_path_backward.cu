// The derivative of DropPath: the formula is in math/drop_path.h.
//
//   of_branch      = grad * layer_scale * mask[sample]
//   of_layer_scale = sum over samples and positions of grad * mask[sample] * branch
//
// Per element: reads grad and branch, writes of_branch (12 bytes in float32). A dropped sample's branch is not read.
// Arithmetic as forward's. Sums in runs of a few elements in its type, which are joined in float64, in two launches
// and an order that depends on the sizes alone.
#include "drop_path.cuh"

namespace trainops::cuda {
namespace {

// A row is one position of one sample. Rows are added up in groups, those of a group by one block: how many
// there are depends on the sizes alone.
constexpr int64_t kLeastGroup = 64, kMostGroups = 512;

// Elements that a thread adds up before it joins them in float64.
constexpr int kRun = 8;

__host__ __device__ inline int64_t rows_of_group(int64_t rows) {
  const int64_t least = (rows + kMostGroups - 1) / kMostGroups;
  return least > kLeastGroup ? least : kLeastGroup;
}

__host__ __device__ inline int64_t count_groups(int64_t rows) {
  return (rows + rows_of_group(rows) - 1) / rows_of_group(rows);
}

// Columns that a warp takes at a time: packs, or single elements.
template <typename T, bool packs>
constexpr int kColumns = kWarp * (packs ? kPack<T> : 1);

// A lane's elements of one row and of layer scale: a pack, or without `packs` a single element.
template <typename T, bool packs>
struct Lane {
  static constexpr int size = packs ? kPack<T> : 1;
  LaneOffset offset;

  __device__ LaneOffset in_row(int64_t row_begin, bool wanted) const {
    LaneOffset moved = offset;
    moved.first += row_begin;
    moved.second += row_begin;
    moved.has_first &= wanted;
    moved.has_second &= wanted;
    return moved;
  }

  __device__ int64_t column(int j) const { return j < kHalf<T> ? offset.first + j : offset.second + j - kHalf<T>; }

  __device__ void read(const Cell& cell, const LaneOffset& where, T (&x)[size]) const {
    if constexpr (packs) {
      unpack(fetch<T>(cell, where), cell.dtype, x);
    } else {
      x[0] = where.has_first ? load_operand<T>(cell, where.first) : T(0);
    }
  }

  __device__ void write(const Cell& cell, const LaneOffset& where, const T (&x)[size]) const {
    if constexpr (packs) {
      put<T>(cell, where, pack(x, cell.dtype));
    } else if (where.has_first) {
      store(cell, where.first, x[0]);
    }
  }
};

// The block's share of one group of rows: kColumns columns from `begin` on.
template <typename T, bool packs>
__device__ void backward_tile(const DropPathBackwardArgs& args, int64_t group, int64_t begin) {
  constexpr int size = Lane<T, packs>::size;
  __shared__ double totals_of_warps[kWarps][kColumns<T, packs>];
  const int64_t channels = args.channels, sample_rows = args.sample_numel / channels;
  const int64_t rows = args.samples * sample_rows, group_rows = rows_of_group(rows);
  const int64_t end_row = group_rows * (group + 1) < rows ? group_rows * (group + 1) : rows;
  const int64_t end = begin + kColumns<T, packs> < channels ? begin + kColumns<T, packs> : channels;
  VectorRange<T> range(begin, end, kWarp);
  for (const Cell* cell : {&args.of_branch, &args.grad, &args.branch, &args.layer_scale}) range.add(*cell);
  range.close(true);
  const int warp = threadIdx.x / kWarp, lane_index = threadIdx.x % kWarp;
  Lane<T, packs> lane{LaneOffset(range, begin, lane_index)};
  if (!packs) {
    lane.offset.first = begin + lane_index;
    lane.offset.has_first = lane.offset.first < end;
  }

  T layer_scale[size];
  lane.read(args.layer_scale, lane.offset, layer_scale);
  const auto total_of = [&](int j) -> double& { return totals_of_warps[warp][lane.column(j) - begin]; };
#pragma unroll
  for (int j = 0; j < size; ++j) {
    if (lane.column(j) < end) total_of(j) = 0.0;
  }
  for (int64_t first = group_rows * group + warp; first < end_row; first += kRun * kWarps) {
    const int64_t end_of_run = first + kRun * kWarps < end_row ? first + kRun * kWarps : end_row;
    T run[size] = {};
#pragma unroll 1
    for (int64_t row = first; row < end_of_run; row += kWarps) {
      const int64_t sample = row / sample_rows;
      const T mask = load_operand<T>(args.mask, sample);
      const LaneOffset offset = lane.in_row(row * channels, true);
      T grad[size], branch[size];
      const int64_t grad_offset = row * channels + sample_offset(args.rows, sample, args.sample_numel);
      lane.read(args.grad, lane.in_row(grad_offset, true), grad);
      lane.read(args.branch, lane.in_row(row * channels, mask != T(0)), branch);
      with_rounding<T>(args.mask.dtype, [&](auto round) {
#pragma unroll
        for (int j = 0; j < size; ++j) {
          run[j] += round(grad[j]) * mask * branch[j];
          grad[j] = term(grad[j], layer_scale[j], mask, round);
        }
      });
      lane.write(args.of_branch, offset, grad);
    }
#pragma unroll
    for (int j = 0; j < size; ++j) {
      if (lane.column(j) < end) total_of(j) += static_cast<double>(run[j]);
    }
  }
  __syncthreads();
  for (int64_t column = begin + threadIdx.x; column < end; column += kThreads) {
    double total = 0.0;
    for (int i = 0; i < kWarps; ++i) total += totals_of_warps[i][column - begin];
    args.partials[group * channels + column] = total;
  }
  __syncthreads();
}

template <typename T, bool packs>
__global__ void __launch_bounds__(kThreads, packs && sizeof(T) == 4 ? 2 : 4)
    backward_kernel(const __grid_constant__ DropPathBackwardArgs args) {
  const int64_t tiles = (args.channels + kColumns<T, packs> - 1) / kColumns<T, packs>;
  const int64_t groups = count_groups(args.samples * (args.sample_numel / args.channels));
  for (int64_t index = blockIdx.x; index < groups * tiles; index += gridDim.x) {
    backward_tile<T, packs>(args, index / tiles, index % tiles * kColumns<T, packs>);
  }
}

// Adds up the groups: each warp every eighth of them, for 32 channels.
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ DropPathBackwardArgs args) {
  __shared__ double totals_of_warps[kWarps][kWarp];
  const int64_t groups = count_groups(args.samples * (args.sample_numel / args.channels));
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t begin = blockIdx.x * kWarp; begin < args.channels; begin += gridDim.x * kWarp) {
    const int64_t channel = begin + lane;
    double total = 0.0;
    if (channel < args.channels) {
#pragma unroll 4
      for (int64_t group = warp; group < groups; group += kWarps) {
        total += args.partials[group * args.channels + channel];
      }
    }
    totals_of_warps[warp][lane] = total;
    __syncthreads();
    if (warp == 0 && channel < args.channels) {
      for (int i = 1; i < kWarps; ++i) total += totals_of_warps[i][lane];
      store(args.of_layer_scale, channel, total);
    }
    __syncthreads();
  }
}

int64_t rows_of(const DropPathBackwardArgs& args) { return args.samples * (args.sample_numel / args.channels); }

template <typename T>
void launch_backward(const DropPathBackwardArgs& args, const Queue& queue) {
  bool packs = args.channels % kPack<T> == 0;
  for (const Cell* cell : {&args.of_branch, &args.grad, &args.branch, &args.layer_scale}) {
    packs &= reinterpret_cast<uintptr_t>(cell->address) % 16 == 0;
    packs &= (cell->dtype == DType::float64) == (sizeof(T) == 8);
  }
  const int columns = packs ? kColumns<T, true> : kColumns<T, false>;
  const int64_t tiles = (args.channels + columns - 1) / columns;
  launch(packs ? backward_kernel<T, true> : backward_kernel<T, false>, "drop_path_backward",
         count_groups(rows_of(args)) * tiles, queue, args);
}

}  // namespace

int64_t drop_path_partials(int64_t samples, int64_t sample_numel, int64_t channels) {
  return count_groups(samples * (sample_numel / channels)) * channels;
}

void drop_path_backward(const DropPathBackwardArgs& args, void* stream) {
  const Queue queue{args.device, stream};
  if (args.branch.dtype == DType::float64) {
    launch_backward<double>(args, queue);
  } else {
    launch_backward<float>(args, queue);
  }
  launch(finish_kernel, "drop_path_backward_finish", (args.channels + kWarp - 1) / kWarp, queue, args);
}

}  // namespace trainops::cuda
