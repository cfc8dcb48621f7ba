// Exponential moving average of the weights: the formula is in math/ema.h.
// Reads ema and param, writes ema: 12 bytes per float32 element. Arithmetic in float32, or float64 for float64.
#include "ema.cuh"

namespace trainops::cuda {
namespace {

template <typename T>
__device__ void move_chunk(const Cell& average, const Cell& param, const Chunk& chunk, double decay) {
  VectorRange<T> range(chunk.begin, chunk.end, kThreads);
  range.add(average);
  range.add(param);
  range.close();
  const auto weight = weight_of_loop<T>(decay);
  for (int64_t tile = range.begin; tile < range.body; tile += kThreads * kPack<T>) {
    const LaneOffset offset(range, tile, threadIdx.x);
    const Raw of_average = fetch<T>(average, offset), of_param = fetch<T>(param, offset);
    put<T>(average, offset, ema_pack<T>(of_average, average.dtype, of_param, param.dtype, weight));
  }
  for (int64_t i = range.body + threadIdx.x; i < range.end; i += kThreads) {
    ema_one(average, {param, {}}, i, decay);
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    ema_kernel(const __grid_constant__ DeviceTable table, double decay, const bool* skip, Counters* counters) {
  if (skip != nullptr && *skip) return;
  ChunkQueue queue(table, table.chunk_count, &counters->chunks);
  for (Chunk chunk; queue.next(chunk);) {
    const Cell average = chunk.row.cell(kEMAAverage), param = chunk.row.cell(kEMATensor);
    if (average.dtype == DType::float64) {
      move_chunk<double>(average, param, chunk, decay);
    } else {
      move_chunk<float>(average, param, chunk, decay);
    }
  }
}

}  // namespace

const void* any_kernel() { return reinterpret_cast<const void*>(&ema_kernel); }

void ema(const DeviceTable& table, double decay, const bool* skip, Counters* counters, const Queue& queue) {
  launch(ema_kernel, "ema", table.chunk_count, queue, table, decay, skip, counters);
}

}  // namespace trainops::cuda
