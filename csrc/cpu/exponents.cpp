// Counts elements by binary exponent (math/moments.h): 4 bytes per float32 element. First come the bins of a tile, in
// vectors; then they are counted one by one, in several tables in turn, because neighbours often have one bin, and a
// count has to wait for the one before it in the same place.
#include "../math/moments.h"
#include "convert.h"
#include "kernels.h"

namespace trainops::cpu {
namespace {

constexpr int kTables = 4, kBins = kExponentBins + 1;  // the last bin is of no exponent
static_assert(kBins == 256, "a bin is a byte");

template <typename T>
TRAINOPS_HOST_DEVICE void find_bins(const T* values, int64_t size, uint8_t* bins) {
  for (int64_t i = 0; i < size; ++i) bins[i] = static_cast<uint8_t>(exponent_bin(values[i]));
}

// A named function, because only those can be compiled for several instruction sets. (Of double there is one: not all
// of these compare lanes of 64 bits.)
TRAINOPS_MULTIVERSION void bins_of_tile(const float* values, int64_t size, uint8_t* bins) {
  find_bins(values, size, bins);
}
void bins_of_tile(const double* values, int64_t size, uint8_t* bins) { find_bins(values, size, bins); }

template <typename T>
void count_piece(const Cell& cell, const Piece& piece, int32_t* counts) {
  int32_t tables[kTables][kBins] = {};
  for_each_tile(piece, [&](int64_t begin, int64_t size) {
    T buffer[kTileNumel];
    uint8_t bins[kTileNumel];
    bins_of_tile(load(cell, begin, size, buffer), size, bins);
    const int64_t body = size / kTables * kTables;
    for (int64_t i = 0; i < body; i += kTables) {
      for (int k = 0; k < kTables; ++k) ++tables[k][bins[i + k]];
    }
    for (int64_t i = body; i < size; ++i) ++tables[0][bins[i]];
  });
  for (int bin = 0; bin < kExponentBins; ++bin) {
    counts[bin] = 0;
    for (int k = 0; k < kTables; ++k) counts[bin] += tables[k][bin];
  }
}

}  // namespace

void count_exponents(const Table& table, const Chunks& chunks, int64_t column, int64_t* counts) {
  const std::vector<Piece>& pieces = chunks.pieces();
  std::vector<int32_t> partial(pieces.size() * kExponentBins);
  chunks.for_each_piece(Order::kForward, [&](int64_t index, const Piece& piece) {
    const Cell& cell = table.cell(piece.row, column);
    int32_t* const own = partial.data() + index * kExponentBins;
    cell.dtype == DType::float64 ? count_piece<double>(cell, piece, own) : count_piece<float>(cell, piece, own);
  });
  for (size_t index = 0; index < pieces.size(); ++index) {
    int64_t* const row = counts + pieces[index].row * kExponentBins;
    for (int bin = 0; bin < kExponentBins; ++bin) row[bin] += partial[index * kExponentBins + bin];
  }
}

}  // namespace trainops::cpu
