// The derivative of DropPath: the formula is in math/drop_path.h.
//
//   of_branch      = grad * layer_scale * mask[sample]
//   of_layer_scale = sum over samples and positions of grad * mask[sample] * branch
//
// Per element: reads grad and branch, writes of_branch (12 bytes in float32). A dropped sample's branch is not read.
// Arithmetic as forward's; sums in float64, chunk by chunk and then over the chunks, in an order that depends on the
// sizes alone.
#include "drop_path.h"
#include "memory.h"

namespace trainops::cpu {
namespace {

template <bool is_kept, typename S, typename T, typename Round>
TRAINOPS_HOST_DEVICE void differentiate(S* __restrict of_branch, double* __restrict totals, const S* __restrict grad,
                                        const S* __restrict branch, const T* __restrict layer_scale, T mask,
                                        int64_t size, Round round) {
  for (int64_t i = 0; i < size; ++i) {
    const T g = read_operand(grad[i], round);
    // A branch that was dropped is not read; an infinite gradient makes NaN there, too.
    totals[i] += static_cast<double>(is_kept ? g * mask * widen(branch[i]) : g * mask);
    narrow(drop_path_element<true>(g, layer_scale[i], mask, round), of_branch[i]);
  }
}

#define TRAINOPS_DIFFERENTIATE(S, Round)                                                                      \
  TRAINOPS_MULTIVERSION void differentiate_tile(S* of_branch, double* totals, const S* grad, const S* branch, \
                                                const Wide<S>* layer_scale, Wide<S> mask, int64_t size,       \
                                                Round round) {                                                \
    if (mask != 0) {                                                                                          \
      differentiate<true>(of_branch, totals, grad, branch, layer_scale, mask, size, round);                   \
    } else {                                                                                                  \
      differentiate<false>(of_branch, totals, grad, branch, layer_scale, mask, size, round);                  \
    }                                                                                                         \
  }
TRAINOPS_FOR_EACH_ROUNDING(TRAINOPS_DIFFERENTIATE)
#undef TRAINOPS_DIFFERENTIATE

// Adds up rows of `channels` sums pairwise, so that rounding errors do not add up with their number, into the first.
void add_up(std::vector<double>& sums, int64_t channels) {
  const auto size = static_cast<int64_t>(sums.size());
  for (int64_t step = channels; step < size; step *= 2) {
    for (int64_t row = 0; row + step < size; row += 2 * step) {
      for (int64_t i = row; i < row + channels; ++i) sums[i] += sums[i + step];
    }
  }
}

template <typename S>
void run(const DropPathBackward& args) {
  const std::vector<Wide<S>> layer_scale = repeat_layer_scale<Wide<S>>(args.layer_scale, args.channels);
  const auto period = static_cast<int64_t>(layer_scale.size());
  const int64_t numel = args.samples * args.sample_numel;
  const int64_t chunk_numel = std::max(kChunkNumel, 16 * period);  // so that sums are few beside the elements
  std::vector<double> totals((numel + chunk_numel - 1) / chunk_numel * period, 0.0);
  const auto body = [&](int64_t chunk, const SampleTile& tile) {
    S of_branch_buffer[kTileNumel], grad_buffer[kTileNumel], branch_buffer[kTileNumel];
    const auto mask = mask_of<Wide<S>>(args.mask, tile.sample);
    const int64_t begin = tile.sample * args.sample_numel + tile.begin, channel = begin % period;
    const int64_t grad_offset = row_of(args.rows, tile.sample) * args.sample_numel + tile.begin;
    S* of_branch = place(args.of_branch, begin, of_branch_buffer);
    const S* branch = mask == 0 ? nullptr : load(args.branch, begin, tile.size, branch_buffer);
    const S* grad = load(args.grad, grad_offset, tile.size, grad_buffer);
    with_rounding<S>(args.mask.dtype, [&](auto round) {
      differentiate_tile(of_branch, totals.data() + chunk * period + channel, grad, branch,
                         layer_scale.data() + channel, mask, tile.size, round);
    });
    store(args.of_branch, begin, tile.size, of_branch);
  };
  for_each_sample_tile(args.samples, args.sample_numel, period, chunk_numel, body);

  add_up(totals, args.channels);
  double* of_layer_scale = place(args.of_layer_scale, 0, totals.data());
  if (of_layer_scale != totals.data()) std::copy_n(totals.begin(), args.channels, of_layer_scale);
  store(args.of_layer_scale, 0, args.channels, totals.data());
}

}  // namespace

void drop_path_backward(const DropPathBackward& args) {
  want_huge_pages(args.of_branch, args.samples * args.sample_numel);
  with_type({args.of_branch, args.grad, args.branch, args.mask}, [&](auto type) { run<decltype(type)>(args); });
}

}  // namespace trainops::cpu
