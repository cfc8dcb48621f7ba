// The argument of most kernels: one row per parameter, and in it one cell per column (schema.h).
//
// A table only describes memory; it owns none. All cells of a row have the same number of elements in the same memory
// order, except for columns with one element per row (`step`). table_builder.h ensures this, so kernels treat a row
// as flat memory.
#pragma once

#include <cstdint>
#include <vector>

#include "../math/host_device.h"

namespace trainops {

enum class DType : uint8_t { float32, float64, bfloat16, float16, none };

TRAINOPS_HOST_DEVICE int itemsize(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// One tensor in one column. The address may be null if the tensor has no elements. `none`: there is no tensor.
struct Cell {
  void* address = nullptr;
  DType dtype = DType::none;
};

class Table {
 public:
  explicit Table(int64_t columns) : columns_(columns) {}

  void add_row(const Cell* cells, int64_t numel) {
    cells_.insert(cells_.end(), cells, cells + columns_);
    numel_.push_back(numel);
  }

  int64_t columns() const { return columns_; }
  int64_t rows() const { return static_cast<int64_t>(numel_.size()); }
  int64_t numel(int64_t row) const { return numel_[row]; }
  const Cell& cell(int64_t row, int64_t column) const { return cells_[row * columns_ + column]; }

 private:
  int64_t columns_;
  std::vector<Cell> cells_;
  std::vector<int64_t> numel_;
};

}  // namespace trainops
