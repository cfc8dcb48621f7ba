// DropPath with its residual and layer scale: the formula is in math/drop_path.h.
// Per element of a kept sample: reads branch and residual, writes out (12 bytes in float32). With a residual, a
// dropped sample's branch is not read. Arithmetic in float32, or float64 when all operands are.
#include "drop_path.h"

#include "memory.h"

namespace trainops::cpu {
namespace {

template <bool has_residual, bool has_layer_scale, typename S, typename T, typename Round>
TRAINOPS_HOST_DEVICE void add(S* __restrict out, const S* __restrict residual, const S* __restrict branch,
                              const T* __restrict layer_scale, T mask, int64_t size, Round round) {
  for (int64_t i = 0; i < size; ++i) {
    const T x = read_operand(branch[i], round);
    const T term = drop_path_element<has_layer_scale>(x, has_layer_scale ? layer_scale[i] : T(1), mask, round);
    narrow(has_residual ? widen(residual[i]) + term : term, out[i]);
  }
}

#define TRAINOPS_ADD(S, Round)                                                                          \
  TRAINOPS_MULTIVERSION void add_tile(S* out, const S* residual, const S* branch, const Wide<S>* scale, \
                                      Wide<S> mask, int64_t size, Round round) {                        \
    if (residual != nullptr && scale != nullptr) {                                                      \
      add<true, true>(out, residual, branch, scale, mask, size, round);                                 \
    } else if (residual != nullptr) {                                                                   \
      add<true, false>(out, residual, branch, scale, mask, size, round);                                \
    } else if (scale != nullptr) {                                                                      \
      add<false, true>(out, residual, branch, scale, mask, size, round);                                \
    } else {                                                                                            \
      add<false, false>(out, residual, branch, scale, mask, size, round);                               \
    }                                                                                                   \
  }
TRAINOPS_FOR_EACH_ROUNDING(TRAINOPS_ADD)
#undef TRAINOPS_ADD

template <typename S>
void run(const DropPath& args) {
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
      const int64_t branch_offset = row_of(args.rows, tile.sample) * args.sample_numel + tile.begin;
      const S* branch = load(args.branch, branch_offset, tile.size, branch_buffer);
      const Wide<S>* scale = layer_scale.empty() ? nullptr : layer_scale.data() + begin % period;
      with_rounding<S>(args.mask.dtype,
                       [&](auto round) { add_tile(out, residual, branch, scale, mask, tile.size, round); });
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
