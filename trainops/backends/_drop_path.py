"""Which operands the DropPath kernels take, on every backend, and what they return."""

import torch
from torch import Tensor

from ..tensor_table import all_plain


def has_kernel(branch: Tensor, mask: Tensor, residual: Tensor | None, layer_scale: Tensor | None) -> bool:
    """Whether all are flat memory, sample by sample in the same order; others are left to the reference."""
    operands = [x for x in (branch, residual, layer_scale, mask) if x is not None]
    if not all_plain(operands) or not all(x.is_floating_point() and not x.is_neg() for x in operands):
        return False
    if mask.ndim != branch.ndim or mask.shape[0] != branch.shape[0]:
        return False
    if len({x.dtype == torch.float64 for x in operands}) > 1:
        return False
    if layer_scale is not None and not (layer_scale.ndim == 1 < branch.ndim and branch.is_contiguous()):
        return False
    if residual is not None and (residual.shape != branch.shape or residual.stride() != branch.stride()):
        return False
    return branch.is_contiguous() or any(
        branch.ndim == ndim and branch.is_contiguous(memory_format=memory_format)
        for ndim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d))
    )


def empty_result(branch: Tensor, mask: Tensor, residual: Tensor | None) -> Tensor:
    """Memory for the result, in the dtype that PyTorch gives it."""
    dtype = mask.dtype if residual is None else torch.promote_types(mask.dtype, residual.dtype)
    return torch.empty_like(branch, dtype=dtype)
