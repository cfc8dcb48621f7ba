// Tensors of any type as values of the type that a loop works on: the formulas are in math/storage.h.
//
// Where all tensors of a loop have one type, the loop reads and writes them where they lie, and widens and narrows
// 16-bit ones in registers. So do some loops over mixed types (update.cpp, ema.cpp). All other mixtures are widened
// into a tile of the type of the arithmetic and narrowed again from there, which costs two more passes through the
// first-level cache.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "../core/table.h"
#include "../math/storage.h"
#include "elements.h"
#include "parallel.h"

namespace trainops::cpu {

// The type of the arithmetic on values that are stored as S.
template <typename S>
using Wide = decltype(widen(S{}));

template <typename S>
constexpr bool is_narrow = !std::is_same_v<S, Wide<S>>;

template <typename S>
constexpr DType dtype_of = DType::none;
#define TRAINOPS_DTYPE(name, S, ...) \
  template <>                        \
  inline constexpr DType dtype_of<S> = DType::name;
TRAINOPS_DTYPES(TRAINOPS_DTYPE)
#undef TRAINOPS_DTYPE

// Calls function(S{}). S is the common type of the cells. For mixed types it is double if the first cell is double,
// else float. Empty cells do not count.
template <typename Function>
void with_type(const Cell* begin, const Cell* end, Function function) {
  const DType dtype = begin->dtype;
  const bool same =
      std::all_of(begin, end, [&](const Cell& cell) { return cell.dtype == dtype || cell.dtype == DType::none; });
  if (dtype == DType::float64) return function(double{});
  if (same && dtype == DType::bfloat16) return function(BFloat16{});
  if (same && dtype == DType::float16) return function(Float16{});
  function(float{});
}

template <typename Function>
void with_type(std::initializer_list<Cell> cells, Function function) {
  with_type(cells.begin(), cells.end(), function);
}

// The arrays of a split weight from `begin` on.
template <typename Column = SplitWeights>
Column split_weights(const Weight& weight, int64_t begin) {
  return {static_cast<BFloat16*>(weight.param.address) + begin,
          static_cast<Remainder*>(weight.master.address) + begin};
}

// The elements of a cell that is rounded stochastically from `begin` on.
inline StochasticColumn stochastic_column(const Cell& cell, int64_t begin) {
  return {static_cast<BFloat16*>(cell.address) + begin, cell.random.from(begin)};
}

// Widens or narrows elements of `cell` from `begin` on. T is float or double, and not the type of the cell.
template <typename T>
void read(const Cell& cell, int64_t begin, int64_t size, T* values);
template <typename T>
void write(const Cell& cell, int64_t begin, int64_t size, const T* values);
void read(const Weight& weight, int64_t begin, int64_t size, float* values);
void write(const Weight& weight, int64_t begin, int64_t size, const float* values);

// Where to write the elements of `cell` from `begin` on before `store`. Returns the tensor's memory if it holds S,
// else `buffer`. A 16-bit S requires a cell of type S.
template <typename S>
S* place(const Cell& cell, int64_t begin, S* buffer) {
  if (is_narrow<S> || cell.dtype == dtype_of<S>) return static_cast<S*>(cell.address) + begin;
  return buffer;
}

// The elements of `cell` from `begin` on, in the place that `place` gives them.
template <typename S>
S* load(const Cell& cell, int64_t begin, int64_t size, S* buffer) {
  S* values = place(cell, begin, buffer);
  if constexpr (!is_narrow<S>) {
    if (cell.dtype != dtype_of<S>) read(cell, begin, size, values);
  }
  return values;
}

// The same of weights, one tile at most. Those with a master are float32, whatever the type of the parameter.
template <typename S>
S* load(const Weight& weight, int64_t begin, int64_t size, S* buffer) {
  if (is_narrow<S> || !weight.has_master()) return load(weight.param, begin, size, buffer);
  if constexpr (std::is_same_v<S, float>) {
    read(weight, begin, size, buffer);
  } else if constexpr (!is_narrow<S>) {
    float values[kTileNumel];
    read(weight, begin, size, values);
    std::copy(values, values + size, buffer);
  }
  return buffer;
}

// Writes back the values from `load` or `place`. Does nothing if they are the tensor's memory.
template <typename S>
void store(const Cell& cell, int64_t begin, int64_t size, const S* values) {
  if constexpr (!is_narrow<S>) {
    if (cell.dtype != dtype_of<S>) write(cell, begin, size, values);
  }
}

template <typename S>
void store(const Weight& weight, int64_t begin, int64_t size, const S* values) {
  if constexpr (std::is_same_v<S, float>) {
    if (weight.has_master()) return write(weight, begin, size, values);
  }
  store(weight.param, begin, size, values);
}

}  // namespace trainops::cpu
