"""The specification: every op of trainops in plain PyTorch, to be read beside the papers.

The kernels are checked against these functions, and these functions serve where there is no kernel. They work on
any device and dtype. Arithmetic is in float32 for float32 and 16-bit parameters and in float64 for float64 ones;
stored values are rounded once, at the end. Scalars are computed in float64, and rounded once where they meet tensors.
Norms of plain CPU tensors are accumulated in float64. Devices without float64 use float32 instead.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from .plain import PLAIN
from .reference_rounding import Random
from .reference_storage import wide, write

vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm


@cache
def scalar_dtype(device: torch.device) -> torch.dtype:
    """The dtype of scalars and sums on a device: float64, or float32 where it has no float64, as on Apple's GPUs."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return torch.float32
    return torch.float64


def scalar(x: Tensor, device: torch.device) -> Tensor:
    """A 0-dim tensor on ``device``, in the dtype of scalars."""
    return x.to(device, scalar_dtype(device))


def rounded(x: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """A scalar in the dtype of the arithmetic that it enters: a 0-dim tensor must not widen another one."""
    return x.to(dtype) if isinstance(x, Tensor) else x


def sum_norms(tensors: Sequence[Tensor], norm_type: float = 2.0) -> tuple[Tensor, Tensor]:
    """:func:`grad_norms` in the dtype of scalars, before they are rounded."""
    norms = torch.stack([scalar(_norm(x, norm_type), tensors[0].device) for x in tensors])
    return vector_norm(norms, norm_type), norms


def _norm(x: Tensor, norm_type: float) -> Tensor:
    """The norm of one tensor.

    PyTorch's float32 CPU norm has an error of 6e-4 at 2**24 elements. Its float64 norm is slow.
    """
    is_plain, dtype = type(x) in PLAIN, scalar_dtype(x.device)
    if x.numel() == 0:
        return wide(x).sum().abs()
    if x.is_complex():  # PyTorch's norm of order 0 warns that it makes real numbers of them
        x = x.to(dtype.to_complex()).abs()
    if not is_plain or x.device.type != "cpu":  # where float64 may be slow, or elements lie elsewhere
        return vector_norm(wide(x), norm_type)
    if norm_type not in (1.0, 2.0):
        return vector_norm(x if norm_type == math.inf else x.to(dtype), norm_type).to(dtype)
    flat, columns, rows = x.reshape(-1), 1 << 14, 8  # of a block, which caches hold in float64
    whole = flat.numel() // columns * columns
    blocks = [*torch.split(flat[:whole].view(-1, columns), rows), flat[whole:].view(1, -1)]
    terms = (block.to(dtype, copy=True) for block in blocks)
    sums = torch.cat([(x.abs_() if norm_type == 1.0 else x.square_()).sum(dim=1) for x in terms])
    return sums.sum() if norm_type == 1.0 else sums.sum().sqrt()


def norm_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which norms of ``tensors`` are returned: float32 unless one of them is float64."""
    is_double = not {torch.float64, torch.complex128}.isdisjoint([x.dtype for x in tensors])
    return torch.float64 if is_double else torch.float32


def grad_norms(tensors: Sequence[Tensor], norm_type: float = 2.0) -> tuple[Tensor, Tensor]:
    """The norm of all ``tensors`` as one vector (0-dim), and the norm of each (1-D), in float32 or float64."""
    total_norm, norms = sum_norms(tensors, norm_type)
    return total_norm.to(norm_dtype(tensors)), norms.to(norm_dtype(tensors))


def clip_coefficient(total_norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """``min(1, max_norm / (total_norm + 1e-6))`` in the dtype of scalars; NaN where the norm is NaN."""
    max_norm = scalar(max_norm, total_norm.device) if isinstance(max_norm, Tensor) else max_norm
    return torch.clamp(max_norm / (scalar(total_norm, total_norm.device) + 1e-6), max=1.0)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiply every tensor by one coefficient."""
    for x in tensors:
        write(x, wide(x) * coefficient.to(x.device, wide(x).dtype.to_real()))


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """Limit every element to ``[-bound, bound]``."""
    for x in tensors:
        x.clamp_(-bound, bound)


def as_it_is(x: Tensor | float) -> Tensor | float:
    """A number of the one parameter that there is."""
    return x


def bias_correction(beta: float, step: Tensor) -> Tensor | float:
    """``1 - beta ** step``, without the cancellation."""
    return -torch.expm1(step * math.log(beta)) if beta > 0 else 1.0


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float,
    maximize: float = False,
    coefficient: Tensor | float = 1.0,
    skip: Tensor | None = None,
    spread: Callable[[Tensor | float], Tensor | float] = as_it_is,
) -> None:
    """One step of AdamW (arXiv:1711.05101, algorithm 2) for one parameter, AMSGrad with ``max_exp_avg_sq``.

    Or for several in a row of memory: ``step`` then has one number for each, and ``spread`` repeats such numbers for
    the elements of each.
    """
    dtype, device = wide(param).dtype, param.device
    beta1, beta2 = float(beta1), float(beta2)
    t = step + 1
    correction1, correction2 = (spread(bias_correction(beta, scalar(t, device))) for beta in (beta1, beta2))
    lr = scalar(lr, device) if isinstance(lr, Tensor) else lr
    g = grad.to(dtype) * rounded(coefficient, dtype)
    g = -g if maximize else g
    m = torch.lerp(exp_avg.to(dtype), g, 1 - beta1)
    v = exp_avg_sq.to(dtype) * beta2 + (1 - beta2) * g * g
    v_max = v if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq.to(dtype), v)
    denominator = (v_max / rounded(correction2, dtype)).sqrt() + eps
    delta = m / rounded(correction1, dtype) / denominator
    kept = param.to(dtype) * rounded(1 - lr * weight_decay, dtype)
    write(param, kept - rounded(lr, dtype) * delta, skip)
    write(exp_avg, m, skip)
    write(exp_avg_sq, v, skip)
    write(step, t, skip)
    if max_exp_avg_sq is not None:
        write(max_exp_avg_sq, v_max, skip)


