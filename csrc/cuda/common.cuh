// Launches kernels, and finds their rows and chunks. Blocks draw the chunks of a table from a queue.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"

#ifndef TRAINOPS_LAUNCH
#define TRAINOPS_LAUNCH(kernel, grid, stream, ...) kernel<<<grid, kThreads, 0, stream>>>(__VA_ARGS__)
#endif

namespace trainops::cuda {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// On the host

// Makes a device current for its lifetime.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* kernel);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

// Throws a std::runtime_error that names the kernel.
void check(cudaError_t status, const char* kernel);

// One of the kernels, which are all compiled for the same GPUs.
const void* any_kernel();

// The number of blocks for `chunks`. No more than run at a time, because each takes chunk after chunk.
unsigned grid_size(const void* kernel, int64_t chunks, int device, const char* name);

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const char* name, int64_t chunks, const Queue& queue, const Args&... args) {
  if (chunks == 0) return;
  const DeviceGuard device_guard(queue.device, name);
  const unsigned grid = grid_size(reinterpret_cast<const void*>(kernel), chunks, queue.device, name);
  TRAINOPS_LAUNCH(kernel, grid, static_cast<cudaStream_t>(queue.stream), args...);
  check(cudaGetLastError(), name);
}

// On the device

// An address that a table holds. Without this hint the compiler emits generic loads.
template <typename T>
__device__ T* global(int64_t word) {
  T* const address = reinterpret_cast<T*>(word);
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

struct Row {
  const int64_t* words;

  __device__ int64_t numel() const { return words[kNumel]; }
  __device__ void* address(int column) const { return global<void>(words[kAddresses + column]); }
  __device__ Cell cell(int column) const { return {address(column), dtype_of_column(words[kDTypes], column)}; }
  // What the random bits of an average depend on. `place`: the word that has its place.
  __device__ Random random(int place, uint32_t seed) const {
    return {random_key(seed, words[place]), static_cast<uint32_t>(words[kOrigin])};
  }
};

__device__ inline Row row_of(const DeviceTable& table, int64_t row) { return {table.rows + row * table.row_words}; }

// Elements [begin, end) of a row. The row's words lie in shared memory, until the next chunk is asked for.
struct Chunk {
  Row row;
  int64_t row_index, begin, end;
  int slot;  // 0 and 1 in turns

  // Its number in the table.
  __device__ int64_t index() const { return row.words[kFirstChunk] + begin / kChunkNumel; }
};

// Prepares nothing.
struct Nothing {
  __device__ void operator()(const Row&, int) const {}
};

// Hands out the chunks of a table, each to one block: whoever is ready draws the next one, so that blocks which begin
// late or run slowly take fewer. All threads of a block own the queue together and ask it for the same chunks.
//
// While a block works on a chunk, its last warp draws the next one, reads its row into the other of two slots, and
// calls prepare(row, slot), which has to pass a barrier of the warp before it reads the row. That warp has no
// elements of chunks of less than 7 packs for each lane.
template <typename Prepare = Nothing>
class ChunkQueue {
 public:
  // `drawn` must be 0 when the first block begins, and is 0 again when the last one has ended. Every block has to
  // take chunks until there are none. `count`: all of the table's chunks, or 0. `backwards`: whole chunks come from
  // the last to the first.
  __device__ ChunkQueue(const DeviceTable& table, int64_t count, unsigned* drawn, bool backwards = false,
                        Prepare prepare = {})
      : table_(table), count_(static_cast<unsigned>(count)), drawn_(drawn), backwards_(backwards), prepare_(prepare) {
    __shared__ Slot slots[2];
    slots_ = slots;
    if (is_drawer()) draw(0);
  }

  // The next chunk for all threads of the block, which have finished the last one. False if there are no more.
  __device__ bool next(Chunk& chunk) {
    __syncthreads();
    if (slots_[slot_].begin < 0) return false;
    chunk = chunk_in(slot_);
    slot_ ^= 1;
    if (is_drawer()) draw(slot_);
    return true;
  }

  // The chunk that next() has found last. To read it again, behind a barrier, costs less than to keep it in
  // registers.
  __device__ Chunk current() const { return chunk_in(slot_ ^ 1); }

 private:
  struct Slot {
    int64_t row_index, begin;  // a negative begin: there is no chunk
    int64_t row[kAddresses + kMaxColumns];
  };

  __device__ Chunk chunk_in(int i) const {
    const Slot& slot = slots_[i];
    const int64_t left = slot.row[kNumel] - slot.begin;
    return {{slot.row}, slot.row_index, slot.begin, slot.begin + (left < kChunkNumel ? left : kChunkNumel), i};
  }

  __device__ static bool is_drawer() { return threadIdx.x >= kThreads - kWarp; }

  __device__ void draw(int to) {
    const int lane = threadIdx.x % kWarp;
    Slot& slot = slots_[to];
    unsigned turn = 0;
    if (lane == 0) {
      turn = atomicAdd(drawn_, 1u);
      // Every block draws once in vain; then the counter is done with.
      if (turn == count_ + gridDim.x - 1) *drawn_ = 0;
    }
    turn = __shfl_sync(kAllLanes, turn, 0);
    if (turn >= count_) {
      if (lane == 0) slot.begin = -1;
      return;
    }
    const int64_t index = backwards_ && turn < table_.whole_chunks ? table_.whole_chunks - 1 - turn : turn;
    const int64_t* const words = table_.chunks + kChunkWords * index;
    const Row row = row_of(table_, words[kChunkRow]);
    if (lane < table_.row_words) slot.row[lane] = row.words[lane];
    if (lane == 0) {
      slot.row_index = words[kChunkRow];
      slot.begin = words[kChunkBegin];
    }
    prepare_({slot.row}, to);
  }

  const DeviceTable& table_;
  const unsigned count_;
  unsigned* const drawn_;
  const bool backwards_;
  Prepare prepare_;
  Slot* slots_;
  int slot_ = 0;
};

// Called by blocks after their first threads have written something. True for all threads of the last of `count` such
// blocks. It then sees what those threads have written. The counter must be 0 on entry. The last block resets it.
// Threads must pass a barrier between two calls.
__device__ inline bool is_last_of(unsigned count, unsigned* counter) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) == count - 1;
    if (last) {
      *counter = 0;
      __threadfence();
    }
  }
  __syncthreads();
  return last;
}

// The same for all blocks, and for what all their threads have written. Called when the queue has no more chunks:
// next() was a barrier.
__device__ inline bool is_last_block(Counters* counters) { return is_last_of(gridDim.x, &counters->blocks); }

}  // namespace trainops::cuda
