// Exponential moving average of the weights: the formula is in math/ema.h.
// Reads ema and param, writes ema: 12 bytes per float32 element. Arithmetic in float32, or float64 for float64.
#include "ema.h"

#include "../core/schema.h"
#include "../math/ema.h"
#include "convert.h"
#include "elements.h"
#include "kernels.h"

namespace trainops::cpu {

namespace {

template <bool small, typename A, typename P, typename T = Wide<A>>
TRAINOPS_HOST_DEVICE void move_all(A* average, const P* param, int64_t size, EMAWeight<T> w) {
  for_each_element(size, [w](T& a, T p) TRAINOPS_INLINE { a = ema_element<small>(a, p, w); }, average, param);
}

#define TRAINOPS_EMA(A, P)                                                                          \
  TRAINOPS_MULTIVERSION void move(A* average, const P* param, int64_t size, EMAWeight<Wide<A>> w) { \
    if (w.small()) return move_all<true>(average, param, size, w);                                  \
    move_all<false>(average, param, size, w);                                                       \
  }
TRAINOPS_EMA(float, float)
TRAINOPS_EMA(double, double)
TRAINOPS_EMA(BFloat16, BFloat16)
TRAINOPS_EMA(Float16, Float16)
TRAINOPS_EMA(float, BFloat16)
TRAINOPS_EMA(float, Float16)
#undef TRAINOPS_EMA

template <typename A, typename P>
void move_tile(const Cell& average, const Cell& param, int64_t begin, int64_t size, double decay) {
  A average_buffer[kTileNumel];
  P param_buffer[kTileNumel];
  A* values = load(average, begin, size, average_buffer);
  move(values, load(param, begin, size, param_buffer), size, EMAWeight<Wide<A>>(decay));
  store(average, begin, size, values);
}

}  // namespace

void ema_tile(const Cell& average, const Cell& param, int64_t begin, int64_t size, double decay) {
  const auto move_as = [&](auto a, auto p) {
    move_tile<decltype(a), decltype(p)>(average, param, begin, size, decay);
  };
  if (average.dtype == DType::float64 || param.dtype == DType::float64) return move_as(double{}, double{});
  if (average.dtype == DType::float32 && param.dtype == DType::bfloat16) return move_as(float{}, BFloat16{});
  if (average.dtype == DType::float32 && param.dtype == DType::float16) return move_as(float{}, Float16{});
  with_type({average, param}, [&](auto type) { move_as(type, type); });
}

void ema(const Table& table, double decay) {
  Chunks(table).for_each_piece(Order::kBackward, [&](int64_t, const Piece& piece) {
    const Cell& average = table.cell(piece.row, kEMAAverage);
    const Cell& tensor = table.cell(piece.row, kEMATensor);
    for_each_tile(piece, [&](int64_t begin, int64_t size) { ema_tile(average, tensor, begin, size, decay); });
  });
}

}  // namespace trainops::cpu
