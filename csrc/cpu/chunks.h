// A table cut into units of parallel work, of about equal size: ten thousand tensors and one large one cost alike.
#pragma once

#include <vector>

#include "../core/table.h"
#include "parallel.h"

namespace trainops::cpu {

// Elements [begin, begin + size) of one row.
struct Piece {
  int64_t row, begin, size;
};

// The order in which chunks are started. The norm reads gradients forward; the update that follows goes backward, so
// that it begins with the gradients that are still in the cache.
enum class Order { kForward, kBackward };

// Pieces of at most kChunkNumel elements; consecutive pieces are gathered into chunks of about that many. The cut
// does not depend on how many threads there are.
class Chunks {
 public:
  explicit Chunks(const Table& table) : Chunks(table, 0, table.rows()) {}

  // Those of the rows [first_row, end_row).
  Chunks(const Table& table, int64_t first_row, int64_t end_row) {
    int64_t filled = 0;
    for (int64_t row = first_row; row < end_row; ++row) {
      for (int64_t begin = 0; begin < table.numel(row); begin += kChunkNumel) {
        const int64_t left = table.numel(row) - begin, size = left < kChunkNumel ? left : kChunkNumel;
        if (filled > 0 && filled + size > kChunkNumel) close(filled);
        pieces_.push_back({row, begin, size});
        filled += size;
      }
    }
    if (filled > 0) close(filled);
  }

  const std::vector<Piece>& pieces() const { return pieces_; }

  // Calls body(piece index, piece) for every piece, chunks in parallel.
  template <typename Body>
  void for_each_piece(Order order, Body body) const {
    const auto count = static_cast<int64_t>(ends_.size());
    for_each_in_parallel(count, [&](int64_t i) {
      const int64_t chunk = order == Order::kForward ? i : count - 1 - i;
      for (int64_t p = chunk == 0 ? 0 : ends_[chunk - 1]; p < ends_[chunk]; ++p) body(p, pieces_[p]);
    });
  }

 private:
  void close(int64_t& filled) {
    ends_.push_back(static_cast<int64_t>(pieces_.size()));
    filled = 0;
  }

  std::vector<Piece> pieces_;
  std::vector<int64_t> ends_;  // of each chunk: one past its last piece
};

// Calls body(begin, size) for every tile of the piece.
template <typename Body>
void for_each_tile(const Piece& piece, Body body) {
  for (int64_t done = 0; done < piece.size; done += kTileNumel) {
    const int64_t left = piece.size - done;
    body(piece.begin + done, left < kTileNumel ? left : kTileNumel);
  }
}

}  // namespace trainops::cpu
