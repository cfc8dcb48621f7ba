// Gives dropped samples the residual's bits after PyTorch's operations have computed residual + branch * 0. Those
// give NaN if the branch is not finite, and 0.0 if the residual is -0.0. Reads the mask, and only of dropped samples
// the residual; writes only dropped samples.
#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace trainops::cpu {

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
