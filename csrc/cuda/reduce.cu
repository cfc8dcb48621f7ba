// Statistics over a column (math/statistics.h), in one launch: 4 bytes per float32 element. Elements are widened to
// float64 whatever the type, and taken in an order that depends on the sizes and on the tensor's type alone.
#include "../math/statistics.h"
#include "packs.cuh"

namespace trainops::cuda {
namespace {

// Packs of a tensor that a thread reads ahead.
constexpr int kAhead = 2;

// A state on its way to another thread or another block.
template <typename Statistic>
struct StateWords {
  int64_t words[state_words<Statistic>];
};
template <typename Statistic>
__device__ StateWords<Statistic> to_words(const typename Statistic::State& state) {
  return bit_cast<StateWords<Statistic>>(state);
}
template <typename Statistic>
__device__ typename Statistic::State from_words(const StateWords<Statistic>& words) {
  return bit_cast<typename Statistic::State>(words);
}

// The state of a thread's share of a chunk. Alignment does not change the order of the elements.
template <typename Statistic, typename T>
__device__ typename Statistic::State state_of_thread(const Cell& cell, const Chunk& chunk) {
  constexpr int tile_numel = kThreads * kPack<T>;
  VectorRange<T> range(chunk.begin, chunk.end, kThreads);
  range.add(cell);
  range.close();
  typename Statistic::State state{};
  for (int64_t tile = range.begin; tile < range.body; tile += kAhead * tile_numel) {
    Raw raw[kAhead];
    LaneOffset offsets[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      offsets[i] = LaneOffset(range, tile + i * tile_numel, threadIdx.x);
      raw[i] = fetch<T>(cell, offsets[i]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      T x[kPack<T>];
      unpack(raw[i], cell.dtype, x);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        // Where there are no elements, fetch() gives zeros.
        const bool exists = j < kHalf<T> ? offsets[i].has_first : offsets[i].has_second;
        if (Statistic::ignores_zeros || exists) state = Statistic::add(state, static_cast<double>(x[j]));
      }
    }
  }
  if (range.body == range.end) return state;
  for (int64_t tile = range.begin + (range.body - range.begin) / tile_numel * tile_numel; tile < range.end;
       tile += tile_numel) {
#pragma unroll 1
    for (int j = 0; j < kPack<T>; ++j) {
      const int64_t i = tile + threadIdx.x * range.stride + (j < kHalf<T> ? j : range.second + j - kHalf<T>);
      if (i >= range.body && i < range.end) state = Statistic::add(state, load<double>(cell, i));
    }
  }
  return state;
}

// Joins the states of a warp's lanes. Only the first lane's result is valid.
template <typename Statistic>
__device__ typename Statistic::State join_warp(typename Statistic::State state) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    StateWords<Statistic> other = to_words<Statistic>(state);
#pragma unroll
    for (int64_t& word : other.words) word = __shfl_down_sync(kAllLanes, word, distance);
    state = Statistic::join(state, from_words<Statistic>(other));
  }
  return state;
}

// The state of a lane, for all lanes of its warp.
template <typename Statistic>
__device__ typename Statistic::State state_of_lane(typename Statistic::State state, int lane) {
  StateWords<Statistic> its = to_words<Statistic>(state);
#pragma unroll
  for (int64_t& word : its.words) word = __shfl_sync(kAllLanes, word, lane);
  return from_words<Statistic>(its);
}

// Joins the states of the block's threads; all get the result. `shared`: one for each warp, free again when all
// threads have passed another barrier.
template <typename Statistic>
__device__ typename Statistic::State join_block(typename Statistic::State state, StateWords<Statistic>* shared) {
  state = join_warp<Statistic>(state);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = to_words<Statistic>(state);
  __syncthreads();
  state = from_words<Statistic>(shared[0]);
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) state = Statistic::join(state, from_words<Statistic>(shared[warp]));
  return state;
}

// A partial state that another block has written.
template <typename Statistic>
__device__ typename Statistic::State partial_state(const StateWords<Statistic>* partial) {
  StateWords<Statistic> its;
#pragma unroll
  for (int i = 0; i < state_words<Statistic>; ++i) its.words[i] = __ldcg(partial->words + i);
  return from_words<Statistic>(its);
}

// Joins every `step`-th partial state, several at a time.
template <typename Statistic>
__device__ typename Statistic::State join_partials(const StateWords<Statistic>* partials, int64_t begin,
                                                   int64_t count, int step) {
  constexpr int ahead = 4;
  typename Statistic::State states[ahead] = {};
#pragma unroll 1
  for (int64_t i = begin; i < count; i += ahead * step) {
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (i + k * step < count) {
        states[k] = Statistic::join(states[k], partial_state<Statistic>(partials + i + k * step));
      }
    }
  }
  return Statistic::join(Statistic::join(states[0], states[1]), Statistic::join(states[2], states[3]));
}

