// Statistics over a column (math/statistics.h), in one launch: 4 bytes per float32 element. Of each tile of a chunk,
// a thread takes one pack. It has a run for each place in a pack, in the type of the arithmetic, and joins its runs
// when its share of the chunk ends. All that follows is float64. The order of all sums depends on the number of
// elements of each row alone: not on types (but float64, whose packs are smaller), alignment, or the number of
// blocks.
#include "../math/statistics.h"
#include "packs.cuh"

namespace trainops::cuda {
namespace {

// Packs of a tensor that a thread reads ahead.
constexpr int kAhead = 2;

template <typename T>
constexpr int kTile = kThreads * kPack<T>;

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

// A thread's runs, one for each place in a pack.
template <typename Statistic, typename T, typename Wide>
struct Runs {
  using State = typename Statistic::State;
  typename Statistic::template Run<Wide> at[kPack<T>] = {};

  // Adds a pack, of which the first `count` elements exist. The others are zeros.
  __device__ void add(const T (&x)[kPack<T>], int count) {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      if (Statistic::ignores_zeros || j < count) at[j] = Statistic::add(at[j], static_cast<Wide>(x[j]));
    }
  }

  __device__ State joined() const { return Statistic::widen(join_runs<Statistic>(at)); }
};

// The number of elements of [first, end) that a pack holds.
template <typename T>
__device__ int count_in_pack(int64_t first, int64_t end) {
  const int64_t left = end - first;
  return left <= 0 ? 0 : left < kPack<T> ? static_cast<int>(left) : kPack<T>;
}

// Adds whole packs, read in accesses of 16 bytes. `body`: the end of the last one.
template <typename Statistic, typename T>
__device__ void add_packs(const Cell& cell, int64_t begin, int64_t body, Runs<Statistic, T, T>& runs) {
  for (int64_t tile = begin; tile < body; tile += kAhead * kTile<T>) {
    Raw raw[kAhead];
    LaneOffset offsets[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      offsets[i] = LaneOffset::of_pack<T>(tile + i * kTile<T> + threadIdx.x * kPack<T>, body);
      raw[i] = fetch<T>(cell, offsets[i]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      T x[kPack<T>];
      unpack(raw[i], cell.dtype, x);
      runs.add(x, offsets[i].has_first ? kPack<T> : 0);
    }
  }
}

// Adds packs whose elements are read one by one: those from `body` on.
template <typename Statistic, typename T, typename Wide>
__device__ void add_elements(const Cell& cell, const Chunk& chunk, int64_t body, Runs<Statistic, T, Wide>& runs) {
  const int64_t last_tile = chunk.begin + (body - chunk.begin) / kTile<T> * kTile<T>;
  for (int64_t tile = last_tile; tile < chunk.end; tile += kTile<T>) {
    const int64_t first = tile + threadIdx.x * kPack<T>;
    if (first < body) continue;
    const int count = count_in_pack<T>(first, chunk.end);
    T x[kPack<T>];
    load_pack(cell, first, count, x);
    runs.add(x, count);
  }
}

// The state of a thread's share of a chunk.
template <typename Statistic, typename T>
__device__ typename Statistic::State state_of_thread(const Cell& cell, const Chunk& chunk) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(cell.address) % 16 == 0;
  const int64_t body = is_aligned ? chunk.end - (chunk.end - chunk.begin) % kPack<T> : chunk.begin;
  Runs<Statistic, T, T> runs;
  add_packs(cell, chunk.begin, body, runs);
  add_elements(cell, chunk, body, runs);
  return runs.joined();
}

// The same, gathered in float64 whatever the type.
template <typename Statistic, typename T>
__device__ typename Statistic::State exact_state_of_thread(const Cell& cell, const Chunk& chunk) {
  Runs<Statistic, T, double> runs;
  add_elements(cell, chunk, chunk.begin, runs);
  return runs.joined();
}

// Joins the states of the first `lanes` lanes of a warp. Only the first lane's result is valid.
template <typename Statistic, int lanes>
__device__ typename Statistic::State join_lanes(typename Statistic::State state) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    StateWords<Statistic> other = to_words<Statistic>(state);
#pragma unroll
    for (int64_t& word : other.words) word = __shfl_down_sync(kAllLanes, word, distance);
    state = Statistic::join(state, from_words<Statistic>(other));
  }
  return state;
}

// Where the threads of a block meet to join their states: in turn, so that the next may be written before all threads
// have read the last.
template <typename Statistic>
struct Meeting {
  using State = typename Statistic::State;
  StateWords<Statistic> (*const shared)[kWarps];
  int turn = 0;

