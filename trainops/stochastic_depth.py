"""Stochastic depth that saves the time of what it drops: a branch is run on the samples that are kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import advice, reference
from .adapters import Kernels, check, select
from .drop_path import (
    check_drop_prob,
    check_operand,
    check_samples,
    check_scale_by_keep,
    drop_path_add,
    mask_dtype,
)
from .drop_path_autograd import Kept, apply, differentiable
from .plain import PLAIN, is_transformed
from .stochastic_depth_formula import kept_count, of_any_size, on_whole_batch

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
    the mask is drawn before it is called, on fewer samples. The branch must not modify what it is given.

    What the modes mean:

    - ``"fixed"``: always ``max(1, round(batch * keep_prob))`` samples, whichever they are. Shapes are static and the
      host never waits for the device. A sample is dropped with a probability of ``1 - kept / batch``, which rounding
      makes differ from ``drop_prob``: of a small batch, nothing may be dropped at all (a warning says so after 1000
      such calls in a row). Samples are not dropped independently. With ``scale_by_keep`` the factor is
      ``batch / kept``, so the expected value is exactly that of the whole branch.
    - ``"bernoulli"``: each sample by itself, as timm draws them. How many remain is read by the host, which on a GPU
      waits for that. Where it cannot (in compiled or traced code, a function transform, the capture of a CUDA graph,
      for subclasses of tensors), the branch is run on the whole batch and its result dropped from.

    In both modes torch.fx and torch.export record a run on the whole batch, which is good for batches of any size.

    At least one sample is computed, so that all parameters of the branch get a gradient, as DDP expects: where none
    is kept, as with a ``drop_prob`` of 1, its result is dropped, and the gradient is zero.

    A BatchNorm in the branch sees what the branch is run on: its statistics are those of the kept samples (in mode
    ``"bernoulli"`` of the whole batch, where the host cannot know them, so compiled and eager code differ), it fails
    where a single value per channel is left, and a sample whose result is dropped moves its running statistics, too.
    Under DDP, ranks draw different samples if they are seeded differently, as they should be.

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
        TypeError: ``drop_prob`` is no number, ``branch`` cannot be called, an operand is no tensor, or what is
            dropped not floating-point.
        ValueError: ``drop_prob`` or ``mode`` is none of those above, ``residual`` has no dimension, ``layer_scale``
            does not fit, or ``branch`` returns another shape or device.

    Source: Huang et al., https://arxiv.org/abs/1603.09382; on a part of the batch as in DINOv2,
    https://arxiv.org/abs/2304.07193.
    """
    _check(branch, mode)
    check(backend)
    check_scale_by_keep(scale_by_keep)
    rate = drop_prob if training else 0.0
    if of_any_size(residual):
        return on_whole_batch(residual, branch, rate, scale_by_keep, layer_scale, mode)
    check_drop_prob(drop_prob)
    check_samples("residual", residual)
    check_operand("layer_scale", layer_scale, residual, "residual", each_sample=True)
    batch = residual.shape[0]
    drops = rate > 0.0 and batch > 0
    count = kept_count(batch, rate) if drops else batch  # to keep in mode "fixed"
    keeps_all = mode == "fixed" and count == batch and rate < 1.0
    if drops and mode == "fixed":
        advice.kept_everything(batch, rate) if keeps_all else advice.dropped_something()
    if not drops or keeps_all:
        return drop_path_add(residual, _call(branch, residual), layer_scale=layer_scale, backend=backend)
    keep, kept = _draw_fixed(residual, count) if mode == "fixed" else _draw_bernoulli(residual, rate)
    if rate == 1.0:
        keep = torch.zeros_like(keep)
    samples, residual = _take(backend, residual, keep, kept)
    result = _call(branch, samples)
    mask = keep.to(mask_dtype(result, layer_scale))
    if scale_by_keep and rate < 1.0:
        mask = mask / (count / batch if mode == "fixed" else 1 - rate)
    return apply(backend, result, mask, residual, layer_scale, kept)


