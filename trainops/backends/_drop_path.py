"""DropPath around the kernels of a backend: which operands they take, and the memory for what they return."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..tensor_table import all_plain

# (out, residual, branch, layer_scale, mask, rows, samples, sample_numel, channels), the tensors as `has_kernel` wants
# them and none empty; the results are written.
Launch = Callable[..., None]

# (of_branch, of_layer_scale, grad, branch, layer_scale, mask, rows, samples, sample_numel, channels), likewise.
LaunchBackward = Callable[..., None]

Operation = Callable[..., Any]

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def operations(launch: Launch, launch_backward: LaunchBackward) -> tuple[Operation, Operation]:
    """A backend's ``drop_path`` and ``drop_path_backward``; the reference serves what the kernels do not take."""

    def drop_path(
        branch: Tensor,
        mask: Tensor,
        residual: Tensor | None = None,
        layer_scale: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """See :func:`trainops.reference.drop_path`, which also serves broadcasting and unusual layouts."""
        if not has_kernel(branch, mask, residual, layer_scale, rows):
            return reference.drop_path(branch, mask, residual, layer_scale, rows)
        return forward(branch, mask, residual, layer_scale, rows)

    def forward(
        branch: Tensor, mask: Tensor, residual: Tensor | None, layer_scale: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        like = branch if residual is None else residual
        dtype = mask.dtype if residual is None else torch.promote_types(mask.dtype, residual.dtype)
        out = torch.empty_like(like[: len(mask)] if len(like) != len(mask) else like, dtype=dtype)
        if out.numel() > 0:
            scale = None if layer_scale is None else layer_scale.contiguous()
            launch(out, residual, branch, scale, mask, rows, *_sizes(out, scale))
        return out

    def drop_path_backward(
        grad: Tensor, branch: Tensor | None, mask: Tensor, layer_scale: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See :func:`trainops.reference.drop_path_backward`. One pass over ``grad`` and ``branch``."""
        if not has_kernel(grad, mask, branch, layer_scale, rows):
            return reference.drop_path_backward(grad, branch, mask, layer_scale, rows)
        if branch is None or layer_scale is None:
            return forward(grad, mask, None, layer_scale, rows), None
        of_branch, of_layer_scale = torch.empty_like(branch), torch.empty_like(layer_scale)
        if branch.numel() == 0:
            return of_branch, of_layer_scale.zero_()
        scale = layer_scale.contiguous()
        launch_backward(of_branch, of_layer_scale, grad, branch, scale, mask, rows, *_sizes(branch, scale))
        return of_branch, of_layer_scale

    return drop_path, drop_path_backward


def _sizes(out: Tensor, layer_scale: Tensor | None) -> tuple[int, int, int]:
    """Samples, elements of a sample, and channels."""
    samples = out.shape[0]
    return samples, out.numel() // samples, 1 if layer_scale is None else layer_scale.numel()


def has_kernel(
    branch: Tensor, mask: Tensor, residual: Tensor | None, layer_scale: Tensor | None, rows: Tensor | None
) -> bool:
    """Whether all are flat memory, sample by sample in the same order; others are left to the reference."""
    operands = [x for x in (branch, mask, residual, layer_scale) if x is not None]
    if not all_plain(operands):
        return False
    doubles = [x.dtype == torch.float64 for x in operands]
    if any(doubles) != all(doubles) or not all(x.is_floating_point() and not x.is_neg() for x in operands):
        return False
    samples = len(branch) if rows is None else len(rows)
    if mask.ndim != branch.ndim or mask.shape[0] != samples:
        return False
    if layer_scale is not None and not (layer_scale.ndim == 1 < branch.ndim and branch.is_contiguous()):
        return False
    if residual is None:
        fits = samples <= len(branch)
    else:
        fits = residual.shape == (samples, *branch.shape[1:]) and residual.stride() == branch.stride()
    dense = branch.is_contiguous() or (
        branch.ndim in _FORMATS and branch.is_contiguous(memory_format=_FORMATS[branch.ndim])
    )
    return fits and dense
