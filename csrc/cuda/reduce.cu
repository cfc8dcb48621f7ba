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

// A run or a state on its way to another lane or warp.
template <typename Part>
struct Words {
  static constexpr int count = sizeof(Part) / sizeof(uint32_t);
  uint32_t at[count];
};

// Joins the parts of the first `lanes` lanes of a warp. Only the first lane's result is valid.
template <typename Statistic, int lanes, typename Part>
__device__ Part join_lanes(Part part) {
#pragma unroll(Statistic::has_packs ? 1 : lanes)
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    auto other = bit_cast<Words<Part>>(part);
#pragma unroll
    for (uint32_t& word : other.at) word = __shfl_down_sync(kAllLanes, word, distance);
    part = Statistic::join(part, bit_cast<Part>(other));
  }
  return part;
}

// The part of the first lane, for all lanes of its warp.
template <typename Part>
__device__ Part of_first_lane(Part part) {
  auto words = bit_cast<Words<Part>>(part);
#pragma unroll
  for (uint32_t& word : words.at) word = __shfl_sync(kAllLanes, word, 0);
  return bit_cast<Part>(words);
}

// Where the warps of a block meet to join what they have: in turn, so that the next may be written before all threads
// have read the last.
template <typename Statistic>
struct Meeting {
  using Shared = uint32_t[2][kWarps][Words<typename Statistic::State>::count];
  Shared& shared;
  int turn = 0;

  // What the threads of each warp have together: in the i-th lane that of the i-th warp, in every warp.
  template <typename Part>
  __device__ Part parts_of_warps(Part part) {
    static_assert(sizeof(Part) <= sizeof(typename Statistic::State), "a run is no larger than a state");
    const int lane = threadIdx.x % kWarp;
    auto words = bit_cast<Words<Part>>(join_lanes<Statistic, kWarp>(part));
    auto& of_warps = shared[turn];
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < Words<Part>::count; ++i) {
      if (lane == 0) of_warps[threadIdx.x / kWarp][i] = words.at[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Words<Part>::count; ++i) words.at[i] = of_warps[lane % kWarps][i];
    return bit_cast<Part>(words);
  }

  // Joins the states of the block's threads. Only the first thread's result is valid.
  __device__ typename Statistic::State join(typename Statistic::State state) {
    return join_lanes<Statistic, kWarps>(parts_of_warps(state));
  }
};

// A thread's runs, one for each place in a pack; or one, if the statistic gathers packs.
template <typename Statistic, typename T, typename Wide>
struct Runs {
  typename Statistic::template Run<Wide> at[Statistic::has_packs ? 1 : kPack<T>] = {};

  // Adds a pack, of which the first `count` elements exist. The others are zeros.
  __device__ void add(const T (&x)[kPack<T>], int count) {
    if constexpr (Statistic::has_packs) {
      at[0] = Statistic::join(at[0], Statistic::template gather<Wide>(x, count));
    } else {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        if (Statistic::ignores_zeros || j < count) at[j] = Statistic::add(at[j], static_cast<Wide>(x[j]));
      }
    }
  }
};

// The number of elements of [first, end) that a pack holds.
template <typename T>
__device__ int count_in_pack(int64_t first, int64_t end) {
  const int64_t left = end - first;
  return left <= 0 ? 0 : left < kPack<T> ? static_cast<int>(left) : kPack<T>;
}

// Adds whole packs, read in accesses of 16 bytes where they are aligned. `body`: the end of the last one.
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

// The state of a chunk, for the first thread.
template <typename Statistic, typename T>
__device__ typename Statistic::State state_of_chunk(const Cell& cell, const Chunk& chunk,
                                                    Meeting<Statistic>& meeting) {
  // Few tensors are float64, and a loop over packs of these would be much code where a statistic gathers packs.
  constexpr bool has_body = !Statistic::has_packs || sizeof(T) == sizeof(float);
  const int64_t body = has_body ? chunk.end - (chunk.end - chunk.begin) % kPack<T> : chunk.begin;
  Runs<Statistic, T, T> runs;
  if constexpr (has_body) add_packs(cell, chunk.begin, body, runs);
  add_elements(cell, chunk, body, runs);
  auto run = meeting.parts_of_warps(join_runs<Statistic>(runs.at));
  if constexpr (sizeof(T) < sizeof(double)) {
    // All warps find the same.
    if (Statistic::is_doubtful(of_first_lane(join_lanes<Statistic, kWarps>(run)))) {
      Runs<Statistic, T, double> wide;
      add_elements(cell, chunk, chunk.begin, wide);
      return meeting.join(Statistic::widen(join_runs<Statistic>(wide.at)));
    }
  }
  if (threadIdx.x >= kWarp) return {};
  return join_lanes<Statistic, kWarps>(Statistic::widen(run));
}

