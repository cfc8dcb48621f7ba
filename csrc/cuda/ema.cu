// Exponential moving average of the weights: the formula is in math/ema.h.
// Reads ema and param, writes ema: 12 bytes per float32 element. Arithmetic in float32, or float64 for float64.
#include "ema.cuh"

namespace trainops::cuda {
namespace {

// `is_special`: whether some of the averages are rounded stochastically.
template <bool is_special>
__global__ void __launch_bounds__(kThreads, 4) ema_kernel(const __grid_constant__ DeviceTable table, double decay,
                                                          uint32_t seed, const bool* skip, Counters* counters) {
  if (skip != nullptr && *skip) return;
  ChunkQueue queue(table, table.chunk_count, &counters->chunks);
  for (Chunk chunk; queue.next(chunk);) {
    Cell average = chunk.row.cell(kEMAAverage);
    if constexpr (is_special) average.random = chunk.row.random(kFirstPlace, seed);
    move_chunk<is_special>(average, {chunk.row.cell(kEMATensor), {}}, chunk, decay);
  }
}

}  // namespace

const void* any_kernel() { return reinterpret_cast<const void*>(&ema_kernel<false>); }

void ema(const DeviceTable& table, double decay, uint32_t seed, const bool* skip, Counters* counters,
         const Queue& queue) {
  const auto kernel = table.is_special ? ema_kernel<true> : ema_kernel<false>;
  launch(kernel, "ema", table.chunk_count, queue, table, decay, seed, skip, counters);
}

}  // namespace trainops::cuda
