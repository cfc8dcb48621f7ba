"""Stochastic depth per sample, with its residual add and layer scale in one pass."""

from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .backends import check, select


def drop_path(
    x: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    """Zero whole samples of ``x`` at random, and scale the others up to keep the expectation.

    Equivalent to::

        timm.layers.drop_path(x, drop_prob, training, scale_by_keep)

    bit for bit, from the same seed.

    Args:
        x: floating-point, of any shape with at least one dimension; dim 0 counts the samples.
        drop_prob: probability that a sample is dropped, in [0, 1].
        training: where false, ``x`` is returned as it is.
        scale_by_keep: divide the kept samples by ``1 - drop_prob``.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Raises:
        ValueError: ``drop_prob`` is out of range, or ``x`` has no dimension.
    """
    _check(x, drop_prob, backend)
    if drop_prob == 0.0 or not training:
        return x
    return _apply(backend, x, _mask(x, None, drop_prob, scale_by_keep), None, None)


def drop_path_add(
    residual: Tensor,
    branch: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    layer_scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Add a residual branch, of which whole samples are dropped at random.

    Equivalent to::

        residual + timm.layers.drop_path(branch * layer_scale, drop_prob, training, scale_by_keep)

    bit for bit, from the same seed and for finite branches. A dropped sample's branch is not read: the result
    there is the residual, whatever the branch holds.

    Args:
        residual: floating-point, of the shape of ``branch`` or one that broadcasts with it.
        branch: floating-point, with at least one dimension; dim 0 counts the samples.
        drop_prob: probability that a sample's branch is dropped, in [0, 1].
        training: where false, nothing is dropped.
        scale_by_keep: divide the kept branches by ``1 - drop_prob``.
        layer_scale: factors that broadcast with ``branch``, such as one for each element of its last dim.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Raises:
        ValueError: ``drop_prob`` is out of range, ``branch`` has no dimension, or shapes or devices do not fit.
    """
    _check(branch, drop_prob, backend)
    _check_operands(residual, branch, layer_scale)
    if drop_prob == 0.0 or not training:
        return residual + (branch if layer_scale is None else branch * layer_scale)
    return _apply(backend, branch, _mask(branch, layer_scale, drop_prob, scale_by_keep), residual, layer_scale)


class DropPath(nn.Module):
    """timm's ``DropPath``: :func:`drop_path` as a module, active in training mode.

    Args:
        drop_prob: probability that a sample is dropped, in [0, 1].
        scale_by_keep: divide the kept samples by ``1 - drop_prob``.

    Raises:
        ValueError: ``drop_prob`` is out of range.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        _check_drop_prob(drop_prob)
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with samples dropped, in training mode."""
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)

    def extra_repr(self) -> str:
        """As timm's."""
        return f"drop_prob={round(self.drop_prob, 3):0.3f}"


class DropPathAdd(DropPath):
    """:func:`drop_path_add` as a module: ``x = self.drop_path_add(x, self.mlp(self.norm(x)))``.

    Args:
        drop_prob: probability that a sample's branch is dropped, in [0, 1].
        scale_by_keep: divide the kept branches by ``1 - drop_prob``.

    Raises:
        ValueError: ``drop_prob`` is out of range.
    """

    def forward(  # type: ignore[override]
        self, residual: Tensor, branch: Tensor, layer_scale: Tensor | None = None
    ) -> Tensor:
        """``residual`` plus what is left of ``branch``."""
        return drop_path_add(residual, branch, self.drop_prob, self.training, self.scale_by_keep, layer_scale)


class _DropPath(torch.autograd.Function):
    """The kernel and the kernel of its derivative; where that is differentiated again, its formula."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str | None,
        branch: Tensor,
        mask: Tensor,
        residual: Tensor | None,
        layer_scale: Tensor | None,
    ) -> Tensor:
        ctx.backend = backend
        ctx.branch_shape, ctx.branch_dtype = branch.shape, branch.dtype
        ctx.residual_shape = None if residual is None else residual.shape
        ctx.residual_dtype = None if residual is None else residual.dtype
        # The branch is needed for the derivative by layer scale alone.
        ctx.save_for_backward(mask, layer_scale, branch if ctx.needs_input_grad[4] else None)
        return select(backend, branch.device.type).drop_path(branch, mask, residual, layer_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, layer_scale, branch = ctx.saved_tensors
        _, needs_branch, _, needs_residual, needs_layer_scale = ctx.needs_input_grad
        of_branch = of_residual = of_layer_scale = None
        if needs_branch or needs_layer_scale:
            differentiable = torch.is_grad_enabled() or _is_transformed()
            kernels = reference if differentiable else select(ctx.backend, grad.device.type)
            of_branch, of_layer_scale = kernels.drop_path_backward(grad, branch, mask, layer_scale)
            of_branch = of_branch.sum_to_size(ctx.branch_shape).to(ctx.branch_dtype) if needs_branch else None
        if needs_residual:
            of_residual = grad.sum_to_size(ctx.residual_shape).to(ctx.residual_dtype)
        return None, of_branch, None, of_residual, of_layer_scale


def _apply(
    backend: str | None, branch: Tensor, mask: Tensor, residual: Tensor | None, layer_scale: Tensor | None
) -> Tensor:
    if _is_transformed():
        return reference.drop_path(branch, mask, residual, layer_scale)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (branch, residual, layer_scale)):
        result: Tensor = _DropPath.apply(  # type: ignore[no-untyped-call]
            backend, branch, mask, residual, layer_scale
        )
        return result
    return select(backend, branch.device.type).drop_path(branch, mask, residual, layer_scale)


def _is_transformed() -> bool:
    """Compilers fuse the formula with what stands around it; function transforms take it apart."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _mask(branch: Tensor, layer_scale: Tensor | None, drop_prob: float, scale_by_keep: bool) -> Tensor:
    """The mask that timm would draw for ``branch * layer_scale``, in the dtype of that product."""
    dtype = branch.dtype  # which a 0-dim tensor does not widen
    if layer_scale is not None and layer_scale.ndim > 0:
        dtype = torch.promote_types(dtype, layer_scale.dtype)
    return reference.drop_path_mask(branch, drop_prob, scale_by_keep, dtype)


def _check_drop_prob(drop_prob: float) -> None:
    if not 0.0 <= drop_prob <= 1.0:
        raise ValueError(f"drop_prob must be in [0, 1], got {drop_prob}")


def _check(x: Tensor, drop_prob: float, backend: str | None) -> None:
    _check_drop_prob(drop_prob)
    check(backend)
    if x.ndim == 0:
        raise ValueError("drop_path needs a tensor with at least one dimension, of which the first counts samples")


def _check_operands(residual: Tensor, branch: Tensor, layer_scale: Tensor | None) -> None:
    for name, other in (("residual", residual), ("layer_scale", layer_scale)):
        if other is None:
            continue
        if other.device != branch.device:
            raise ValueError(f"branch is on {branch.device}, but {name} on {other.device}")
        if other.shape == branch.shape:
            continue
        if not _fits(other.shape, branch.shape, enlarges=name == "residual"):
            raise ValueError(
                f"{name} of shape {tuple(other.shape)} does not fit a branch of shape {tuple(branch.shape)}"
            )


def _fits(shape: torch.Size, branch: torch.Size, enlarges: bool) -> bool:
    """Whether ``shape`` broadcasts with ``branch``, and unless it ``enlarges``, to the branch's own shape."""
    pairs = zip(reversed(shape), reversed(branch), strict=False)
    if enlarges:
        return all(a == b or a == 1 or b == 1 for a, b in pairs)
    return len(shape) <= len(branch) and all(a in (b, 1) for a, b in pairs)
