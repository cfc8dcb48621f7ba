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
    store(cell, i, function(load<T>(cell, i)));
  }
}

template <template <typename> class Function>
__device__ void transform_table(const DeviceTable& table, Counters* counters, const Function<float>& of_float,
                                const Function<double>& of_double) {
  ChunkQueue queue(table, table.chunk_count, &counters->chunks);
  for (Chunk chunk; queue.next(chunk);) {
    const Cell cell = chunk.row.cell(0);
    if (cell.dtype == DType::float64) {
      transform_chunk<double>(cell, chunk, of_double);
    } else {
      transform_chunk<float>(cell, chunk, of_float);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ DeviceTable table, const Cell coefficient, Counters* counters) {
  const double factor = load<double>(coefficient, 0);
  // Read twice, because a compiler would convert a float64 factor again for every pack.
  const Scale<float> of_float{load<float>(coefficient, 0)};
  if (factor != 1.0) transform_table(table, counters, of_float, Scale<double>{factor});
}

__global__ void __launch_bounds__(kThreads)
    clamp_kernel(const __grid_constant__ DeviceTable table, double bound, Counters* counters) {
  transform_table(table, counters, Clamp<float>{static_cast<float>(bound)}, Clamp<double>{bound});
}

}  // namespace

void scale(const DeviceTable& table, const Cell& coefficient, Counters* counters, const Queue& queue) {
  launch(scale_kernel, "scale", table.chunk_count, queue, table, coefficient, counters);
}

void clamp(const DeviceTable& table, double bound, Counters* counters, const Queue& queue) {
  launch(clamp_kernel, "clamp", table.chunk_count, queue, table, bound, counters);
}

}  // namespace trainops::cuda
