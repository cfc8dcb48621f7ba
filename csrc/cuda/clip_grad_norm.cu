// Gradient norm, scaling and clamping: the formulas are in math/clip_grad_norm.h.
// The norm reads 4 bytes per float32 element, in one launch; scaling and clamping read and write them. Sums are
// accumulated in float64 whatever the type, in an order that depends on the sizes alone.
#include "packs.cuh"

namespace trainops::cuda {
namespace {

// Packs of a gradient that a thread has on the way at a time.
constexpr int kAhead = 2;

// A thread's share of a chunk. An unaligned row is added up in the same order as an aligned one.
template <Norm norm, typename T>
__device__ double sum_of_thread(const Cell& cell, const Chunk& chunk) {
  constexpr int tile_numel = kThreads * kPack<T>;
  Span<T> span(chunk.begin, chunk.end, kThreads);
  span.add(cell);
  span.close();
  double total = 0.0;
  for (int64_t tile = span.begin; tile < span.body; tile += kAhead * tile_numel) {
    Raw raw[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      raw[i] = fetch<T>(cell, Place(span, tile + i * tile_numel, threadIdx.x));
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      T x[kPack<T>];
      unpack(raw[i], cell.dtype, x);  // zeros, which add nothing, where there are no elements
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) total = accumulate<norm>(total, static_cast<double>(x[j]));
    }
  }
  if (span.body == span.end) return total;
  for (int64_t tile = span.begin + (span.body - span.begin) / tile_numel * tile_numel; tile < span.end;
       tile += tile_numel) {
#pragma unroll 1
    for (int j = 0; j < kPack<T>; ++j) {
      const int64_t i = tile + threadIdx.x * span.stride + (j < kHalf<T> ? j : span.second + j - kHalf<T>);
      if (i >= span.body && i < span.end) total = accumulate<norm>(total, load<double>(cell, i));
    }
  }
  return total;
}

// Joins what the lanes of a warp have; the first lane's result counts.
template <Norm norm>
__device__ double join_warp(double total) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    total = join<norm>(total, __shfl_down_sync(kAllLanes, total, distance));
  }
  return total;
}

// Joins what the threads of the block have; all get the result. `shared`: one for each warp, free again when all
// threads have passed another barrier.
template <Norm norm>
__device__ double join_block(double total, double* shared) {
  total = join_warp<norm>(total);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = total;
  __syncthreads();
  total = shared[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) total = join<norm>(total, shared[warp]);
  return total;
}

// Every `step`-th partial sum, several at a time.
template <Norm norm>
__device__ double join_partials(const double* partials, int64_t begin, int64_t count, int step) {
  constexpr int ahead = 4;
  double totals[ahead] = {};
#pragma unroll 1
  for (int64_t i = begin; i < count; i += ahead * step) {
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (i + k * step < count) totals[k] = join<norm>(totals[k], __ldcg(partials + i + k * step));
    }
  }
  return join<norm>(join<norm>(totals[0], totals[1]), join<norm>(totals[2], totals[3]));
}

template <Norm norm>
__device__ double root(double total) {
  return norm == Norm::l2 ? square_root(total) : total;
}

__device__ void write(void* out, bool is_double, int64_t i, double x) {
  if (is_double) {
    static_cast<double*>(out)[i] = x;
  } else {
    static_cast<float*>(out)[i] = static_cast<float>(x);
  }
}

// Rows of more chunks than these are added up by a warp, or by the whole block.
constexpr int64_t kOfThread = 8, kOfWarp = 2048;

// The last act, of one block: each thread has a row at a time, and is helped with long ones.
template <Norm norm>
__device__ void finish_norms(const NormsArgs& args) {
  __shared__ double shared[2][kWarps];
  __shared__ int64_t counts[kThreads];
  const int lane = threadIdx.x % kWarp;
  const double grad_scale = args.grad_scale == nullptr ? 1.0 : *args.grad_scale;
  double total = 0.0;
  for (int64_t base = 0; base < args.table.row_count; base += kThreads) {
    const int64_t row = base + threadIdx.x;
    int64_t first = 0, count = 0;
    if (row < args.table.row_count) {
      const Row words = row_of(args.table, row);
      first = words.words[kFirstChunk];
      count = (words.numel() + kChunkNumel - 1) / kChunkNumel;
    }
    double sum = count <= kOfThread ? join_partials<norm>(args.partials + first, 0, count, 1) : 0.0;

    unsigned helped = __ballot_sync(kAllLanes, count > kOfThread && count <= kOfWarp);
    for (; helped != 0; helped &= helped - 1) {
      const int owner = __ffs(helped) - 1;
      const double* const partials = args.partials + __shfl_sync(kAllLanes, first, owner);
      const int64_t of_owner = __shfl_sync(kAllLanes, count, owner);
      const double joined = join_warp<norm>(join_partials<norm>(partials, lane, of_owner, kWarp));
      const double result = __shfl_sync(kAllLanes, joined, 0);
      if (lane == owner) sum = result;
    }

    if (__syncthreads_or(count > kOfWarp)) {
      counts[threadIdx.x] = count;
      __syncthreads();
      for (int owner = 0; owner < kThreads; ++owner) {
        if (counts[owner] <= kOfWarp) continue;
        const double* const partials = args.partials + row_of(args.table, base + owner).words[kFirstChunk];
        const double joined = join_partials<norm>(partials, threadIdx.x, counts[owner], kThreads);
        const double result = join_block<norm>(joined, shared[0]);
        if (static_cast<int>(threadIdx.x) == owner) sum = result;
        __syncthreads();
      }
    }

    if (row < args.table.row_count) {
      write(args.norms_out, args.out_is_double, row, root<norm>(sum) / grad_scale);
      total = join<norm>(total, sum);
    }
  }
  total = root<norm>(join_block<norm>(total, shared[1])) / grad_scale;
  if (threadIdx.x == 0) {
    *args.total = total;
    write(args.total_out, args.out_is_double, 0, total);
  }
}