// Joins states that other blocks have written, of which the thread takes its share: partial(i) is the i-th.
template <typename Statistic, typename Partial>
__device__ typename Statistic::State join_partials(int64_t count, Partial partial) {
  using State = typename Statistic::State;
  constexpr int ahead = Statistic::has_packs ? 1 : 4;
  State states[ahead] = {};
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < count; i += ahead * kThreads) {
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (i + k * kThreads >= count) continue;
      const auto* const words = reinterpret_cast<const int64_t*>(partial(i + k * kThreads));
      int64_t its[state_words<Statistic>];
#pragma unroll
      for (int word = 0; word < state_words<Statistic>; ++word) its[word] = __ldcg(words + word);
      State state;
      std::memcpy(&state, its, sizeof(State));
      states[k] = Statistic::join(states[k], state);
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

__device__ bool is_set(const float* flag) { return flag != nullptr && *flag != 0.0f; }

// Writes the results of a state, those of the i-th row. Returns the first.
template <typename Statistic>
__device__ double write_results(const typename Statistic::State& state, double grad_scale, void* out, bool is_double,
                                int64_t i) {
  double results[Statistic::results];
  Statistic::finish(state, results);
#pragma unroll
  for (int k = 0; k < Statistic::results; ++k) {
    write(out, is_double, i * Statistic::results + k, results[k] / grad_scale);
  }
  return results[0] / grad_scale;
}

// Counts the exponents of a chunk, whose elements are still in a cache. Integers have no order.
template <typename T>
__device__ void count_exponents(const Cell& cell, const Chunk& chunk, unsigned long long* counts) {
  __shared__ unsigned bins[kExponentBins];
  for (int bin = threadIdx.x; bin < kExponentBins; bin += kThreads) bins[bin] = 0;
  __syncthreads();
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kThreads) {
    const int bin = exponent_bin(load<T, sizeof(T) == 8>(cell, i));
    if (bin >= 0) atomicAdd(&bins[bin], 1u);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kExponentBins; bin += kThreads) {
    if (bins[bin] > 0) atomicAdd(&counts[bin], static_cast<unsigned long long>(bins[bin]));
  }
}

// A row's state, once it is known, lies in the place of its first chunk's. Four blocks on a multiprocessor would have
// too few registers on some cards; three still keep 48 KB of reads on their way. States of several numbers need the
// registers of two.
template <typename Statistic>
__global__ void __launch_bounds__(kThreads, Statistic::has_packs ? 2 : 3)
    reduce_kernel(const __grid_constant__ ReduceArgs args) {
  using State = typename Statistic::State;
  __shared__ typename Meeting<Statistic>::Shared shared;
  Meeting<Statistic> meeting{shared};
  auto* const partials = static_cast<State*>(args.partials);
  const double grad_scale = args.grad_scale == nullptr ? 1.0 : *args.grad_scale;
  ChunkQueue queue(args.table, args.table.chunk_count, &args.counters->chunks);
  for (Chunk chunk; queue.next(chunk);) {
    const Cell cell = chunk.row.cell(static_cast<int>(args.column));
    State state = cell.dtype == DType::float64 ? state_of_chunk<Statistic, double>(cell, chunk, meeting)
                                               : state_of_chunk<Statistic, float>(cell, chunk, meeting);
    if (threadIdx.x == 0) partials[chunk.index()] = state;
    if constexpr (Statistic::has_packs) {
      if (args.histogram != nullptr) {
        unsigned long long* const counts = args.histogram + chunk.row_index * kExponentBins;
        cell.dtype == DType::float64 ? count_exponents<double>(cell, chunk, counts)
                                     : count_exponents<float>(cell, chunk, counts);
      }
    }

    const int64_t count = (chunk.row.numel() + kChunkNumel - 1) / kChunkNumel;
    State* const of_row = partials + chunk.row.words[kFirstChunk];
    if (count > 1) {
      if (!is_last_of(static_cast<unsigned>(count), &args.counters->rows[chunk.row_index])) continue;
      state = meeting.join(join_partials<Statistic>(count, [&](int64_t i) { return of_row + i; }));
      if (threadIdx.x == 0) *of_row = state;
    }
    if (threadIdx.x == 0) {
      write_results<Statistic>(state, grad_scale, args.rows_out, args.out_is_double, chunk.row_index);
    }
  }
  if (Statistic::has_packs || !is_last_block(args.counters)) return;  // nobody asks for what packs add up to
  const State total = meeting.join(join_partials<Statistic>(
      args.table.row_count, [&](int64_t row) { return partials + row_of(args.table, row).words[kFirstChunk]; }));
  if (threadIdx.x != 0) return;
  const double result = write_results<Statistic>(total, grad_scale, args.total_out, args.out_is_double, 0);
  *args.total = result;
  if constexpr (std::is_same_v<Statistic, L2Norm>) {
    if (args.guard != nullptr) *args.guard = judged(*args.guard, result, is_set(args.found_inf));
  }
}

__global__ void judge_kernel(const __grid_constant__ JudgeArgs args) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.guard = judged(*args.guard, *args.norm, is_set(args.found_inf));
}

}  // namespace

void reduce(const std::string& statistic, const ReduceArgs& args, const Queue& queue) {
  with_statistic(statistic, [&](auto its) {
    launch(reduce_kernel<decltype(its)>, statistic.c_str(), args.table.chunk_count, queue, args);
  });
}

void judge(const JudgeArgs& args, const Queue& queue) { launch(judge_kernel, "judge", 1, queue, args); }

}  // namespace trainops::cuda
