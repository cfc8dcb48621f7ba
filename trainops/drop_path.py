"""Stochastic depth per sample, with its residual add and layer scale in one pass."""

from numbers import Real

import torch
from torch import Tensor, nn

from . import drop_path_small, reference
from .adapters import check
from .drop_path_autograd import apply
from .drop_path_formula import formula, wants_formula
from .plain import PLAIN


def drop_path(
    x: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Zero whole samples of ``x`` at random, and scale the others up to keep the expectation.

    Equivalent to::

        timm.layers.drop_path(x, drop_prob, training, scale_by_keep)

    bit for bit, from the same seed. Like timm's, it can be traced by torch.fx, scripted, exported and compiled, and
    returns whatever it is given where nothing is to be dropped.

    Args:
        x: of any shape with at least one dimension; dim 0 counts the samples.
        drop_prob: probability that a sample is dropped, in [0, 1]; a number, or a tensor for ``bernoulli_``.
        training: if false, ``x`` itself is returned.
        scale_by_keep: divide the kept samples by ``1 - drop_prob``.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Raises:
        TypeError: ``drop_prob`` is no number, or ``x`` no tensor.
        ValueError: ``drop_prob`` is out of range, or ``x`` has no dimension.

    Source: Huang et al., https://arxiv.org/abs/1603.09382.
    """
    if drop_prob == 0.0 or not training:
        return x
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return formula(x, drop_prob, scale_by_keep)
    else:  # noqa: RET505 (TorchScript compiles what follows an if, but not this)
        return _drop_path(x, drop_prob, scale_by_keep, backend)


def _drop_path(x: Tensor, drop_prob: float, scale_by_keep: bool, backend: str | None) -> Tensor:
    if backend is None and (small := drop_path_small.drop_path(x, drop_prob, scale_by_keep)) is not None:
        return small
    check(backend)
    if wants_formula(x, drop_prob):
        return formula(x, drop_prob, scale_by_keep)
    check_drop_prob(drop_prob)
    check_samples("x", x)
    if not x.is_floating_point():
        return formula(x, drop_prob, scale_by_keep)  # PyTorch says what can be done with these
    return apply(backend, x, reference.drop_path_mask(x, drop_prob, scale_by_keep))


def drop_path_add(
    residual: Tensor,
    branch: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    layer_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add a residual branch, of which whole samples are dropped at random.

    Equivalent to::

        residual + timm.layers.drop_path(branch * layer_scale, drop_prob, training, scale_by_keep)

    bit for bit, from the same seed and for finite operands. A dropped sample's branch has no effect: the result there
    is the residual, even if the branch holds infinities or NaN, and keeps its sign of zero.

    Args:
        residual: floating-point, of the shape of ``branch`` or one that broadcasts with it.
        branch: floating-point, with at least one dimension; dim 0 counts the samples.
        drop_prob: probability that a sample's branch is dropped, in [0, 1]; a number, or a tensor for ``bernoulli_``.
        training: where false, nothing is dropped.
        scale_by_keep: divide the kept branches by ``1 - drop_prob``.
        layer_scale: factors that broadcast with ``branch``, such as one for each element of its last dim.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Raises:
        TypeError: ``drop_prob`` is no number, an operand no tensor, or what is dropped not floating-point.
        ValueError: ``drop_prob`` is out of range, ``branch`` has no dimension, or shapes or devices do not fit.

    Source: Huang et al., https://arxiv.org/abs/1603.09382.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        if drop_prob == 0.0 or not training:
            return residual + (branch if layer_scale is None else branch * layer_scale)
        return formula(branch, drop_prob, scale_by_keep, residual, layer_scale)
    else:  # noqa: RET505 (TorchScript compiles what follows an if, but not this)
        return _drop_path_add(residual, branch, drop_prob, training, scale_by_keep, layer_scale, backend)


def _drop_path_add(
    residual: Tensor,
    branch: Tensor,
    drop_prob: float,
    training: bool,
    scale_by_keep: bool,
    layer_scale: Tensor | None,
    backend: str | None,
) -> Tensor:
    drops = training and drop_prob != 0.0
    if drops:
        if backend is None:
            small = drop_path_small.drop_path(branch, drop_prob, scale_by_keep, residual, layer_scale)
            if small is not None:
                return small
    elif backend is None and type(residual) in PLAIN and type(branch) in PLAIN and branch.dim():
        # Looking at small operands costs as much as adding them: they are looked at where PyTorch refuses them.
        try:
            if layer_scale is None:
                return residual + branch
            if type(layer_scale) in PLAIN and (scaled := branch * layer_scale).shape == branch.shape:
                return residual + scaled
        except RuntimeError:
            pass
    rate = drop_prob if drops else 0.0
    check_scale_by_keep(scale_by_keep)
    check(backend)
    looked_at = wants_formula(branch, rate) or wants_formula(residual, rate)
    if not looked_at:
        check_drop_prob(rate)
        check_samples("branch", branch)
        check_operand("residual", residual, branch)
        check_operand("layer_scale", layer_scale, branch)
    if not drops:
        return residual + (branch if layer_scale is None else branch * layer_scale)
    if looked_at:
        return formula(branch, rate, scale_by_keep, residual, layer_scale)
    mask = reference.drop_path_mask(branch, rate, scale_by_keep, mask_dtype(branch, layer_scale))
    return apply(backend, branch, mask, residual, layer_scale)


class DropPath(nn.Module):
    """timm's ``DropPath``: :func:`drop_path` as a module, active in training mode.

    Args:
        drop_prob: probability that a sample is dropped, in [0, 1]. As in timm's class, it is checked when samples
            are to be dropped, not before.
        scale_by_keep: divide the kept samples by ``1 - drop_prob``.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with samples dropped, in training mode."""
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)

    def extra_repr(self) -> str:
        """The rate for ``repr``, as in timm."""
        rate = self.drop_prob
        return f"drop_prob={round(rate, 3):0.3f}" if isinstance(rate, Real) else f"drop_prob={rate}"


class DropPathAdd(DropPath):
    """:func:`drop_path_add` as a module: ``x = self.drop_path_add(x, self.mlp(self.norm(x)))``.

    Args:
        drop_prob: probability that a sample's branch is dropped, in [0, 1].
        scale_by_keep: divide the kept branches by ``1 - drop_prob``.
    """

    def forward(  # type: ignore[override]
        self, residual: Tensor, branch: Tensor, layer_scale: Tensor | None = None
    ) -> Tensor:
        """``residual`` plus what is left of ``branch``."""
        return drop_path_add(residual, branch, self.drop_prob, self.training, self.scale_by_keep, layer_scale)


def mask_dtype(branch: Tensor, layer_scale: Tensor | None) -> torch.dtype:
    """The dtype of ``branch * layer_scale``, which timm's mask has. Raises unless it is floating-point."""
    dtype = branch.dtype
    if layer_scale is not None and layer_scale.ndim > 0:  # else it does not widen
        dtype = torch.promote_types(dtype, layer_scale.dtype)
    if not dtype.is_floating_point:
        raise TypeError(f"only samples of floating-point tensors can be dropped, got {dtype}")
    return dtype


def check_drop_prob(drop_prob: float) -> None:
    """Raise unless it is a probability."""
    if type(drop_prob) is not float and not isinstance(drop_prob, (Real, torch.SymFloat)):
        raise TypeError(f"drop_prob must be a number in [0, 1], got {drop_prob!r:.60}")
    if not 0.0 <= drop_prob <= 1.0:
        raise ValueError(f"drop_prob must be in [0, 1], got {drop_prob}")


def check_scale_by_keep(scale_by_keep: bool) -> None:
    """Raise unless it is true or false. Catches an argument in the wrong position."""
    if not isinstance(scale_by_keep, (bool, int)):
        raise TypeError(f"scale_by_keep must be a bool, got {type(scale_by_keep).__name__}")


def check_samples(name: str, x: Tensor) -> None:
    """Raise unless ``x`` has a dimension that counts samples."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, of which the first counts samples")


def check_operand(
    name: str, operand: Tensor | None, x: Tensor, x_name: str = "branch", each_sample: bool = False
) -> None:
    """Raise unless a residual or a layer scale, if there is one, can be combined with ``x``, or with its samples."""
    if operand is None:
        return
    if not isinstance(operand, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(operand).__name__}")
    if operand.device != x.device:
        raise ValueError(f"{x_name} is on {x.device}, but {name} on {operand.device}")
    shape = torch.Size((1, *x.shape[1:])) if each_sample else x.shape
    if operand.shape != shape and not _fits(operand.shape, shape, enlarges=name == "residual"):
        what = "each sample of a" if each_sample else "a"
        raise ValueError(
            f"{name} of shape {tuple(operand.shape)} does not fit {what} {x_name} of shape {tuple(x.shape)}"
        )


def _fits(shape: torch.Size, branch: torch.Size, enlarges: bool) -> bool:
    """Whether ``shape`` broadcasts with ``branch``. The result must have the branch's shape unless ``enlarges``."""
    pairs = zip(reversed(shape), reversed(branch), strict=False)
    if enlarges:
        return all(a == b or a == 1 or b == 1 for a, b in pairs)
    return len(shape) <= len(branch) and all(a in (b, 1) for a, b in pairs)