__device__ void write(void* out, bool is_double, int64_t i, double x) {
  if (is_double) {
    static_cast<double*>(out)[i] = x;
  } else {
    static_cast<float*>(out)[i] = static_cast<float>(x);
  }
}

// A row of more chunks than these is joined by a warp, or by the whole block.
constexpr int64_t kOfThread = 8, kOfWarp = 2048;

// Finishes the rows and the total. One block does this: each thread has a row at a time, and is helped with long
// ones.
template <typename Statistic>
__device__ void finish_rows(const ReduceArgs& args) {
  using State = typename Statistic::State;
  __shared__ StateWords<Statistic> shared[2][kWarps];
  __shared__ int64_t counts[kThreads];
  const int lane = threadIdx.x % kWarp;
  const double grad_scale = args.grad_scale == nullptr ? 1.0 : *args.grad_scale;
  const auto* const all_partials = static_cast<const StateWords<Statistic>*>(args.partials);
  State total{};
  for (int64_t base = 0; base < args.table.row_count; base += kThreads) {
    const int64_t row = base + threadIdx.x;
    int64_t first = 0, count = 0;
    if (row < args.table.row_count) {
      const Row words = row_of(args.table, row);
      first = words.words[kFirstChunk];
      count = (words.numel() + kChunkNumel - 1) / kChunkNumel;
    }
    State state = count <= kOfThread ? join_partials<Statistic>(all_partials + first, 0, count, 1) : State{};

    unsigned helped = __ballot_sync(kAllLanes, count > kOfThread && count <= kOfWarp);
    for (; helped != 0; helped &= helped - 1) {
      const int owner = __ffs(helped) - 1;
      const auto* const partials = all_partials + __shfl_sync(kAllLanes, first, owner);
      const int64_t of_owner = __shfl_sync(kAllLanes, count, owner);
      const State joined = join_warp<Statistic>(join_partials<Statistic>(partials, lane, of_owner, kWarp));
      const State result = state_of_lane<Statistic>(joined, 0);
      if (lane == owner) state = result;
    }

    if (__syncthreads_or(count > kOfWarp)) {
      counts[threadIdx.x] = count;
      __syncthreads();
      for (int owner = 0; owner < kThreads; ++owner) {
        if (counts[owner] <= kOfWarp) continue;
        const auto* const partials = all_partials + row_of(args.table, base + owner).words[kFirstChunk];
        const State joined = join_partials<Statistic>(partials, threadIdx.x, counts[owner], kThreads);
        const State result = join_block<Statistic>(joined, shared[0]);
        if (static_cast<int>(threadIdx.x) == owner) state = result;
        __syncthreads();
      }
    }

    if (row < args.table.row_count) {
      write(args.rows_out, args.out_is_double, row, Statistic::finish(state) / grad_scale);
      total = Statistic::join(total, state);
    }
  }
  const double result = Statistic::finish(join_block<Statistic>(total, shared[1])) / grad_scale;
  if (threadIdx.x == 0) {
    *args.total = result;
    write(args.total_out, args.out_is_double, 0, result);
  }
}

template <typename Statistic>
__global__ void __launch_bounds__(kThreads, 4) reduce_kernel(const __grid_constant__ ReduceArgs args) {
  using State = typename Statistic::State;
  __shared__ StateWords<Statistic> shared[2][kWarps];
  auto* const partials = static_cast<StateWords<Statistic>*>(args.partials);
  ChunkQueue queue(args.table, args.table.chunk_count, &args.counters->chunks);
  for (Chunk chunk; queue.next(chunk);) {
    const Cell cell = chunk.row.cell(static_cast<int>(args.column));
    const State of_thread = cell.dtype == DType::float64 ? state_of_thread<Statistic, double>(cell, chunk)
                                                         : state_of_thread<Statistic, float>(cell, chunk);
    const State of_block = join_block<Statistic>(of_thread, shared[chunk.slot]);
    if (threadIdx.x == 0) partials[chunk.index()] = to_words<Statistic>(of_block);
  }
  if (is_last_block(&args.counters->blocks)) finish_rows<Statistic>(args);
}

}  // namespace

void reduce(const std::string& statistic, const ReduceArgs& args, const Queue& queue) {
  with_statistic(statistic, [&](auto its) {
    launch(reduce_kernel<decltype(its)>, statistic.c_str(), args.table.chunk_count, queue, args);
  });
}

}  // namespace trainops::cuda
