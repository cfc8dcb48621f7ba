// DropPath with its residual and layer scale: the formula is in math/drop_path.h.
// Per element of a kept sample: reads branch and residual, writes out (12 bytes in float32). With a residual, a
// dropped sample's branch is not read. Arithmetic in float32, or float64 when all operands are.
#include "../math/drop_path.h"

#include <algorithm>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "parallel.h"

namespace trainops::cpu {
namespace {

template <bool has_residual, bool has_layer_scale, typename T, typename Round>
TRAINOPS_HOST_DEVICE void add(T* __restrict out, const T* __restrict residual, const T* __restrict branch,
                              const T* __restrict layer_scale, T mask, int64_t size, Round round) {
  for (int64_t i = 0; i < size; ++i) {
    const T term =
        drop_path_element<has_layer_scale>(branch[i], has_layer_scale ? layer_scale[i] : T(1), mask, round);
    out[i] = has_residual ? residual[i] + term : term;
  }
}

template <typename T, typename Round>
TRAINOPS_HOST_DEVICE void add(T* out, const T* residual, const T* branch, const T* layer_scale, T mask, int64_t size,
                              Round round) {
  if (residual != nullptr && layer_scale != nullptr) {
    add<true, true>(out, residual, branch, layer_scale, mask, size, round);
  } else if (residual != nullptr) {
    add<true, false>(out, residual, branch, layer_scale, mask, size, round);
  } else if (layer_scale != nullptr) {
    add<false, true>(out, residual, branch, layer_scale, mask, size, round);
  } else {
    add<false, false>(out, residual, branch, layer_scale, mask, size, round);
  }
}

#define TRAINOPS_ADD(name, T, Round)                                                                        \
  TRAINOPS_MULTIVERSION void name(T* out, const T* residual, const T* branch, const T* layer_scale, T mask, \
                                  int64_t size) {                                                           \
    add(out, residual, branch, layer_scale, mask, size, Round{});                                           \
  }
TRAINOPS_ADD(add_exact, float, RoundNothing)
TRAINOPS_ADD(add_exact, double, RoundNothing)
TRAINOPS_ADD(add_bfloat16, float, RoundTo<BFloat16>)
TRAINOPS_ADD(add_float16, float, RoundTo<Float16>)
#undef TRAINOPS_ADD

// Products have the type of the mask.
void add_tile(DType dtype, float* out, const float* residual, const float* branch, const float* layer_scale,
              float mask, int64_t size) {
  const auto add = dtype == DType::bfloat16  ? add_bfloat16
                   : dtype == DType::float16 ? add_float16
                                             : static_cast<decltype(&add_bfloat16)>(add_exact);
  add(out, residual, branch, layer_scale, mask, size);
}

void add_tile(DType, double* out, const double* residual, const double* branch, const double* layer_scale,
              double mask, int64_t size) {
  add_exact(out, residual, branch, layer_scale, mask, size);
}

// Layer scale, repeated so often that tiles of whole rows can start at its first element.
template <typename T>
std::vector<T> repeat_layer_scale(const DropPath& args) {
  if (args.layer_scale.address == nullptr) return {};
  std::vector<T> once(args.channels);
  const T* values = load(args.layer_scale, 0, args.channels, once.data());
  std::vector<T> repeated;
  do {
    repeated.insert(repeated.end(), values, values + args.channels);
  } while (static_cast<int64_t>(repeated.size()) + args.channels <= kTileNumel);
  return repeated;
}

template <typename T>
void run(const DropPath& args) {
  const std::vector<T> layer_scale = repeat_layer_scale<T>(args);
  const int64_t period = layer_scale.empty() ? kTileNumel : static_cast<int64_t>(layer_scale.size());
  const auto tile = [&](T mask, int64_t offset, int64_t begin, int64_t size) {
    T out_buffer[kTileNumel], residual_buffer[kTileNumel], branch_buffer[kTileNumel];
    const bool has_residual = args.residual.address != nullptr;
    T* out = place(args.out, offset, out_buffer);
    const T* residual = has_residual ? load(args.residual, offset, size, residual_buffer) : nullptr;
    if (mask != T(0) || !has_residual) {  // without a residual the product is taken, as timm takes it: -0.0, NaN
      const T* scale = layer_scale.empty() ? nullptr : layer_scale.data() + begin % period;
      add_tile(args.mask.dtype, out, residual, load(args.branch, offset, size, branch_buffer), scale, mask, size);
    } else {
      std::copy(residual, residual + size, out);
    }
    store(args.out, offset, size, out);
  };

  TensorTable samples(1);
  for (int64_t i = 0; i < args.samples; ++i) samples.add_row(&args.out, args.sample_numel);
  samples.cut(kChunkNumel);
  for_each_piece(samples, [&](int64_t, const Piece& piece) {
    T mask_buffer[1];
    const T mask = *load(args.mask, piece.row, 1, mask_buffer);
    const int64_t end = piece.begin + piece.size;
    for (int64_t begin = piece.begin, size = 0; begin < end; begin += size) {
      size = std::min({kTileNumel, period - begin % period, end - begin});
      tile(mask, piece.row * args.sample_numel + begin, begin, size);
    }
  });
}

}  // namespace

void drop_path(const DropPath& args) {
  if (args.branch.dtype == DType::float64) {
    run<double>(args);
  } else {
    run<float>(args);
  }
}

}  // namespace trainops::cpu