  // Joins the states of the block's threads. All get the result, which differs in no bit.
  __device__ State join(State state) {
    const int lane = threadIdx.x % kWarp;
    StateWords<Statistic>* const warps = shared[turn];
    turn ^= 1;
    state = join_lanes<Statistic, kWarp>(state);
    if (lane == 0) warps[threadIdx.x / kWarp] = to_words<Statistic>(state);
    __syncthreads();
    StateWords<Statistic> joined =
        to_words<Statistic>(join_lanes<Statistic, kWarps>(from_words<Statistic>(warps[lane % kWarps])));
#pragma unroll
    for (int64_t& word : joined.words) word = __shfl_sync(kAllLanes, word, 0);
    return from_words<Statistic>(joined);
  }
};

template <typename Statistic, typename T>
__device__ typename Statistic::State state_of_chunk(const Cell& cell, const Chunk& chunk,
                                                    Meeting<Statistic>& meeting) {
  const auto state = meeting.join(state_of_thread<Statistic, T>(cell, chunk));
  if (sizeof(T) == sizeof(double) || !Statistic::is_doubtful(state)) return state;
  return meeting.join(exact_state_of_thread<Statistic, T>(cell, chunk));
}

// Joins states that other blocks have written, of which the thread takes its share: partial(i) is the address of the
// i-th.
template <typename Statistic, typename Partial>
__device__ typename Statistic::State join_partials(int64_t count, Partial partial) {
  constexpr int ahead = 4;
  typename Statistic::State states[ahead] = {};
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < count; i += ahead * kThreads) {
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (i + k * kThreads >= count) continue;
      const StateWords<Statistic>* const its = partial(i + k * kThreads);
      StateWords<Statistic> words;
#pragma unroll
      for (int word = 0; word < state_words<Statistic>; ++word) words.words[word] = __ldcg(its->words + word);
      states[k] = Statistic::join(states[k], from_words<Statistic>(words));
    }
  }
  return join_runs<Statistic>(states);
}

__device__ void write(void* out, bool is_double, int64_t i, double x) {
  if (is_double) {
    static_cast<double*>(out)[i] = x;
  } else {
    static_cast<float*>(out)[i] = static_cast<float>(x);
  }
}

// A row's state, once it is known, lies in the place of its first chunk's.
template <typename Statistic>
__global__ void __launch_bounds__(kThreads, 4) reduce_kernel(const __grid_constant__ ReduceArgs args) {
  using State = typename Statistic::State;
  __shared__ StateWords<Statistic> shared[2][kWarps];
  Meeting<Statistic> meeting{shared};
  auto* const partials = static_cast<StateWords<Statistic>*>(args.partials);
  const double grad_scale = args.grad_scale == nullptr ? 1.0 : *args.grad_scale;
  ChunkQueue queue(args.table, args.table.chunk_count, &args.counters->chunks);
  for (Chunk chunk; queue.next(chunk);) {
    const Cell cell = chunk.row.cell(static_cast<int>(args.column));
    State state = cell.dtype == DType::float64 ? state_of_chunk<Statistic, double>(cell, chunk, meeting)
                                               : state_of_chunk<Statistic, float>(cell, chunk, meeting);
    if (threadIdx.x == 0) partials[chunk.index] = to_words<Statistic>(state);

    const int64_t count = (chunk.row.numel() + kChunkNumel - 1) / kChunkNumel;
    StateWords<Statistic>* const of_row = partials + chunk.row.words[kFirstChunk];
    if (count > 1) {
      if (!is_last_of(static_cast<unsigned>(count), &args.counters->rows[chunk.row_index])) continue;
      state = meeting.join(join_partials<Statistic>(count, [&](int64_t i) { return of_row + i; }));
      if (threadIdx.x == 0) *of_row = to_words<Statistic>(state);
    }
    if (threadIdx.x == 0)
      write(args.rows_out, args.out_is_double, chunk.row_index, Statistic::finish(state) / grad_scale);
  }
  if (!is_last_block(args.counters)) return;
  const State total = meeting.join(join_partials<Statistic>(
      args.table.row_count, [&](int64_t row) { return partials + row_of(args.table, row).words[kFirstChunk]; }));
  if (threadIdx.x != 0) return;
  const double result = Statistic::finish(total) / grad_scale;
  *args.total = result;
  write(args.total_out, args.out_is_double, 0, result);
}

}  // namespace

void reduce(const std::string& statistic, const ReduceArgs& args, const Queue& queue) {
  with_statistic(statistic, [&](auto its) {
    launch(reduce_kernel<decltype(its)>, statistic.c_str(), args.table.chunk_count, queue, args);
  });
}

}  // namespace trainops::cuda
