// What DropPath of small tensors needs beside PyTorch's operations: see trainops/drop_path_small.py.
#include <algorithm>
#include <cstring>

#include "convert.h"
#include "kernels.h"

namespace trainops::cpu {

// Has the bits of PyTorch's mask.div_(keep_prob): the quotient is computed in the type of the arithmetic and rounded.
void scale_kept(const Cell& mask, int64_t samples, double keep_prob) {
  with_type({mask}, [&](auto type) {
    using S = decltype(type);
    const auto divisor = static_cast<Wide<S>>(keep_prob);
    S* values = static_cast<S*>(mask.address);
    for (int64_t i = 0; i < samples; ++i) narrow(widen(values[i]) / divisor, values[i]);
  });
}

// After PyTorch's operations have computed residual + branch * 0. Those give NaN if the branch is not finite, and 0.0
// if the residual is -0.0. Reads the mask, and only of dropped samples the residual; writes only dropped samples.
void restore_dropped(const RestoreDropped& args) {
  const int64_t mask_bytes = itemsize(args.mask.dtype), sample_bytes = args.sample_numel * itemsize(args.out.dtype);
  const auto* mask = static_cast<const char*>(args.mask.address);
  const auto* residual = static_cast<const char*>(args.residual.address);
  auto* out = static_cast<char*>(args.out.address);
  for (int64_t i = 0; i < args.samples; ++i, mask += mask_bytes, residual += sample_bytes, out += sample_bytes) {
    const bool dropped = std::all_of(mask, mask + mask_bytes, [](char byte) { return byte == 0; });
    if (dropped) std::memcpy(out, residual, sample_bytes);
  }
}

}  // namespace trainops::cpu
