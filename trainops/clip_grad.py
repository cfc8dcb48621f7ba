"""Gradient clipping by norm and by value: the functions of :mod:`torch.nn.utils`, fused.

Differences from PyTorch: the norm of 16-bit gradients is float32; norms of order 1, 2 and infinity are accumulated so
that the same gradients give the same bits, with any number of threads; kernels do not rewrite gradients whose
coefficient is 1; and the parts of complex gradients are clipped separately: an infinity in one makes no NaN of the
other. Compiled code has PyTorch's own functions, which compilers fuse; there, too, norms of 16 bits are float32.

Of DTensors, kernels measure and scale this rank's shards, and one all-reduce joins the norms (:mod:`trainops.ranks`).
The result is a plain tensor, the same on every rank, where PyTorch's is a DTensor.
"""

import math
import types
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

# By name, since trainops.integrations.patch() puts ours in their place.
from torch.nn.utils import clip_grad_value_ as torch_clip_grad_value_
from torch.nn.utils import clip_grads_with_norm_ as torch_clip_grads_with_norm_
from torch.nn.utils import get_total_norm as torch_get_total_norm

from . import advice, reference
from .adapters import Kernels, check, select
from .norm_order import norms_by
from .plain import all_plain
from .ranks import NormGroup, group_name, is_spread, norms_over_ranks
from .reference_storage import wide
from .tables import local, replicated, summed

Tensors = Tensor | Iterable[Tensor]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    norm_group: NormGroup = None,
    backend: str | None = None,
) -> Tensor:
    """Scale the gradients of ``parameters`` in place so that their norm is at most ``max_norm``.

    Equivalent to::

        torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)

    Args:
        parameters: a tensor or an iterable of tensors; those without a gradient are passed over.
        max_norm: the largest norm that is left alone, in units of the gradients.
        norm_type: order of the norm; may be ``inf``.
        error_if_nonfinite: raise where the norm is infinite or NaN.
        foreach: accepted for compatibility.
        norm_group: the process group over which the norm is taken, or its name (``"world"``: the default one), where
            each of its ranks has other gradients: stages of a pipeline, FSDP1, ZeroRedundancyOptimizer. Without one,
            plain gradients are taken to be the same on all ranks. DTensors know their ranks.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Returns:
        The norm before clipping, 0-dim, on the first gradient's device.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set; no gradient has been changed.

    Source: Pascanu et al., https://arxiv.org/abs/1211.5063.
    """
    is_generator = isinstance(parameters, types.GeneratorType)
    parameters = _listed(parameters)
    if is_generator and not parameters:
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    if is_compiling() or not is_spread(parameters, norm_group):
        total_norm = get_total_norm(_grads(parameters), norm_type, error_if_nonfinite, foreach, backend=backend)
    else:  # ranks ask each other also about gradients that one of them has not
        check(backend)
        grads = [p.grad for p in parameters]
        total_norm = _over_ranks(grads, parameters, float(norm_type), norm_group, backend)
        _check_finite(total_norm, float(norm_type), error_if_nonfinite)
    clip_grads_with_norm_(parameters, max_norm, total_norm, foreach, backend=backend)
    return total_norm


