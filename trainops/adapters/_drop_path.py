"""DropPath around the kernels of a backend: which operands they take, and the memory for what they return."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..plain import PLAIN

# Takes by keyword: out, residual, branch, layer_scale, mask, rows, samples, sample_numel, channels. `has_kernel` is
# true of the tensors, and none is empty. `out` is written.
Launch = Callable[..., None]

# Likewise: of_branch, of_layer_scale (both written), grad, branch, layer_scale, mask, rows and the three sizes.
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
        dtype = mask.dtype if residual is None or residual.dtype == mask.dtype else _promoted(mask, residual)
        like = residual if residual is not None else branch if rows is None else branch[: mask.shape[0]]
        out = torch.empty_like(like) if like.dtype == dtype else torch.empty_like(like, dtype=dtype)
        numel = out.numel()
        if numel > 0:
            samples = mask.shape[0]
            launch(
                out=out,
                residual=residual,
                branch=branch,
                layer_scale=None if layer_scale is None else layer_scale.contiguous(),
                mask=mask,
                rows=rows,
                samples=samples,
                sample_numel=numel // samples,
                channels=1 if layer_scale is None else layer_scale.numel(),
            )
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
        numel = branch.numel()
        if numel == 0:
            return of_branch, of_layer_scale.zero_()
        samples = mask.shape[0]
        launch_backward(
            of_branch=of_branch,
            of_layer_scale=of_layer_scale,
            grad=grad,
            branch=branch,
            layer_scale=layer_scale.contiguous(),
            mask=mask,
            rows=rows,
            samples=samples,
            sample_numel=numel // samples,
            channels=layer_scale.numel(),
        )
        return of_branch, of_layer_scale

    return drop_path, drop_path_backward


def _promoted(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, b.dtype)


def has_kernel(
    branch: Tensor, mask: Tensor, residual: Tensor | None, layer_scale: Tensor | None, rows: Tensor | None
) -> bool:
    """Whether all are flat memory, sample by sample in the same order. If not, the reference serves them."""
    is_double = branch.dtype == torch.float64
    for x in (branch, mask, residual, layer_scale):
        if x is not None and (
            type(x) not in PLAIN
            or not x.is_floating_point()
            or (x.dtype == torch.float64) is not is_double
            or x.is_neg()
        ):
            return False
    shape = branch.shape
    samples = shape[0] if rows is None else rows.shape[0]
    if mask.ndim != len(shape) or mask.shape[0] != samples:
        return False
    if residual is None:
        if samples > shape[0]:
            return False
    elif residual.shape != (shape if rows is None else (samples, *shape[1:])):
        return False
    # Strides are not compared: a dimension of size 1 may have any.
    if branch.is_contiguous() and (residual is None or residual.is_contiguous()):
        return layer_scale is None or _lies_in(layer_scale, -1, len(shape))
    memory_format = _FORMATS.get(len(shape))
    if memory_format is None or not branch.is_contiguous(memory_format=memory_format):
        return False
    if residual is not None and not residual.is_contiguous(memory_format=memory_format):
        return False
    return layer_scale is None or _lies_in(layer_scale, 1 - len(shape), len(shape))


def _lies_in(layer_scale: Tensor, dim: int, ndim: int) -> bool:
    """Whether layer scale has one factor per channel. ``dim`` is the channel dimension, last in memory."""
    if not -dim <= layer_scale.ndim <= ndim or ndim < 2:
        return False
    return layer_scale.shape[dim] == layer_scale.numel()
