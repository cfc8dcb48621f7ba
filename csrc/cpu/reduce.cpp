// Statistics over a column (math/statistics.h): 4 bytes per float32 element. States are kept in float64 whatever the
// type, in an order that depends on the sizes alone: the same tensors give the same bits with any number of threads
// and any instruction set.
#include "../math/statistics.h"
#include "convert.h"
#include "kernels.h"

namespace trainops::cpu {
namespace {

// Independent states, so that there is no chain of dependent additions.
constexpr int64_t kLanes = 32;

// A run of memory is read as several streams side by side, the lanes of each in turn: one stream alone leaves a core
// waiting for memory.
constexpr int64_t kStreams = 4;

template <typename Statistic, typename S>
TRAINOPS_HOST_DEVICE void add_whole_lanes(typename Statistic::State* __restrict lanes, const S* __restrict values,
                                          int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = Statistic::add(lanes[lane], static_cast<double>(widen(values[i + lane])));
    }
  }
}

template <typename Statistic, typename S>
TRAINOPS_HOST_DEVICE typename Statistic::State reduce_run(const S* values, int64_t size) {
  typename Statistic::State lanes[kLanes] = {};
  const int64_t stream = size / (kStreams * kLanes) * kLanes;
  for (int64_t i = 0; i < stream; i += kLanes) {
    for (int64_t s = 0; s < kStreams; ++s) add_whole_lanes<Statistic>(lanes, values + s * stream + i, kLanes);
  }
  const int64_t rest = kStreams * stream, tail = size / kLanes * kLanes;
  add_whole_lanes<Statistic>(lanes, values + rest, tail - rest);
  for (int64_t i = tail; i < size; ++i) {
    lanes[i % kLanes] = Statistic::add(lanes[i % kLanes], static_cast<double>(widen(values[i])));
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] = Statistic::join(lanes[lane], lanes[lane + width]);
  }
  return lanes[0];
}

// One named function for each statistic and type, because only those can be compiled for several instruction sets.
#define TRAINOPS_REDUCE(dtype, S, Statistic)                                                      \
  TRAINOPS_MULTIVERSION Statistic::State reduce_piece(Statistic, const S* values, int64_t size) { \
    return reduce_run<Statistic>(values, size);                                                   \
  }
#define TRAINOPS_REDUCE_ALL(Statistic, name) TRAINOPS_DTYPES(TRAINOPS_REDUCE, Statistic)
TRAINOPS_STATISTICS(TRAINOPS_REDUCE_ALL)
#undef TRAINOPS_REDUCE_ALL
#undef TRAINOPS_REDUCE

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
    with_type({cell}, [&](auto type) {
      const auto* values = static_cast<const decltype(type)*>(cell.address);
      partial[index] = reduce_piece(Statistic{}, values + piece.begin, piece.size);
    });
  });
  std::vector<State> rows(table.rows());
  for (size_t first = 0, last = 0; first < partial.size(); first = last) {
    const int64_t row = pieces[first].row;
    while (last < partial.size() && pieces[last].row == row) ++last;
    rows[row] = join_all<Statistic>(partial.data() + first, last - first);
  }
  Result result{{}, Statistic::finish(join_all<Statistic>(rows.data(), rows.size()))};
  for (const State& row : rows) result.rows.push_back(Statistic::finish(row));
  return result;
}

}  // namespace

Result reduce(const std::string& statistic, const Table& table, const Chunks& chunks, int64_t column) {
  return with_statistic(statistic, [&](auto its) { return reduce_table<decltype(its)>(table, chunks, column); });
}

}  // namespace trainops::cpu
