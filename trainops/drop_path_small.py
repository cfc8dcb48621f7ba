"""DropPath of small tensors on a CPU, where the time of a call is not that of its arithmetic.

Without layer scale, PyTorch's own operations serve: they cost less than an autograd function, which is Python. The
kernels save passes over memory; a tensor must have some size for that to pay. With layer scale, whose gradient must
be exact, the kernels serve, but with fewer questions than for other tensors. Here every microsecond counts.
"""

from typing import Any

import torch
from torch import Tensor

from . import core, reference
from .adapters import cpu
from .plain import is_transformed

# Up to this many elements, PyTorch's operations were no slower (forward and backward, float32 and
# bfloat16, one and two threads). Only CPUs were measured: the tensors of other devices always go to the kernels.
LARGEST = 1 << 17


def drop_path(
    x: Tensor, rate: float, scale_by_keep: bool, residual: Tensor | None = None, layer_scale: Tensor | None = None
) -> Tensor | None:
    """``residual + x * layer_scale * mask``, or None if the caller must take another path.

    Layer scale requires a residual. A dropped sample has the residual's bits, as with the kernels for all tensors.
    """
    if (
        type(rate) is not float
        or not 0.0 < rate <= 1.0
        or cpu.restore_dropped is None
        or is_transformed()
        or not core.are_small(x, residual, layer_scale, LARGEST)
        or not (shape := x.shape)
        or (residual is not None and (residual.shape != shape or residual.is_neg()))
    ):
        return None
    if layer_scale is not None and (
        residual is None
        or len(shape) < 2
        or 0 in shape
        or layer_scale.shape != shape[-1:]
        or x.is_neg()
        or layer_scale.is_neg()
    ):
        return None
    keep_prob = 1 - rate
    mask = x.new_empty((shape[0],) + (1,) * (len(shape) - 1)).bernoulli_(keep_prob)  # drawn as timm draws it
    if scale_by_keep and keep_prob > 0.0:
        cpu.scale_kept(core.reader, mask=mask, keep_prob=keep_prob)
    if layer_scale is not None:
        assert residual is not None
        if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or layer_scale.requires_grad):
            return _Scaled.apply(x, mask, residual, layer_scale)  # type: ignore[no-any-return, no-untyped-call]
        return _scaled(x, mask, residual, layer_scale)
    out = x * mask
    if residual is not None:
        out.add_(residual)
        cpu.restore_dropped(core.reader, out=out, residual=residual, mask=mask)
    return out


def _scaled(branch: Tensor, mask: Tensor, residual: Tensor, layer_scale: Tensor) -> Tensor:
    out = torch.empty_like(residual)
    cpu.drop_path_small(core.reader, out=out, residual=residual, branch=branch, layer_scale=layer_scale, mask=mask)
    return out


class _Scaled(torch.autograd.Function):
    """With layer scale. A double backward uses the reference."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor, mask: Tensor, residual: Tensor, layer_scale: Tensor) -> Tensor:
        ctx.save_for_backward(branch, mask, layer_scale)
        return _scaled(branch, mask, residual, layer_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, mask, layer_scale = ctx.saved_tensors
        if (
            torch.is_grad_enabled()
            or is_transformed()
            or grad.is_neg()
            or not core.are_small(branch, grad, None, LARGEST)
        ):
            of_branch, of_layer_scale = reference.drop_path_backward(grad, branch, mask, layer_scale)
            return of_branch, None, grad, of_layer_scale
        of_branch, of_layer_scale = torch.empty_like(branch), torch.empty_like(layer_scale)
        cpu.drop_path_small_backward(
            core.reader,
            of_branch=of_branch,
            of_layer_scale=of_layer_scale,
            grad=grad,
            branch=branch,
            layer_scale=layer_scale,
            mask=mask,
        )
        return of_branch, None, grad, of_layer_scale
