// Tensors of any type as values of the type that the arithmetic is done in: the formulas are in math/float16.h.
#pragma once

#include "../math/float16.h"
#include "../tensor_table.h"
#include "parallel.h"

namespace trainops::cpu {

template <typename T>
constexpr DType dtype_of = sizeof(T) == 4 ? DType::float32 : DType::float64;

// The elements of `cell` from `begin` on, as T: the memory itself where it holds T, else widened into `buffer`.
// T is the type of the arithmetic, float or double.
template <typename T>
T* load(const Cell& cell, int64_t begin, int64_t size, T* buffer);

// Where to write the elements of `cell` from `begin` on before `store`: the memory itself, or `buffer`.
template <typename T>
T* place(const Cell& cell, int64_t begin, T* buffer) {
  return cell.dtype == dtype_of<T> ? static_cast<T*>(cell.address) + begin : buffer;
}

// Writes back what `load` or `place` gave: nothing to do where `values` is the memory itself.
template <typename T>
void store(const Cell& cell, int64_t begin, int64_t size, const T* values);

}  // namespace trainops::cpu
