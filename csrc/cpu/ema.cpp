// Exponential moving average of the weights: the formula is in math/ema.h.
// Reads ema and param, writes ema: 12 bytes per float32 element. Arithmetic in float32, or float64 for float64.
#include "ema.h"

#include "convert.h"
#include "kernels.h"

namespace trainops::cpu {

TRAINOPS_MULTIVERSION void ema_tile(float* __restrict average, const float* __restrict param, int64_t size,
                                    EMAWeight<float> weight) {
  for (int64_t i = 0; i < size; ++i) average[i] = ema_element(average[i], param[i], weight);
}

TRAINOPS_MULTIVERSION void ema_tile(double* __restrict average, const double* __restrict param, int64_t size,
                                    EMAWeight<double> weight) {
  for (int64_t i = 0; i < size; ++i) average[i] = ema_element(average[i], param[i], weight);
}

namespace {

template <typename T>
void ema_piece(const Cell& average, const Cell& param, const Piece& piece, double decay) {
  const EMAWeight<T> weight(decay);
  T average_buffer[kTileNumel], param_buffer[kTileNumel];
  for_each_tile(piece, [&](int64_t begin, int64_t size) {
    T* values = load(average, begin, size, average_buffer);
    ema_tile(values, load(param, begin, size, param_buffer), size, weight);
    store(average, begin, size, values);
  });
}

}  // namespace

void ema(const TensorTable& table, int64_t ema_column, int64_t param_column, double decay) {
  for_each_piece(table, [&](int64_t, const Piece& piece) {
    const Cell& average = table.cell(piece.row, ema_column);
    const Cell& param = table.cell(piece.row, param_column);
    if (average.dtype == DType::float64) {
      ema_piece<double>(average, param, piece, decay);
    } else {
      ema_piece<float>(average, param, piece, decay);
    }
  });
}

}  // namespace trainops::cpu
