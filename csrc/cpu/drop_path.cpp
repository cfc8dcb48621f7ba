// DropPath with its residual and layer scale: the formula is in math/drop_path.h.
// Per element of a kept sample: reads branch and residual, writes out (12 bytes in float32). With a residual, a
// dropped sample's branch is not read. Arithmetic in float32, or float64 when all operands are.
#include "drop_path.h"

#include "memory.h"

namespace trainops::cpu {
namespace {

// `first` rounds the branch, which may come in a wider type than that of the products.
template <bool has_residual, bool has_layer_scale, typename S, typename T, typename First, typename Round>
TRAINOPS_HOST_DEVICE void add(S* __restrict out, const S* __restrict residual, const S* __restrict branch,
                              const T* __restrict layer_scale, T mask, int64_t size, First first, Round round) {
  for (int64_t i = 0; i < size; ++i) {
    const T x = first(widen(branch[i]));
    const T term = drop_path_element<has_layer_scale>(x, has_layer_scale ? layer_scale[i] : T(1), mask, round);
    narrow(has_residual ? widen(residual[i]) + term : term, out[i]);
  }
}

template <typename S, typename T, typename First, typename Round>
TRAINOPS_HOST_DEVICE void add(S* out, const S* residual, const S* branch, const T* layer_scale, T mask, int64_t size,
                              First first, Round round) {
  if (residual != nullptr && layer_scale != nullptr) {
    add<true, true>(out, residual, branch, layer_scale, mask, size, first, round);
  } else if (residual != nullptr) {
    add<true, false>(out, residual, branch, layer_scale, mask, size, first, round);
  } else if (layer_scale != nullptr) {
    add<false, true>(out, residual, branch, layer_scale, mask, size, first, round);
  } else {
    add<false, false>(out, residual, branch, layer_scale, mask, size, first, round);
  }
}

#define TRAINOPS_ADD(name, S, First, Round)                                                                       \
  TRAINOPS_MULTIVERSION void name(S* out, const S* residual, const S* branch, const Wide<S>* scale, Wide<S> mask, \
                                  int64_t size) {                                                                 \
    add(out, residual, branch, scale, mask, size, First{}, Round{});                                              \
  }
TRAINOPS_ADD(add_exact, float, RoundNothing, RoundNothing)
TRAINOPS_ADD(add_exact, double, RoundNothing, RoundNothing)
TRAINOPS_ADD(add_bfloat16, float, RoundTo<BFloat16>, RoundTo<BFloat16>)
TRAINOPS_ADD(add_float16, float, RoundTo<Float16>, RoundTo<Float16>)
TRAINOPS_ADD(add_narrow, BFloat16, RoundNothing, RoundTo<BFloat16>)
TRAINOPS_ADD(add_narrow, Float16, RoundNothing, RoundTo<Float16>)
#undef TRAINOPS_ADD

// The function for tiles of S and products of a type.
template <typename S>
auto add_of(DType products) {
  using Add = void (*)(S*, const S*, const S*, const Wide<S>*, Wide<S>, int64_t);
  if constexpr (is_narrow<S>) {
    return static_cast<Add>(add_narrow);
  } else {
    if constexpr (sizeof(S) == sizeof(float)) {
      if (products == DType::bfloat16) return static_cast<Add>(add_bfloat16);
      if (products == DType::float16) return static_cast<Add>(add_float16);
    }
    return static_cast<Add>(add_exact);
  }
}

template <typename S>
void run(const DropPath& args) {
  const auto add = add_of<S>(args.mask.dtype);
  const bool has_residual = args.residual.address != nullptr;
  const std::vector<Wide<S>> layer_scale = repeat_layer_scale<Wide<S>>(args.layer_scale, args.channels);
  const int64_t period = layer_scale.empty() ? kTileNumel : static_cast<int64_t>(layer_scale.size());
  const auto body = [&](int64_t, const SampleTile& tile) {
    S out_buffer[kTileNumel], residual_buffer[kTileNumel], branch_buffer[kTileNumel];
    const auto mask = mask_of<Wide<S>>(args.mask, tile.sample);
    const int64_t begin = tile.sample * args.sample_numel + tile.begin;
    S* out = place(args.out, begin, out_buffer);
    const S* residual = has_residual ? load(args.residual, begin, tile.size, residual_buffer) : nullptr;
    if (mask != 0 || !has_residual) {  // without a residual the product is taken, as timm takes it: -0.0, NaN
      const int64_t of_branch = row_of(args.rows, tile.sample) * args.sample_numel + tile.begin;
      const S* branch = load(args.branch, of_branch, tile.size, branch_buffer);
      add(out, residual, branch, layer_scale.empty() ? nullptr : layer_scale.data() + begin % period, mask,
          tile.size);
    } else {
      std::copy(residual, residual + tile.size, out);
    }
    store(args.out, begin, tile.size, out);
  };
  for_each_sample_tile(args.samples, args.sample_numel, period, kChunkNumel, body);
}

}  // namespace

void drop_path(const DropPath& args) {
  want_huge_pages(args.out, args.samples * args.sample_numel);
  with_type({args.out, args.residual, args.branch, args.mask}, [&](auto type) { run<decltype(type)>(args); });
}

}  // namespace trainops::cpu
