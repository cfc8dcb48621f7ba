// The argument of most kernels: one row per parameter, and in it one cell per column (schema.h).
//
// A table only describes memory; it owns none. All cells of a row have the same number of elements in the same memory
// order, except for columns with one element per row (`step`). table_builder.h ensures this, so kernels treat a row
// as flat memory.
#pragma once

#include <cstdint>
#include <vector>

#include "../math/host_device.h"
#include "../math/random.h"

namespace trainops {

// The types of stored numbers: macro(torch's name, type in C++, ...) for each. storage.h has the types that C++
// lacks.
#define TRAINOPS_DTYPES(macro, ...)                                                                             \
  macro(float32, float, __VA_ARGS__) macro(float64, double, __VA_ARGS__) macro(bfloat16, BFloat16, __VA_ARGS__) \
      macro(float16, Float16, __VA_ARGS__)

// No numbers that loops take are int16, a remainder (storage.h), which belongs to the parameter beside it, and byte,
// of a tensor of any type that is copied. `stochastic` is bfloat16 that is rounded stochastically where it is
// written. Codes are 8-bit state (math/codes.h).
#define TRAINOPS_DTYPE(name, ...) name,
enum class DType : uint8_t {
  TRAINOPS_DTYPES(TRAINOPS_DTYPE) int16,
  byte,
  stochastic,
  signed_codes,
  unsigned_codes,
  none
};
#undef TRAINOPS_DTYPE

TRAINOPS_HOST_DEVICE bool is_codes(DType dtype) {
  return dtype == DType::signed_codes || dtype == DType::unsigned_codes;
}

TRAINOPS_HOST_DEVICE int itemsize(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : is_codes(dtype) ? 1 : 2;
}

// Whether a parameter of one type may have a master of the other (storage.h).
constexpr bool may_have_master(DType param, DType master) {
  return (param == DType::bfloat16 && (master == DType::int16 || master == DType::float32)) ||
         (param == DType::float16 && master == DType::float32);
}

// The type that elements are read as.
TRAINOPS_HOST_DEVICE DType stored(DType dtype) { return dtype == DType::stochastic ? DType::bfloat16 : dtype; }

// One tensor in one column. The address may be null if the tensor has no elements. `none`: there is no tensor.
// `random`: of a cell that is `stochastic`; kernels set it, from the places of the row. `scales`: of a cell of codes;
// CPU kernels set it.
struct Cell {
  void* address = nullptr;
  DType dtype = DType::none;
  Random random = {};
  uint8_t* scales = nullptr;
};

// Averages that a step moves in one pass.
constexpr int kMaxAverages = 4;

// What random bits of a row depend on, beside the seed and the step. A negative place: no random bits.
struct Places {
  int64_t first = -1;  // of the first column: the parameter's place in `param_groups`, or the average's in its model
  int64_t averages[kMaxAverages] = {-1, -1, -1, -1};  // of averages that a step moves
  int64_t origin = 0;        // of a shard: the index of its first element in the whole parameter
  bool rounds_first = true;  // false: the first place is for 8-bit state alone
};

// The weight of a row: its parameter, and its master if it has one.
struct Weight {
  Cell param, master;

  TRAINOPS_HOST_DEVICE bool has_master() const { return master.dtype != DType::none; }
  TRAINOPS_HOST_DEVICE bool is_split() const { return master.dtype == DType::int16; }
};

// The types of a row's columns make one word on a device. The lowest bits are the first column's.
constexpr int kDTypeBits = 4, kMaxColumns = 63 / kDTypeBits;  // the word's sign stays free
static_assert(static_cast<int>(DType::none) < 1 << kDTypeBits, "a type fits");

TRAINOPS_HOST_DEVICE int64_t dtype_bits(DType dtype, int64_t column) {
  return static_cast<int64_t>(dtype) << (kDTypeBits * column);
}
TRAINOPS_HOST_DEVICE DType dtype_of_column(int64_t word, int column) {
  return static_cast<DType>(word >> (kDTypeBits * column) & ((1 << kDTypeBits) - 1));
}

// What random bits of a step depend on, beside the places: 32-bit words (math/random.h).
struct Seeds {
  uint32_t params = 0;
  uint32_t averages[kMaxAverages] = {};
};

class Table {
 public:
  explicit Table(int64_t columns) : columns_(columns) {}

  void add_row(const Cell* cells, int64_t numel, const Places& places = {}) {
    cells_.insert(cells_.end(), cells, cells + columns_);
    numel_.push_back(numel);
    places_.push_back(places);
  }

  // Adds a row behind all others. Only kernels that know of buffers look at it.
  void add_buffer(const Cell* cells, int64_t numel, const Places& places) {
    add_row(cells, numel, places);
    ++buffers_;
  }

  int64_t columns() const { return columns_; }
  int64_t rows() const { return all_rows() - buffers_; }
  int64_t all_rows() const { return static_cast<int64_t>(numel_.size()); }
  int64_t numel(int64_t row) const { return numel_[row]; }
  const Cell& cell(int64_t row, int64_t column) const { return cells_[row * columns_ + column]; }
  const Places& places(int64_t row) const { return places_[row]; }

 private:
  int64_t columns_, buffers_ = 0;
  std::vector<Cell> cells_;
  std::vector<int64_t> numel_;
  std::vector<Places> places_;
};

}  // namespace trainops
