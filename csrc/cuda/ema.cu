// Exponential moving average of the weights: the formula is in math/ema.h.
// Reads ema and param, writes ema: 12 bytes per float32 element. Arithmetic in float32, or float64 for float64.
#include "ema.cuh"

namespace trainops::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 4)
    ema_kernel(const __grid_constant__ DeviceTable table, double decay, const bool* skip, Counters* counters) {
  if (skip != nullptr && *skip) return;
  ChunkQueue queue(table, table.chunk_count, &counters->chunks);
  for (Chunk chunk; queue.next(chunk);) {
    move_chunk(chunk.row.cell(kEMAAverage), {chunk.row.cell(kEMATensor), {}}, chunk, decay);
  }
}

}  // namespace

const void* any_kernel() { return reinterpret_cast<const void*>(&ema_kernel); }

void ema(const DeviceTable& table, double decay, const bool* skip, Counters* counters, const Queue& queue) {
  launch(ema_kernel, "ema", table.chunk_count, queue, table, decay, skip, counters);
}

}  // namespace trainops::cuda
