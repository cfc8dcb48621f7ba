"""DropPath's kernels under autograd. Under compilers, tracers and function transforms, the reference."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from . import reference
from .adapters import Kernels, select
from .adapters import pytorch as reference_kernels
from .plain import is_transformed


class Kept(NamedTuple):
    """Samples that a branch was run on."""

    chosen: Tensor  # [kept], int64: the indices of the samples
    rows: Tensor  # [batch], int64: the place of each sample in `chosen`; any place for a dropped sample


class _DropPath(torch.autograd.Function):
    """DropPath's forward and backward kernels. Double backward uses the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        branch: Tensor,
        mask: Tensor,
        residual: Tensor | None,
        layer_scale: Tensor | None,
        kept: Kept | None,
    ) -> Tensor:
        out = kernels.drop_path(branch, mask, residual, layer_scale, None if kept is None else kept.rows)
        ctx.kernels = kernels
        ctx.residual = _unlike(residual, out.shape, out.dtype)
        ctx.branch = _unlike(branch, out.shape if kept is None else branch.shape, mask.dtype)
        # Only layer scale's gradient needs the branch.
        needed = branch if layer_scale is not None and ctx.needs_input_grad[4] else None
        if kept is None:
            ctx.save_for_backward(mask, layer_scale, needed)
        else:
            ctx.save_for_backward(mask.index_select(0, kept.chosen), layer_scale, needed, kept.chosen)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, layer_scale, branch, *chosen = ctx.saved_tensors
        _, needs_branch, _, needs_residual, needs_layer_scale, _ = ctx.needs_input_grad
        of_branch = of_residual = of_layer_scale = None
        if needs_branch or needs_layer_scale:
            kernels = differentiable(ctx.kernels, grad)
            of_branch, of_layer_scale = kernels.drop_path_backward(grad, branch, mask, layer_scale, *chosen)
            of_branch = _reduce(of_branch, ctx.branch) if needs_branch else None
        if needs_residual:
            of_residual = _reduce(grad, ctx.residual)
        return None, of_branch, None, of_residual, of_layer_scale, None


def _unlike(x: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> tuple[torch.Size, torch.dtype] | None:
    """Shape and dtype of ``x``, or None if they are ``shape`` and ``dtype``, or there is no ``x``."""
    return None if x is None or (x.dtype == dtype and x.shape == shape) else (x.shape, x.dtype)


def _reduce(grad: Tensor, unlike: tuple[torch.Size, torch.dtype] | None) -> Tensor:
    """A gradient, for an operand that may have been repeated and promoted."""
    return grad if unlike is None else grad.sum_to_size(unlike[0]).to(unlike[1])


def differentiable(kernels: Kernels, grad: Tensor) -> Kernels:
    """The kernels for a derivative. If it may be differentiated again, or for several at once, the reference's."""
    is_plain = not (torch.is_grad_enabled() or is_transformed() or is_legacy_batchedtensor(grad))
    return kernels if is_plain else reference_kernels


def apply(
    backend: str | None,
    branch: Tensor,
    mask: Tensor,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """``residual + branch * layer_scale * mask`` for autograd, compilers and function transforms.

    Where ``kept`` is given, ``branch`` holds its samples alone.
    """
    if is_transformed():
        return _formula(branch, mask, residual, layer_scale, kept)
    kernels = select(backend, branch.device)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (branch, residual, layer_scale)):
        result: Tensor = _DropPath.apply(  # type: ignore[no-untyped-call]
            kernels, branch, mask, residual, layer_scale, kept
        )
        return result
    return kernels.drop_path(branch, mask, residual, layer_scale, None if kept is None else kept.rows)


def _formula(
    branch: Tensor, mask: Tensor, residual: Tensor | None, layer_scale: Tensor | None, kept: Kept | None
) -> Tensor:
    """The specification; for kept samples with an addition in place of a gather, whose derivative has no duplicates.

    (Inductor of torch 2.13 computes wrong gradients of several such gathers in one graph.)
    """
    if kept is None or residual is None:
        return reference.drop_path(branch, mask, residual, layer_scale)
    mask = mask.index_select(0, kept.chosen)
    term = reference.drop_path(torch.where(mask != 0, branch, 0), mask, None, layer_scale)
    dtype = torch.promote_types(residual.dtype, term.dtype)
    return residual.to(dtype).index_add(0, kept.chosen, term.to(dtype))
