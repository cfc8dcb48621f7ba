"""Stochastic depth that saves the time of what it drops: a branch is run on the samples that are kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .backends import check
from .drop_path import (
    Kept,
    apply,
    check_drop_prob,
    check_operand,
    check_samples,
    differentiable_kernels,
    drop_path_add,
    is_transformed,
    product_dtype,
)

MODES = ("fixed", "bernoulli")


def stochastic_depth(
    residual: Tensor,
    branch: Callable[[Tensor], Tensor],
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    layer_scale: Tensor | None = None,
    mode: str = "fixed",
    *,
    backend: str | None = None,
) -> Tensor:
    """Add a residual branch that is run on a random part of the batch.

    Equivalent to::

        kept = torch.randperm(batch)[: max(1, round(batch * (1 - drop_prob)))]  # mode "fixed"
        out = residual.clone()
        out[kept] += branch(residual[kept]) * layer_scale * (batch / len(kept))

    or, in mode ``"bernoulli"`` and from the same seed, to::

        trainops.drop_path_add(residual, branch(residual), drop_prob, training, scale_by_keep, layer_scale)

    bit for bit where the branch's own numbers do not depend on the batch, provided that it draws no random numbers:
    the mask is drawn before it is called, on fewer samples.

    What the modes mean:

    - ``"fixed"``: always ``max(1, round(batch * keep_prob))`` samples, whichever they are. Shapes are static and the
      host never waits for the device. A sample is dropped with the probability of ``1 - kept / batch``, which
      rounding makes differ from ``drop_prob``: nothing is dropped where ``batch * drop_prob`` is below a half.
      Samples are not dropped independently. With ``scale_by_keep`` the factor is ``batch / kept``, so the expected
      value is exactly that of the whole branch.
    - ``"bernoulli"``: each sample by itself, as timm draws them. How many remain is read by the host, which on a GPU
      waits for that; where it cannot (in a compiled function, a function transform or the capture of a CUDA graph)
      the whole batch is computed and then dropped from, with the same result.

    A BatchNorm in the branch sees the kept samples alone, and its statistics are of those. Under DDP every rank draws
    its own samples. At least one sample is computed, so that all parameters of the branch get a gradient, as DDP
    expects: where none is kept (as with a ``drop_prob`` of 1), that one is dropped, and the gradient is zero.

    Args:
        residual: floating-point, of any shape with at least one dimension; dim 0 counts the samples.
        branch: what is added, as a function of the residual: it gets some samples of it and returns as many of the
            same shape. In evaluation, it gets all of them.
        drop_prob: probability that a sample's branch is dropped, in [0, 1].
        training: where false, nothing is dropped.
        scale_by_keep: scale the kept branches up, so as to keep the expected value.
        layer_scale: factors that broadcast with a sample, such as one for each element of the last dim.
        mode: ``"fixed"`` or ``"bernoulli"``.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Raises:
        TypeError: ``drop_prob`` is no number, ``branch`` cannot be called, or an operand is no tensor.
        ValueError: ``drop_prob`` or ``mode`` is none of those above, ``residual`` has no dimension, ``layer_scale``
            does not fit, or ``branch`` returns another shape or device.

    Source: Huang et al., https://arxiv.org/abs/1603.09382; on a part of the batch as in DINOv2,
    https://arxiv.org/abs/2304.07193.
    """
    _check(residual, branch, drop_prob, layer_scale, mode)
    check(backend)
    batch = residual.shape[0]
    kept_count = max(1, round(batch * (1 - drop_prob)))
    if drop_prob == 0.0 or not training or batch == 0 or (mode == "fixed" and kept_count >= batch):
        return drop_path_add(residual, _call(branch, residual), layer_scale=layer_scale, backend=backend)
    if mode == "fixed":
        keep, kept = _choose(residual, kept_count, drop_prob)
    else:
        keep, kept = _draw(residual, drop_prob)
    samples, residual = _take(backend, residual, keep, kept)
    result = _call(branch, samples)
    mask = keep.to(product_dtype(result, layer_scale))
    if scale_by_keep and drop_prob < 1.0:
        mask = mask / (kept_count / batch if mode == "fixed" else 1 - drop_prob)
    return apply(backend, result, mask, residual, layer_scale, kept)


class StochasticDepth(nn.Module):
    """:func:`stochastic_depth` as a module, active in training mode.

    ``x = self.stochastic_depth(x, lambda x: self.mlp(self.norm(x)))``

    Args:
        drop_prob: probability that a sample's branch is dropped, in [0, 1].
        scale_by_keep: scale the kept branches up, so as to keep the expected value.
        mode: ``"fixed"`` or ``"bernoulli"``.

    Raises:
        TypeError: ``drop_prob`` is no number.
        ValueError: ``drop_prob`` or ``mode`` is none of those above.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True, mode: str = "fixed") -> None:
        super().__init__()
        check_drop_prob(drop_prob)
        _check_mode(mode)
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep
        self.mode = mode

    def forward(
        self, residual: Tensor, branch: Callable[[Tensor], Tensor], layer_scale: Tensor | None = None
    ) -> Tensor:
        """``residual`` plus ``branch`` of the samples that are kept."""
        return stochastic_depth(
            residual, branch, self.drop_prob, self.training, self.scale_by_keep, layer_scale, self.mode
        )

    def extra_repr(self) -> str:
        """What it was made with."""
        return f"drop_prob={round(self.drop_prob, 3):0.3f}, mode={self.mode!r}"


