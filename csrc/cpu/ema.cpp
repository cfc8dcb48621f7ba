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

template <bool small, typename Isa, typename A, typename P, typename T = Wide<A>>
TRAINOPS_HOST_DEVICE void move_all(A* average, P weights, int64_t size, EMAWeight<T> w) {
  for_each_element<Isa>(size, [w](T& a, T p) TRAINOPS_INLINE { a = ema_element<small>(a, p, w); }, average, weights);
}

#define TRAINOPS_EMA_FOR(Isa, target, A, P)                                     \
  target void move(A* average, P weights, int64_t size, EMAWeight<Wide<A>> w) { \
    if (w.small()) return move_all<true, Isa>(average, weights, size, w);       \
    move_all<false, Isa>(average, weights, size, w);                            \
  }
#define TRAINOPS_EMA(A, P) TRAINOPS_VERSIONS(TRAINOPS_EMA_FOR, A, P)
TRAINOPS_EMA(float, const float*)
TRAINOPS_EMA(double, const double*)
TRAINOPS_EMA(BFloat16, const BFloat16*)
TRAINOPS_EMA(Float16, const Float16*)
TRAINOPS_EMA(float, const BFloat16*)
TRAINOPS_EMA(float, const Float16*)
TRAINOPS_EMA(float, ConstSplitWeights)
#undef TRAINOPS_EMA
#undef TRAINOPS_EMA_FOR

template <typename A, typename P>
void move_tile(const Cell& average, const Weight& weight, int64_t begin, int64_t size, double decay) {
  A average_buffer[kTileNumel];
  P weight_buffer[kTileNumel];
  A* values = load(average, begin, size, average_buffer);
  const P* weights = load(weight, begin, size, weight_buffer);
  move(values, weights, size, EMAWeight<Wide<A>>(decay));
  store(average, begin, size, values);
}

}  // namespace

void ema_tile(const Cell& average, const Weight& weight, int64_t begin, int64_t size, double decay) {
  const DType param = weight.has_master() ? DType::float32 : stored(weight.param.dtype);
  const auto move_as = [&](auto a, auto p) {
    move_tile<decltype(a), decltype(p)>(average, weight, begin, size, decay);
  };
  if (average.dtype == DType::float32 && weight.is_split()) {
    return move(static_cast<float*>(average.address) + begin, split_weights<ConstSplitWeights>(weight, begin), size,
                EMAWeight<float>(decay));
  }
  if (average.dtype == DType::float64 || param == DType::float64) return move_as(double{}, double{});
  if (average.dtype == DType::float32 && param == DType::bfloat16) return move_as(float{}, BFloat16{});
  if (average.dtype == DType::float32 && param == DType::float16) return move_as(float{}, Float16{});
  with_type({average, Cell{weight.param.address, param}}, [&](auto type) { move_as(type, type); });
}

void ema(const Table& table, double decay, uint32_t seed) {
  Chunks(table).for_each_piece(Order::kBackward, [&](int64_t, const Piece& piece) {
    Cell average = table.cell(piece.row, kEMAAverage);
    const Places& places = table.places(piece.row);
    if (average.dtype == DType::stochastic) {
      average.random = {random_key(seed, places.first), static_cast<uint32_t>(places.origin)};
    }
    const Weight weight{table.cell(piece.row, kEMATensor), {}};
    for_each_tile(piece, [&](int64_t begin, int64_t size) { ema_tile(average, weight, begin, size, decay); });
  });
}

}  // namespace trainops::cpu