def penalized(
    param: Tensor, grad: Tensor, coefficient: Tensor | float, maximize: float, weight_decay: float | Tensor
) -> Tensor:
    """``coefficient * grad + weight_decay * param``, the gradient with that of an L2 penalty.

    Without a penalty, the parameter is not looked at: it may be infinite.
    """
    dtype = wide(param).dtype
    g = grad.to(dtype) * rounded(coefficient, dtype)
    g = -g if maximize else g
    return g if float(weight_decay) == 0.0 else g + float(weight_decay) * param.to(dtype)


def adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float,
    maximize: float = False,
    coefficient: Tensor | float = 1.0,
    skip: Tensor | None = None,
    spread: Callable[[Tensor | float], Tensor | float] = as_it_is,
) -> None:
    """One step of Adam (arXiv:1412.6980, algorithm 1): AdamW, with an L2 penalty in place of its decay."""
    adamw_(
        param,
        penalized(param, grad, coefficient, maximize, weight_decay),
        exp_avg,
        exp_avg_sq,
        step,
        max_exp_avg_sq,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=0.0,
        skip=skip,
        spread=spread,
    )


def sgd_(
    param: Tensor,
    grad: Tensor,
    step: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    dampening: float,
    weight_decay: float | Tensor,
    nesterov: float = False,
    maximize: float = False,
    coefficient: Tensor | float = 1.0,
    skip: Tensor | None = None,
    spread: Callable[[Tensor | float], Tensor | float] = as_it_is,
) -> None:
    """One step of SGD, with momentum where there is a buffer, for one parameter or, as :func:`adamw_`, for several.

    PyTorch's form of https://proceedings.mlr.press/v28/sutskever13.html: the buffer is the gradient in the
    first step, and the learning rate is no part of it.
    """
    dtype, device = wide(param).dtype, param.device
    lr = scalar(lr, device) if isinstance(lr, Tensor) else lr
    direction = g = penalized(param, grad, coefficient, maximize, weight_decay)
    if momentum_buffer is not None:
        momentum = float(momentum)
        is_first = spread(scalar(step, device)) == 0.0
        later = momentum * momentum_buffer.to(dtype) + (1 - dampening) * g
        b = torch.where(is_first, g, later)  # type: ignore[arg-type]
        direction = g + momentum * b if nesterov else b
        write(momentum_buffer, b, skip)
    write(param, param.to(dtype) - rounded(lr, dtype) * direction, skip)
    write(step, step + 1, skip)


def ema_(
    averages: Sequence[Tensor],
    tensors: Sequence[Tensor],
    decay: float,
    skip: Tensor | None = None,
    randoms: Sequence[Random | None] | None = None,
) -> None:
    """``average += (1 - decay) * (tensor - average)``.

    Special cases avoid ``inf - inf``: decay 0 copies, decay 1 keeps, equal values stay. ``randoms``: of averages that
    are rounded stochastically.
    """
    for average, tensor, random in zip(averages, tensors, randoms or [None] * len(averages), strict=True):
        dtype = torch.promote_types(wide(average).dtype, wide(tensor).dtype)
        old, new = average.to(dtype), tensor.to(dtype)
        moved = new if decay == 0 else old if decay == 1 else torch.lerp(old, new, 1 - decay)
        write(average, moved if decay == 0 else torch.where(old == new, old, moved), skip, random)


def drop_path_mask(
    x: Tensor, drop_prob: float, scale_by_keep: bool = True, dtype: torch.dtype | None = None
) -> Tensor:
    """One value per sample (dim 0) of ``x``: 0 with probability ``drop_prob``, else 1 or ``1 / keep_prob``.

    Drawn from torch's generator exactly as timm draws it (timm/layers/drop.py): same seed, same mask.
    """
    keep_prob = 1 - drop_prob
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=dtype).bernoulli_(keep_prob)
    return mask.div_(keep_prob) if keep_prob > 0.0 and scale_by_keep else mask


def drop_path(
    branch: Tensor,
    mask: Tensor,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Stochastic depth (arXiv:1603.09382): ``residual + branch * layer_scale * mask``.

    With a residual, a dropped sample is its residual, whatever its branch holds. ``branch`` may hold only the kept
    samples: sample ``i`` of the result then takes ``branch[rows[i]]``.
    """
    if rows is not None:
        branch = branch.index_select(0, rows)
    if residual is not None:
        branch = torch.where(mask != 0, branch, 0)
    scaled = (branch if layer_scale is None else branch * layer_scale) * mask
    return scaled if residual is None else torch.where(mask != 0, residual + scaled, residual)


def drop_path_backward(
    grad: Tensor, branch: Tensor | None, mask: Tensor, layer_scale: Tensor | None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of :func:`drop_path` by the branch, in ``grad``'s shape, and given ``branch``, by layer scale.

    ``mask`` has a value per sample of the branch. With ``rows``, sample ``i`` of the branch takes ``grad[rows[i]]``.
    """
    grad = (grad if rows is None else grad.index_select(0, rows)).to(mask.dtype)
    of_layer_scale = None
    if branch is not None and layer_scale is not None:
        kept = torch.where(mask != 0, branch, 0)  # whatever a dropped branch holds
        of_layer_scale = (wide(grad) * wide(mask) * wide(kept)).sum_to_size(layer_scale.shape).to(layer_scale.dtype)
    return drop_path(grad, mask, None, layer_scale), of_layer_scale
