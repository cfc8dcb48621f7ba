// Exponential moving average of the weights: the formula is in math/ema.h.
// Reads ema and param, writes ema: 12 bytes per float32 element. Arithmetic in float32, or float64 for float64.
#include "ema.h"

#include "../math/ema.h"
#include "convert.h"
#include "kernels.h"

namespace trainops::cpu {

namespace {

#define TRAINOPS_EMA(T)                                                                                             \
  TRAINOPS_MULTIVERSION void move(T* __restrict average, const T* __restrict param, int64_t size, EMAWeight<T> w) { \
    for (int64_t i = 0; i < size; ++i) average[i] = ema_element(average[i], param[i], w);                           \
  }
TRAINOPS_EMA(float)
TRAINOPS_EMA(double)
#undef TRAINOPS_EMA

template <typename T>
void move_tile(const Cell& average, const Cell& param, int64_t begin, int64_t size, double decay) {
  T average_buffer[kTileNumel], param_buffer[kTileNumel];
  T* values = load(average, begin, size, average_buffer);
  move(values, load(param, begin, size, param_buffer), size, EMAWeight<T>(decay));
  store(average, begin, size, values);
}

}  // namespace

void ema_tile(const Cell& average, const Cell& param, int64_t begin, int64_t size, double decay) {
  if (average.dtype == DType::float64 || param.dtype == DType::float64) {
    move_tile<double>(average, param, begin, size, decay);
  } else {
    move_tile<float>(average, param, begin, size, decay);
  }
}

void ema(const TensorTable& table, int64_t ema_column, int64_t param_column, double decay) {
  for_each_piece(table, [&](int64_t, const Piece& piece) {
    const Cell& average = table.cell(piece.row, ema_column);
    const Cell& param = table.cell(piece.row, param_column);
    for_each_tile(piece, [&](int64_t begin, int64_t size) { ema_tile(average, param, begin, size, decay); });
  });
}

}  // namespace trainops::cpu