@torch.no_grad()
def get_total_norm(
    tensors: Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    norm_group: NormGroup = None,
    backend: str | None = None,
) -> Tensor:
    """The norm of all ``tensors``, taken as one vector.

    Equivalent to::

        torch.nn.utils.get_total_norm(tensors, norm_type, error_if_nonfinite)

    Args:
        tensors: a tensor or an iterable of tensors, on any devices.
        norm_type: order of the norm; may be ``inf``.
        error_if_nonfinite: raise where the norm is infinite or NaN.
        foreach: accepted for compatibility.
        norm_group: the process group over which the norm is taken, or its name (``"world"``: the default one), where
            each of its ranks has other gradients: stages of a pipeline, FSDP1, ZeroRedundancyOptimizer. Without one,
            plain gradients are taken to be the same on all ranks. DTensors know their ranks.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Returns:
        A 0-dim tensor on the first tensor's device, float32 unless a tensor is float64. 0.0 for an empty list.
        Several optimizers clip by one norm where each is given it: ``step(total_norm=...)``, or
        :func:`clip_grads_with_norm_` for one of PyTorch's.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.
        TypeError, ValueError: ``norm_group`` is no process group, or this rank is not in it.
    """
    check(backend)
    tensors = _listed(tensors)
    norm_type = float(norm_type)
    if not tensors and norm_group is None:
        return torch.tensor(0.0)
    if is_compiling():
        return torch_get_total_norm(list(map(wide, tensors)), norm_type, error_if_nonfinite)
    if is_spread(tensors, norm_group):
        total_norm = _over_ranks(tensors, tensors, norm_type, norm_group, backend)
        _check_finite(total_norm, norm_type, error_if_nonfinite)
        return total_norm
    if not _all_dense(tensors):
        return torch_get_total_norm(tensors, norm_type, error_if_nonfinite)
    totals = [norms_by(kernels, part, norm_type)[0] for kernels, part in _by_device(tensors, backend)]
    total_norm = totals[0] if len(totals) == 1 else reference.grad_norms(totals, norm_type)[0]
    _check_finite(total_norm, norm_type, error_if_nonfinite)
    return total_norm


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Tensors,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Multiply the gradients of ``parameters`` with ``min(1, max_norm / (total_norm + 1e-6))``, in place.

    Equivalent to::

        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm)

    Args:
        parameters: a tensor or an iterable of tensors; those without a gradient are passed over.
        max_norm: the largest norm that is left alone, in units of the gradients.
        total_norm: their norm, 0-dim.
        foreach: accepted for compatibility.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Raises:
        ValueError, RuntimeError: there is no such backend, or it is not available.
    """
    check(backend)
    parameters = _listed(parameters)
    grads = _grads(parameters)
    if not grads:
        return
    if not is_compiling():
        advice.clips_outside(parameters, float(max_norm))
    shards = grads if is_compiling() else list(map(local, grads))  # a DTensor's own sum may be clipped as its parts
    if is_compiling() or not _all_dense(shards):
        torch_clip_grads_with_norm_(parameters, max_norm, total_norm)
        return
    total_norm = replicated(total_norm)
    coefficient = reference.clip_coefficient(total_norm, float(max_norm))
    torch.autograd.graph.increment_version(grads if all_plain(grads) else [*grads, *shards])
    for kernels, part in _by_device(shards, backend):
        kernels.scale_(part, coefficient)


@torch.no_grad()
def clip_grad_value_(
    parameters: Tensors, clip_value: float, foreach: bool | None = None, *, backend: str | None = None
) -> None:
    """Limit every element of the gradients of ``parameters`` to ``[-clip_value, clip_value]``, in place.

    Equivalent to::

        torch.nn.utils.clip_grad_value_(parameters, clip_value)

    Args:
        parameters: a tensor or an iterable of tensors; those without a gradient are passed over.
        clip_value: the largest magnitude that is left alone, in units of the gradients.
        foreach: accepted for compatibility.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Raises:
        ValueError, RuntimeError: there is no such backend, or it is not available.
    """
    check(backend)
    parameters, clip_value = _listed(parameters), float(clip_value)
    grads = _grads(parameters)
    if is_compiling() or math.isnan(clip_value) or not _all_dense(grads) or any(x.is_complex() for x in grads):
        torch_clip_grad_value_(parameters, clip_value)
        return
    torch.autograd.graph.increment_version(grads)
    for kernels, part in _by_device(grads, backend):
        kernels.clamp_(part, clip_value)


def _over_ranks(
    tensors: Sequence[Tensor | None],
    placed: Sequence[Tensor],
    norm_type: float,
    norm_group: NormGroup,
    backend: str | None,
) -> Tensor:
    """The norm of tensors that lie on several ranks. For a None, others may have one, placed as in ``placed``."""
    whole = [None if x is None else summed(x) for x in tensors]
    placed = [p if x is None else x for x, p in zip(whole, placed, strict=True)]
    found = norms_over_ranks(whole, placed, norm_type, group_name(norm_group), backend)
    return found.total_norm.to(found.dtype)


def _check_finite(total_norm: Tensor, norm_type: float, error_if_nonfinite: bool) -> None:
    if error_if_nonfinite and not math.isfinite(total_norm.item()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )


def _listed(parameters: Tensors) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _grads(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _all_dense(tensors: Sequence[Tensor]) -> bool:
    return all_plain(tensors) and all(x.layout is torch.strided for x in tensors)


def _by_device(tensors: Sequence[Tensor], backend: str | None) -> list[tuple[Kernels, list[Tensor]]]:
    addresses = [address for address in map(Tensor.data_ptr, tensors) if address != 0]
    if len(set(addresses)) < len(addresses):
        backend = "reference"  # kernels would work on the same memory at the same time
    parts: dict[torch.device, list[Tensor]] = {}
    for x in tensors:
        parts.setdefault(x.device, []).append(x)
    return [(select(backend, device), part) for device, part in parts.items()]
