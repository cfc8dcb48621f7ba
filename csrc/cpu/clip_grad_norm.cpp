// Gradient norm, scaling and clamping: the formulas are in math/clip_grad_norm.h.
// The norm reads 4 bytes per float32 element; scaling and clamping read and write them. Sums are accumulated in
// float64 whatever the type, in an order that depends on the sizes alone: the same gradients give the same bits
// with any number of threads and any instruction set.
#include <cmath>
#include <type_traits>

#include "convert.h"
#include "elements.h"
#include "kernels.h"

namespace trainops::cpu {
namespace {

// Independent sums, so that there is no chain of dependent additions.
constexpr int64_t kLanes = 32;

// A run of memory is read as several streams side by side, the lanes of each in turn: one stream alone leaves a core
// waiting for memory.
constexpr int64_t kStreams = 4;

template <Norm norm, typename T>
TRAINOPS_HOST_DEVICE void add_whole_lanes(double* __restrict lanes, const T* __restrict values, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = accumulate<norm>(lanes[lane], static_cast<double>(widen(values[i + lane])));
    }
  }
}

template <Norm norm, typename T>
TRAINOPS_HOST_DEVICE double reduce(const T* values, int64_t size) {
  double lanes[kLanes] = {};
  const int64_t stream = size / (kStreams * kLanes) * kLanes;
  for (int64_t i = 0; i < stream; i += kLanes) {
    for (int64_t s = 0; s < kStreams; ++s) add_whole_lanes<norm>(lanes, values + s * stream + i, kLanes);
  }
  const int64_t rest = kStreams * stream, tail = size / kLanes * kLanes;
  add_whole_lanes<norm>(lanes, values + rest, tail - rest);
  for (int64_t i = tail; i < size; ++i) {
    lanes[i % kLanes] = accumulate<norm>(lanes[i % kLanes], static_cast<double>(widen(values[i])));
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] = join<norm>(lanes[lane], lanes[lane + width]);
  }
  return lanes[0];
}

#define TRAINOPS_REDUCE(T)                                                                                  \
  TRAINOPS_MULTIVERSION double l1(const T* values, int64_t size) { return reduce<Norm::l1>(values, size); } \
  TRAINOPS_MULTIVERSION double l2(const T* values, int64_t size) { return reduce<Norm::l2>(values, size); } \
  TRAINOPS_MULTIVERSION double inf(const T* values, int64_t size) { return reduce<Norm::inf>(values, size); }
TRAINOPS_REDUCE(float)
TRAINOPS_REDUCE(double)
TRAINOPS_REDUCE(BFloat16)
TRAINOPS_REDUCE(Float16)
#undef TRAINOPS_REDUCE

template <Norm norm, typename S>
double reduce_run(const S* values, int64_t size) {
  if (norm == Norm::l1) return l1(values, size);
  if (norm == Norm::l2) return l2(values, size);
  return inf(values, size);
}

// Joins partial results pairwise, so that rounding errors do not add up with their number.
template <Norm norm>
double join_all(const double* partial, size_t size) {
  if (size == 0) return 0.0;
  if (size == 1) return partial[0];
  return join<norm>(join_all<norm>(partial, size / 2), join_all<norm>(partial + size / 2, size - size / 2));
}

template <Norm norm>
Norms reduce_table(const TensorTable& table, int64_t column) {
  std::vector<double> partial(table.pieces().size());
  for_each_piece(table, [&](int64_t index, const Piece& piece) {
    const Cell& cell = table.cell(piece.row, column);
    with_type({cell}, [&](auto type) {
      const auto* values = static_cast<const decltype(type)*>(cell.address);
      partial[index] = reduce_run<norm>(values + piece.begin, piece.size);
    });
  });
  Norms result{std::vector<double>(table.rows(), 0.0), 0.0};
  for (size_t first = 0, last = 0; first < partial.size(); first = last) {
    const int64_t row = table.pieces()[first].row;
    while (last < partial.size() && table.pieces()[last].row == row) ++last;
    result.rows[row] = join_all<norm>(partial.data() + first, last - first);
  }
  result.total = join_all<norm>(result.rows.data(), result.rows.size());
  if (norm == Norm::l2) {
    for (double& row : result.rows) row = std::sqrt(row);
    result.total = std::sqrt(result.total);
  }
  return result;
}

#define TRAINOPS_IN_PLACE(S)                                                                              \
  TRAINOPS_MULTIVERSION void scale_run(S* values, int64_t size, Wide<S> by) {                             \
    for_each_element(size, [by](Wide<S>& x) TRAINOPS_INLINE { x *= by; }, values);                        \
  }                                                                                                       \
  TRAINOPS_MULTIVERSION void clamp_run(S* values, int64_t size, Wide<S> bound) {                          \
    for_each_element(size, [bound](Wide<S>& x) TRAINOPS_INLINE { x = clamp_element(x, bound); }, values); \
  }
TRAINOPS_IN_PLACE(float)
TRAINOPS_IN_PLACE(double)
TRAINOPS_IN_PLACE(BFloat16)
TRAINOPS_IN_PLACE(Float16)
#undef TRAINOPS_IN_PLACE

// Applies run(values, size) to every element of the column.
template <typename Run>
void update_table(const TensorTable& table, int64_t column, Run run) {
  for_each_piece(table, [&](int64_t, const Piece& piece) {
    const Cell& cell = table.cell(piece.row, column);
    with_type({cell}, [&](auto type) { run(static_cast<decltype(type)*>(cell.address) + piece.begin, piece.size); });
  });
}

}  // namespace

Norms norms(const TensorTable& table, int64_t column, Norm norm) {
  if (norm == Norm::l1) return reduce_table<Norm::l1>(table, column);
  if (norm == Norm::l2) return reduce_table<Norm::l2>(table, column);
  return reduce_table<Norm::inf>(table, column);
}

void scale(const TensorTable& table, int64_t column, double coefficient) {
  update_table(table, column, [&](auto* values, int64_t size) {
    scale_run(values, size, static_cast<Wide<std::remove_pointer_t<decltype(values)>>>(coefficient));
  });
}

void clamp(const TensorTable& table, int64_t column, double bound) {
  update_table(table, column, [&](auto* values, int64_t size) {
    clamp_run(values, size, static_cast<Wide<std::remove_pointer_t<decltype(values)>>>(bound));
  });
}

}  // namespace trainops::cpu