template <Norm norm>
__global__ void __launch_bounds__(kThreads, 4) norms_kernel(const __grid_constant__ NormsArgs args) {
  __shared__ double shared[2][kWarps];
  int turn = 0;
  for (int64_t index = blockIdx.x; index < args.table.chunk_count; index += gridDim.x, turn ^= 1) {
    const Chunk chunk = chunk_of(args.table, index);
    const Cell cell = chunk.row.cell(static_cast<int>(args.column));
    const double of_thread = cell.dtype == DType::float64 ? sum_of_thread<norm, double>(cell, chunk)
                                                          : sum_of_thread<norm, float>(cell, chunk);
    const double total = join_block<norm>(of_thread, shared[turn]);
    if (threadIdx.x == 0) args.partials[index] = total;
  }
  if (is_last_block(args.counter)) finish_norms<norm>(args);
}

// Applies function(value) to every element of a chunk.
template <typename T, typename Function>
__device__ void update_chunk(const Cell& cell, const Chunk& chunk, Function function) {
  Span<T> span(chunk.begin, chunk.end, kThreads);
  span.add(cell);
  span.close();
  for (int64_t tile = span.begin; tile < span.body; tile += kThreads * kPack<T>) {
    const Place place(span, tile, threadIdx.x);
    T x[kPack<T>];
    unpack(fetch<T>(cell, place), cell.dtype, x);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) x[j] = function(x[j]);
    put<T>(cell, place, pack(x, cell.dtype));
  }
  for (int64_t i = span.body + threadIdx.x; i < span.end; i += kThreads) {
    store<T>(cell, i, function(load<T>(cell, i)));
  }
}

template <typename T>
struct Scale {
  T coefficient;
  __device__ T operator()(T x) const { return x * coefficient; }
};

template <typename T>
struct Clamp {
  T bound;
  __device__ T operator()(T x) const { return clamp_element(x, bound); }
};

template <template <typename> class Function>
__device__ void update_table(const DeviceTable& table, double operand) {
  for (int64_t index = blockIdx.x; index < table.chunk_count; index += gridDim.x) {
    const Chunk chunk = chunk_of(table, index);
    const Cell cell = chunk.row.cell(0);
    if (cell.dtype == DType::float64) {
      update_chunk<double>(cell, chunk, Function<double>{operand});
    } else {
      update_chunk<float>(cell, chunk, Function<float>{static_cast<float>(operand)});
    }
  }
}

__global__ void __launch_bounds__(kThreads) scale_kernel(const DeviceTable table, const Cell coefficient) {
  const double factor = load<double>(coefficient, 0);
  if (factor != 1.0) update_table<Scale>(table, factor);
}

__global__ void __launch_bounds__(kThreads) clamp_kernel(const DeviceTable table, double bound) {
  update_table<Clamp>(table, bound);
}

}  // namespace

void norms(const NormsArgs& args, Norm norm, const Queue& queue) {
  const auto kernel = norm == Norm::l1   ? norms_kernel<Norm::l1>
                      : norm == Norm::l2 ? norms_kernel<Norm::l2>
                                         : norms_kernel<Norm::inf>;
  launch(kernel, "norms", args.table.chunk_count, queue, args);
}

void scale(const DeviceTable& table, const Cell& coefficient, const Queue& queue) {
  launch(scale_kernel, "scale", table.chunk_count, queue, table, coefficient);
}

void clamp(const DeviceTable& table, double bound, const Queue& queue) {
  launch(clamp_kernel, "clamp", table.chunk_count, queue, table, bound);
}

}  // namespace trainops::cuda
