// Statistics over a column (math/statistics.h): 4 bytes per float32 element. Runs of 8 elements are gathered in the
// type of the arithmetic, and joined in float64, in an order that depends on the number of elements of each row
// alone: the same numbers give the same bits in float32 and in 16 bits, with any number of threads and any
// instruction set.
#include "../math/statistics.h"
#include "convert.h"
#include "kernels.h"
#include "moments.h"

namespace trainops::cpu {
namespace {

// Independent runs, so that there is no chain of dependent additions.
constexpr int64_t kLanes = 32;

// A piece of memory is read as several streams side by side, the lanes of each in turn: one stream alone leaves a
// core waiting for memory.
constexpr int64_t kStreams = 4;

// Elements of every stream that a run takes. So runs have 8 elements, and in float32 round their sum 8 times.
constexpr int64_t kOfStream = 2;

template <typename Statistic, typename Wide>
using Run = typename Statistic::template Run<Wide>;

// Adds one element to the run of each lane.
template <typename Isa, typename Statistic, typename Wide, typename S>
TRAINOPS_HOST_DEVICE void add_lanes(Run<Statistic, Wide>* __restrict runs, const S* __restrict values) {
  if constexpr (has_halves<Isa, const S*>) {
    float wide[kLanes];
    for (int64_t i = 0; i < kLanes; i += Isa::halves) get_block<Isa::halves>(values + i, wide + i);
    return add_lanes<Baseline, Statistic, Wide>(runs, wide);
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    runs[lane] = Statistic::add(runs[lane], static_cast<Wide>(widen(values[lane])));
  }
}

template <typename Isa, typename Statistic, typename Wide, typename S>
TRAINOPS_HOST_DEVICE typename Statistic::State reduce_in(const S* values, int64_t size) {
  typename Statistic::State states[kLanes];
  const int64_t stream = size / (kStreams * kLanes) * kLanes, tail = size / kLanes * kLanes;
  {
    Run<Statistic, Wide> runs[kLanes] = {};
    for (int64_t i = kStreams * stream; i < tail; i += kLanes) add_lanes<Isa, Statistic, Wide>(runs, values + i);
    for (int64_t i = tail; i < size; ++i) {
      runs[i - tail] = Statistic::add(runs[i - tail], static_cast<Wide>(widen(values[i])));
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) states[lane] = Statistic::widen(runs[lane]);
  }
  for (int64_t begin = 0; begin < stream; begin += kOfStream * kLanes) {
    Run<Statistic, Wide> runs[kLanes] = {};
    const int64_t end = begin + kOfStream * kLanes < stream ? begin + kOfStream * kLanes : stream;
    for (int64_t i = begin; i < end; i += kLanes) {
      for (int64_t s = 0; s < kStreams; ++s) add_lanes<Isa, Statistic, Wide>(runs, values + s * stream + i);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      states[lane] = Statistic::join(states[lane], Statistic::widen(runs[lane]));
    }
  }
  return join_runs<Statistic>(states);
}

template <typename Isa, typename Statistic, typename S>
TRAINOPS_HOST_DEVICE typename Statistic::State reduce_values(const S* values, int64_t size) {
  const auto state = reduce_in<Isa, Statistic, Wide<S>>(values, size);
  if (std::is_same_v<Wide<S>, double> || !Statistic::is_doubtful(state)) return state;
  return reduce_in<Isa, Statistic, double>(values, size);
}

// One named function for each statistic and type, because only those can be compiled for several instruction sets.
#define TRAINOPS_REDUCE_FOR(Isa, target, S, Statistic)                             \
  target Statistic::State reduce_piece(Statistic, const S* values, int64_t size) { \
    return reduce_values<Isa, Statistic>(values, size);                            \
  }
#define TRAINOPS_REDUCE(dtype, S, Statistic) TRAINOPS_VERSIONS(TRAINOPS_REDUCE_FOR, S, Statistic)
#define TRAINOPS_REDUCE_ALL(Statistic, name) TRAINOPS_DTYPES(TRAINOPS_REDUCE, Statistic)
TRAINOPS_NORMS(TRAINOPS_REDUCE_ALL)
#undef TRAINOPS_REDUCE_ALL
#undef TRAINOPS_REDUCE
#undef TRAINOPS_REDUCE_FOR

// Joins states pairwise, so that rounding errors do not add up with their number.
template <typename Statistic>
typename Statistic::State join_all(const typename Statistic::State* states, size_t size) {
  if (size == 0) return {};
  if (size == 1) return states[0];
  return Statistic::join(join_all<Statistic>(states, size / 2),
                         join_all<Statistic>(states + size / 2, size - size / 2));
}

template <typename Statistic>
Result reduce_table(const Table& table, const Chunks& chunks, int64_t column) {
  using State = typename Statistic::State;
  const std::vector<Piece>& pieces = chunks.pieces();
  std::vector<State> partial(pieces.size());
  chunks.for_each_piece(Order::kForward, [&](int64_t index, const Piece& piece) {
    const Cell& cell = table.cell(piece.row, column);
    if constexpr (Statistic::has_packs) {
      partial[index] =
          cell.dtype == DType::float64 ? moments_of_piece<double>(cell, piece) : moments_of_piece<float>(cell, piece);
    } else {
      with_type({cell}, [&](auto type) {
        const auto* values = static_cast<const decltype(type)*>(cell.address);
        partial[index] = reduce_piece(Statistic{}, values + piece.begin, piece.size);
      });
    }
  });
  std::vector<State> rows(table.rows());
  for (size_t first = 0, last = 0; first < partial.size(); first = last) {
    const int64_t row = pieces[first].row;
    while (last < partial.size() && pieces[last].row == row) ++last;
    rows[row] = join_all<Statistic>(partial.data() + first, last - first);
  }
  double results[Statistic::results];
  Result result;
  for (const State& row : rows) {
    Statistic::finish(row, results);
    result.rows.insert(result.rows.end(), std::begin(results), std::end(results));
  }
  Statistic::finish(join_all<Statistic>(rows.data(), rows.size()), results);
  result.total = results[0];
  return result;
}

}  // namespace

Result reduce(const std::string& statistic, const Table& table, const Chunks& chunks, int64_t column) {
  return with_statistic(statistic, [&](auto its) { return reduce_table<decltype(its)>(table, chunks, column); });
}

}  // namespace trainops::cpu
