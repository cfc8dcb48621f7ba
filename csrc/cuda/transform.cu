// Operations on the elements of each tensor, in place (math/transform.h): 8 bytes per float32 element.
#include "../math/transform.h"
#include "packs.cuh"

namespace trainops::cuda {
namespace {

// Applies function(value) to every element of a chunk.
template <typename T, typename Function>
__device__ void transform_chunk(const Cell& cell, const Chunk& chunk, Function function) {
  VectorRange<T> range(chunk.begin, chunk.end, kThreads);
  range.add(cell);
  range.close();
  for (int64_t tile = range.begin; tile < range.body; tile += kThreads * kPack<T>) {
    const LaneOffset offset(range, tile, threadIdx.x);
    T x[kPack<T>];
    unpack(fetch<T>(cell, offset), cell.dtype, x);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) x[j] = function(x[j]);
    put<T>(cell, offset, pack(x, cell.dtype));
  }
  for (int64_t i = range.body + threadIdx.x; i < range.end; i += kThreads) {
    store<T>(cell, i, function(load<T>(cell, i)));
  }
}

template <template <typename> class Function>
__device__ void transform_table(const DeviceTable& table, Counters* counters, double operand) {
  ChunkQueue queue(table, table.chunk_count, &counters->chunks);
  for (Chunk chunk; queue.next(chunk);) {
    const Cell cell = chunk.row.cell(0);
    if (cell.dtype == DType::float64) {
      transform_chunk<double>(cell, chunk, Function<double>{operand});
    } else {
      transform_chunk<float>(cell, chunk, Function<float>{static_cast<float>(operand)});
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ DeviceTable table, const Cell coefficient, Counters* counters) {
  const double factor = load<double>(coefficient, 0);
  if (factor != 1.0) transform_table<Scale>(table, counters, factor);
}

__global__ void __launch_bounds__(kThreads)
    clamp_kernel(const __grid_constant__ DeviceTable table, double bound, Counters* counters) {
  transform_table<Clamp>(table, counters, bound);
}

}  // namespace

void scale(const DeviceTable& table, const Cell& coefficient, Counters* counters, const Queue& queue) {
  launch(scale_kernel, "scale", table.chunk_count, queue, table, coefficient, counters);
}

void clamp(const DeviceTable& table, double bound, Counters* counters, const Queue& queue) {
  launch(clamp_kernel, "clamp", table.chunk_count, queue, table, bound, counters);
}

}  // namespace trainops::cuda
