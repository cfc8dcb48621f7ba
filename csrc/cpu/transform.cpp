// Operations on the elements of each tensor, in place (math/transform.h): 8 bytes per float32 element.
#include "../math/transform.h"

#include <type_traits>

#include "convert.h"
#include "elements.h"
#include "kernels.h"

namespace trainops::cpu {
namespace {

// One named function for each operation and type, because only those can be compiled for several instruction sets.
#define TRAINOPS_TRANSFORM_FOR(Isa, target, S, Function)                                              \
  target void transform_run(S* values, int64_t size, Function<Wide<S>> function) {                    \
    for_each_element<Isa>(size, [function](Wide<S>& x) TRAINOPS_INLINE { x = function(x); }, values); \
  }
#define TRAINOPS_TRANSFORM(dtype, S, Function) TRAINOPS_VERSIONS(TRAINOPS_TRANSFORM_FOR, S, Function)
TRAINOPS_DTYPES(TRAINOPS_TRANSFORM, Scale)
TRAINOPS_DTYPES(TRAINOPS_TRANSFORM, Clamp)
#undef TRAINOPS_TRANSFORM
#undef TRAINOPS_TRANSFORM_FOR

template <template <typename> class Function>
void transform(const Table& table, double operand) {
  Chunks(table).for_each_piece(Order::kBackward, [&](int64_t, const Piece& piece) {
    const Cell& cell = table.cell(piece.row, 0);
    with_type({cell}, [&](auto type) {
      using S = decltype(type);
      const Function<Wide<S>> function{static_cast<Wide<S>>(operand)};
      transform_run(static_cast<S*>(cell.address) + piece.begin, piece.size, function);
    });
  });
}

}  // namespace

void scale(const Table& table, double coefficient) { transform<Scale>(table, coefficient); }
void clamp(const Table& table, double bound) { transform<Clamp>(table, bound); }

}  // namespace trainops::cpu