class StochasticDepth(nn.Module):
    """:func:`stochastic_depth` as a module, active in training mode.

    It takes the branch, not its result: torchvision's ``StochasticDepth(p, "row")`` is :class:`trainops.DropPath`,
    and its mode ``"batch"``, one draw for all samples, is ``drop_path(x[None], p, training)[0]``.

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
        check_scale_by_keep(scale_by_keep)
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
        """The settings for ``repr``."""
        return f"drop_prob={round(self.drop_prob, 3):0.3f}, mode={self.mode!r}"


def _draw_fixed(residual: Tensor, count: int) -> tuple[Tensor, Kept]:
    """1 for each of ``count`` random samples, [batch, 1, ...], and which they are."""
    permutation = torch.randperm(residual.shape[0], device=residual.device)
    rows = permutation.argsort()
    keep = (rows < count).to(residual.dtype).view(-1, *(1,) * (residual.ndim - 1))
    return keep, Kept(permutation[:count], rows.clamp(max=count - 1))


def _draw_bernoulli(residual: Tensor, drop_prob: float) -> tuple[Tensor, Kept | None]:
    """The mask of timm, unscaled, and the samples that it keeps; None for these where all are to be computed."""
    keep = reference.drop_path_mask(residual, drop_prob, scale_by_keep=False)
    if not _host_may_know(residual):
        return keep, None
    is_kept = keep.view(-1) != 0
    chosen = is_kept.nonzero().view(-1)
    if len(chosen) == residual.shape[0]:
        return keep, None
    rows = (is_kept.cumsum(0) - 1).clamp(min=0)
    return keep, Kept(chosen if len(chosen) else chosen.new_zeros(1), rows)


def _host_may_know(x: Tensor) -> bool:
    """Whether the host may read how many values are nonzero. It may not while tracing or capturing."""
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return type(x) in PLAIN and not x.is_meta and not is_transformed() and not captured


def _take(backend: str | None, residual: Tensor, keep: Tensor, kept: Kept | None) -> tuple[Tensor, Tensor]:
    """The samples to compute, and the residual itself."""
    if kept is None:
        return residual, residual
    if is_transformed():
        return residual.index_select(0, kept.chosen), residual
    if not (torch.is_grad_enabled() and residual.requires_grad):
        return _gather(residual, kept.chosen), residual
    kernels = select(backend, residual.device)
    taken: tuple[Tensor, Tensor] = _Take.apply(kernels, residual, keep, kept)  # type: ignore[no-untyped-call]
    return taken


def _gather(x: Tensor, chosen: Tensor) -> Tensor:
    """Some samples, in the memory format of all of them, which ``index_select`` by itself does not keep."""
    if x.is_contiguous():
        return x.detach().index_select(0, chosen)
    samples = torch.empty_like(x[: len(chosen)])
    return torch.index_select(x.detach(), 0, chosen, out=samples)


class _Take(torch.autograd.Function):
    """Some samples and all of them, whose gradients are added up in one pass."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, residual: Tensor, keep: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        ctx.kernels = kernels
        ctx.save_for_backward(keep, kept.rows)
        return _gather(residual, kept.chosen), residual

    @staticmethod
    def backward(ctx: Any, of_samples: Tensor, of_residual: Tensor) -> tuple[Tensor | None, ...]:
        keep, rows = ctx.saved_tensors
        kernels = differentiable(ctx.kernels, of_samples)
        return None, kernels.drop_path(of_samples, keep, of_residual, None, rows), None, None


def _call(branch: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    result = branch(samples)
    if not isinstance(result, Tensor):
        raise TypeError(f"branch must return a tensor, got {type(result).__name__}")
    if result.shape != samples.shape:
        raise ValueError(f"branch returned shape {tuple(result.shape)} for samples of shape {tuple(samples.shape)}")
    check_operand("residual", samples, result)
    return result


def _check(branch: Callable[[Tensor], Tensor], mode: str) -> None:
    _check_mode(mode)
    if not callable(branch):
        raise TypeError(
            f"branch must be a function of the residual, got {type(branch).__name__}; for a tensor there "
            "is drop_path_add"
        )


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
