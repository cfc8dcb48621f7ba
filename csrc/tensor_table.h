// What every kernel takes: one row per parameter, one cell per role (param, grad, exp_avg, ...), and a map that
// cuts all the rows into chunks of about equal size, so that ten thousand tensors and one large one cost alike.
//
// A table only describes memory; it owns none. All cells of a row have the same number of elements in the same
// memory order (tensor_table_from_python.h sees to that), so kernels treat a row as flat memory.
#pragma once

#include <cstdint>
#include <vector>

namespace trainops {

enum class DType : uint8_t { float32, float64, bfloat16, float16 };

// One tensor in one role. A null address means that the row has no tensor in that role, or is empty.
struct Cell {
  void* address = nullptr;
  DType dtype = DType::float32;
};

// Elements [begin, begin + size) of one row.
struct Piece {
  int64_t row, begin, size;
};

class TensorTable {
 public:
  explicit TensorTable(int64_t columns) : columns_(columns) {}

  void add_row(const Cell* cells, int64_t numel) {
    cells_.insert(cells_.end(), cells, cells + columns_);
    numel_.push_back(numel);
  }

  // Cuts the rows into pieces of at most `chunk_numel` elements, and gathers consecutive pieces into chunks of
  // about that many. Chunks are the unit of parallel work; the cut does not depend on how many threads there are.
  void cut(int64_t chunk_numel) {
    pieces_.clear();
    chunk_ends_.clear();
    int64_t filled = 0;
    for (int64_t row = 0; row < rows(); ++row) {
      for (int64_t begin = 0; begin < numel(row); begin += chunk_numel) {
        const int64_t size = numel(row) - begin < chunk_numel ? numel(row) - begin : chunk_numel;
        if (filled > 0 && filled + size > chunk_numel) {
          chunk_ends_.push_back(static_cast<int64_t>(pieces_.size()));
          filled = 0;
        }
        pieces_.push_back({row, begin, size});
        filled += size;
      }
    }
    if (filled > 0) chunk_ends_.push_back(static_cast<int64_t>(pieces_.size()));
  }

  int64_t columns() const { return columns_; }
  int64_t rows() const { return static_cast<int64_t>(numel_.size()); }
  int64_t numel(int64_t row) const { return numel_[row]; }
  const Cell& cell(int64_t row, int64_t column) const { return cells_[row * columns_ + column]; }

  int64_t chunks() const { return static_cast<int64_t>(chunk_ends_.size()); }
  int64_t first_piece(int64_t chunk) const { return chunk == 0 ? 0 : chunk_ends_[chunk - 1]; }
  int64_t last_piece(int64_t chunk) const { return chunk_ends_[chunk]; }  // one past the last
  const std::vector<Piece>& pieces() const { return pieces_; }

 private:
  int64_t columns_;
  std::vector<Cell> cells_;
  std::vector<int64_t> numel_;
  std::vector<Piece> pieces_;
  std::vector<int64_t> chunk_ends_;
};

}  // namespace trainops
