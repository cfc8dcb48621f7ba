// Gradient norm, scaling and clamping: the formulas are in math/clip_grad_norm.h.
// The norm reads 4 bytes per float32 element; scaling and clamping read and write them. Sums are accumulated in
// float64 whatever the type, in an order that depends on the sizes alone: the same gradients give the same bits
// with any number of threads and any instruction set.
#include <cmath>
#include <type_traits>

#include "convert.h"
#include "kernels.h"

namespace trainops::cpu {
namespace {

// Independent sums, so that there is no chain of dependent additions.
constexpr int64_t kLanes = 32;

// A run of memory is read as several streams side by side, a block of each in turn and some lines ahead of it: one
// stream alone leaves a core waiting for memory.
constexpr int64_t kStreams = 4, kBlock = 128, kAhead = 256;

template <Norm norm, typename T>
TRAINOPS_HOST_DEVICE void add_whole_lanes(double* __restrict lanes, const T* __restrict values, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    for (int64_t byte = 0; byte < kLanes * static_cast<int64_t>(sizeof(T)); byte += 64) {
      TRAINOPS_PREFETCH(reinterpret_cast<uintptr_t>(values + i) + kAhead * sizeof(T) + byte);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = accumulate<norm>(lanes[lane], static_cast<double>(values[i + lane]));
    }
  }
}

template <Norm norm, typename T>
TRAINOPS_HOST_DEVICE double reduce(const T* values, int64_t size) {
  double lanes[kLanes] = {};
  const int64_t stream = size / (kStreams * kBlock) * kBlock;
  for (int64_t i = 0; i < stream; i += kBlock) {
    for (int64_t s = 0; s < kStreams; ++s) add_whole_lanes<norm>(lanes, values + s * stream + i, kBlock);
  }
  const int64_t rest = kStreams * stream, tail = size / kLanes * kLanes;
  add_whole_lanes<norm>(lanes, values + rest, tail - rest);
  for (int64_t i = tail; i < size; ++i) {
    lanes[i % kLanes] = accumulate<norm>(lanes[i % kLanes], static_cast<double>(values[i]));
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
#undef TRAINOPS_REDUCE

template <Norm norm, typename T>
double reduce_tile(const T* values, int64_t size) {
  if (norm == Norm::l1) return l1(values, size);
  if (norm == Norm::l2) return l2(values, size);
  return inf(values, size);
}

template <Norm norm, typename T>
double reduce_piece(const Cell& cell, const Piece& piece) {
  if (cell.dtype == dtype_of<T>) {
    return reduce_tile<norm>(load<T>(cell, piece.begin, piece.size, nullptr), piece.size);
  }
  double total = 0.0;
  T buffer[kTileNumel];
  for_each_tile(piece, [&](int64_t begin, int64_t size) {
    total = join<norm>(total, reduce_tile<norm>(load(cell, begin, size, buffer), size));
  });
  return total;
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
    partial[index] = cell.dtype == DType::float64 ? reduce_piece<norm, double>(cell, piece)
                                                  : reduce_piece<norm, float>(cell, piece);
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

template <typename T>
TRAINOPS_HOST_DEVICE void scale_values(T* values, int64_t size, T coefficient) {
  for (int64_t i = 0; i < size; ++i) values[i] *= coefficient;
}

template <typename T>
TRAINOPS_HOST_DEVICE void clamp_values(T* values, int64_t size, T bound) {
  for (int64_t i = 0; i < size; ++i) values[i] = clamp_element(values[i], bound);
}

#define TRAINOPS_IN_PLACE(T)                                                      \
  TRAINOPS_MULTIVERSION void scale_tile(T* values, int64_t size, T coefficient) { \
    scale_values(values, size, coefficient);                                      \
  }                                                                               \
  TRAINOPS_MULTIVERSION void clamp_tile(T* values, int64_t size, T bound) { clamp_values(values, size, bound); }
TRAINOPS_IN_PLACE(float)
TRAINOPS_IN_PLACE(double)
#undef TRAINOPS_IN_PLACE

// Applies tile(values, size) to every element of the column.
template <typename T, typename Tile>
void update_piece(const Cell& cell, const Piece& piece, Tile tile) {
  T buffer[kTileNumel];
  for_each_tile(piece, [&](int64_t begin, int64_t size) {
    T* values = load(cell, begin, size, buffer);
    tile(values, size);
    store(cell, begin, size, values);
  });
}

template <typename Tile>
void update_table(const TensorTable& table, int64_t column, Tile tile) {
  for_each_piece(table, [&](int64_t, const Piece& piece) {
    const Cell& cell = table.cell(piece.row, column);
    if (cell.dtype == DType::float64) {
      update_piece<double>(cell, piece, tile);
    } else {
      update_piece<float>(cell, piece, tile);
    }
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
    using T = std::remove_pointer_t<decltype(values)>;
    scale_tile(values, size, static_cast<T>(coefficient));
  });
}

void clamp(const TensorTable& table, int64_t column, double bound) {
  update_table(table, column, [&](auto* values, int64_t size) {
    using T = std::remove_pointer_t<decltype(values)>;
    clamp_tile(values, size, static_cast<T>(bound));
  });
}

}  // namespace trainops::cpu
