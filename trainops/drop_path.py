"""Stochastic depth per sample, with its residual add and layer scale in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import reference
from .backends import Kernels, check, select


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
        TypeError: ``drop_prob`` is no number, or ``x`` no tensor.
        ValueError: ``drop_prob`` is out of range, or ``x`` has no dimension.
    """
    check_drop_prob(drop_prob)
    check(backend)
    check_samples("x", x)
    if drop_prob == 0.0 or not training:
        return x
    return apply(backend, x, reference.drop_path_mask(x, drop_prob, scale_by_keep))


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
        TypeError: ``drop_prob`` is no number, or an operand no tensor.
        ValueError: ``drop_prob`` is out of range, ``branch`` has no dimension, or shapes or devices do not fit.
    """
    check_drop_prob(drop_prob)
    check(backend)
    check_samples("branch", branch)
    check_operand("residual", residual, branch)
    check_operand("layer_scale", layer_scale, branch)
    if drop_prob == 0.0 or not training:
        return residual + (branch if layer_scale is None else branch * layer_scale)
    mask = reference.drop_path_mask(branch, drop_prob, scale_by_keep, product_dtype(branch, layer_scale))
    return apply(backend, branch, mask, residual, layer_scale)


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
        check_drop_prob(drop_prob)
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


class Kept(NamedTuple):
    """Samples that a branch was run on."""

    chosen: Tensor  # [kept], int64: which
    rows: Tensor  # [batch], int64: where among them each sample is; any of them for a dropped one


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
        kept: Kept | None,
    ) -> Tensor:
        rows = None if kept is None else kept.rows
        out = select(backend, branch.device.type).drop_path(branch, mask, residual, layer_scale, rows)
        ctx.backend = backend
        ctx.residual = _unlike(residual, out.shape, out.dtype)
        ctx.branch = _unlike(branch, out.shape if kept is None else branch.shape, mask.dtype)
        # The branch is needed for the derivative by layer scale alone.
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
            kernels = differentiable_kernels(ctx.backend, grad)
            of_branch, of_layer_scale = kernels.drop_path_backward(grad, branch, mask, layer_scale, *chosen)
            of_branch = _reduce(of_branch, ctx.branch) if needs_branch else None
        if needs_residual:
            of_residual = _reduce(grad, ctx.residual)
        return None, of_branch, None, of_residual, of_layer_scale, None


def _unlike(x: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> tuple[torch.Size, torch.dtype] | None:
    """Shape and dtype of ``x`` where they are others than these."""
    return None if x is None or (x.dtype == dtype and x.shape == shape) else (x.shape, x.dtype)


def _reduce(grad: Tensor, unlike: tuple[torch.Size, torch.dtype] | None) -> Tensor:
    """A gradient, for an operand that may have been repeated and promoted."""
    return grad if unlike is None else grad.sum_to_size(unlike[0]).to(unlike[1])


def differentiable_kernels(backend: str | None, grad: Tensor) -> Kernels:
    """The kernels for a derivative, or where that may be differentiated again, their formulas."""
    by_formula = torch.is_grad_enabled() or is_transformed()
    return select("reference" if by_formula else backend, grad.device.type)


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
    rows = None if kept is None else kept.rows
    if is_transformed():
        return reference.drop_path(branch, mask, residual, layer_scale, rows)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (branch, residual, layer_scale)):
        result: Tensor = _DropPath.apply(  # type: ignore[no-untyped-call]
            backend, branch, mask, residual, layer_scale, kept
        )
        return result
    return select(backend, branch.device.type).drop_path(branch, mask, residual, layer_scale, rows)


def is_transformed() -> bool:
    """Compilers fuse the formula with what stands around it; function transforms take it apart."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def product_dtype(branch: Tensor, layer_scale: Tensor | None) -> torch.dtype:
    """The dtype of ``branch * layer_scale``, which timm's mask has."""
    if layer_scale is None or layer_scale.ndim == 0:  # which does not widen
        return branch.dtype
    return torch.promote_types(branch.dtype, layer_scale.dtype)


def check_drop_prob(drop_prob: float) -> None:
    """Raise unless it is a probability."""
    try:
        valid = 0.0 <= drop_prob <= 1.0
    except TypeError:
        raise TypeError(f"drop_prob must be a number in [0, 1], got {drop_prob!r}") from None
    if not valid:
        raise ValueError(f"drop_prob must be in [0, 1], got {drop_prob}")


def check_samples(name: str, x: Tensor) -> None:
    """Raise unless ``x`` has a dimension that counts samples."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {x!r}")
    if x.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, of which the first counts samples")


def check_operand(name: str, operand: Tensor | None, branch: Tensor) -> None:
    """Raise unless a residual or a layer scale, if there is one, can be combined with ``branch``."""
    if operand is None:
        return
    if not isinstance(operand, Tensor):
        raise TypeError(f"{name} must be a tensor, got {operand!r}")
    if operand.device != branch.device:
        raise ValueError(f"branch is on {branch.device}, but {name} on {operand.device}")
    if operand.shape != branch.shape and not _fits(operand.shape, branch.shape, enlarges=name == "residual"):
        raise ValueError(
            f"{name} of shape {tuple(operand.shape)} does not fit a branch of shape {tuple(branch.shape)}"
        )


def _fits(shape: torch.Size, branch: torch.Size, enlarges: bool) -> bool:
    """Whether ``shape`` broadcasts with ``branch``, and unless it ``enlarges``, to the branch's own shape."""
    pairs = zip(reversed(shape), reversed(branch), strict=False)
    if enlarges:
        return all(a == b or a == 1 or b == 1 for a, b in pairs)
    return len(shape) <= len(branch) and all(a in (b, 1) for a, b in pairs)