def _choose(residual: Tensor, count: int, drop_prob: float) -> tuple[Tensor, Kept | None]:
    """As many random samples, and 1 for each of them: [batch, 1, ...]."""
    batch, device = residual.shape[0], residual.device
    kept = _kept(torch.randperm(batch, device=device)[:count], batch)
    keep = residual.new_zeros(batch)
    if drop_prob < 1.0:
        keep.index_fill_(0, kept.chosen, 1.0)
    return keep.view(-1, *(1,) * (residual.ndim - 1)), kept


def _draw(residual: Tensor, drop_prob: float) -> tuple[Tensor, Kept | None]:
    """The mask of timm, unscaled, and the samples that it keeps; None for these where all are to be computed."""
    keep = reference.drop_path_mask(residual, drop_prob, scale_by_keep=False)
    if is_transformed() or residual.is_meta or (residual.is_cuda and torch.cuda.is_current_stream_capturing()):
        return keep, None  # the host must not know how many
    chosen = keep.view(-1).nonzero().view(-1)
    batch = residual.shape[0]
    if len(chosen) == batch:
        return keep, None
    return keep, _kept(chosen if len(chosen) else chosen.new_zeros(1), batch)


def _kept(chosen: Tensor, batch: int) -> Kept:
    rows = torch.zeros(batch, dtype=torch.int64, device=chosen.device)
    places = torch.arange(len(chosen), device=chosen.device)
    return Kept(chosen, rows.index_copy_(0, chosen, places))


def _take(backend: str | None, residual: Tensor, keep: Tensor, kept: Kept | None) -> tuple[Tensor, Tensor]:
    """The samples to compute, and the residual itself."""
    if kept is None:
        return residual, residual
    if is_transformed() or not (torch.is_grad_enabled() and residual.requires_grad):
        return residual.index_select(0, kept.chosen), residual
    taken: tuple[Tensor, Tensor] = _Take.apply(backend, residual, keep, kept)  # type: ignore[no-untyped-call]
    return taken


class _Take(torch.autograd.Function):
    """Some samples and all of them, whose gradients are added up in one pass."""

    @staticmethod
    def forward(ctx: Any, backend: str | None, residual: Tensor, keep: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        ctx.backend = backend
        ctx.save_for_backward(keep, kept.rows)
        return residual.index_select(0, kept.chosen), residual

    @staticmethod
    def backward(ctx: Any, of_samples: Tensor, of_residual: Tensor) -> tuple[Tensor | None, ...]:
        keep, rows = ctx.saved_tensors
        kernels = differentiable_kernels(ctx.backend, of_residual)
        return None, kernels.drop_path(of_samples, keep, of_residual, None, rows), None, None


def _call(branch: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    result = branch(samples)
    if not isinstance(result, Tensor):
        raise TypeError(f"branch must return a tensor, got {type(result).__name__}")
    if result.shape != samples.shape:
        raise ValueError(f"branch returned shape {tuple(result.shape)} for samples of shape {tuple(samples.shape)}")
    check_operand("residual", samples, result)
    return result


def _check(
    residual: Tensor, branch: Callable[[Tensor], Tensor], drop_prob: float, layer_scale: Tensor | None, mode: str
) -> None:
    check_drop_prob(drop_prob)
    _check_mode(mode)
    check_samples("residual", residual)
    if not callable(branch):
        raise TypeError(
            f"branch must be a function of the residual, got {type(branch).__name__}; for a tensor there "
            "is drop_path_add"
        )
    if layer_scale is not None:
        check_operand("layer_scale", layer_scale, residual[:1])


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
