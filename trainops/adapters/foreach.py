"""The ``foreach`` backend: PyTorch's own multi-tensor and fused operations, for devices without kernels.

A step of AdamW in float32 or float64 is PyTorch's fused one. It would rewrite gradients that it scales, so clipped
ones are copies, of a chunk at a time. Everything else is the specification (:mod:`trainops.reference`) on chunks that
are gathered and scattered by multi-tensor operations. On a CPU, numbers can be looked at (``on_host``): a step is
skipped, or clips nothing, without arithmetic. On other devices, nothing waits for the device.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import advice, reference
from ..reference import drop_path, drop_path_backward
from ..reference_statistics import rows_of as statistics
from ..tables import as_real, local
from . import pytorch as specification
from ._foreach_average import ema_, try_ema_
from ._foreach_collect import collect
from ._foreach_norm import sum_norms
from ._foreach_rows import WIDE, Gathered, chunk_numel, chunks, is_odd, kinds, on_host
from ._foreach_update import update
from .interface import Backend

__all__ = [
    "clamp_",
    "collect",
    "drop_path",
    "drop_path_backward",
    "ema_",
    "probe",
    "reduce",
    "refusal",
    "scale_",
    "statistics",
    "try_ema_",
    "update",
]


def probe() -> Backend:
    """PyTorch's operations are always there."""
    return Backend(available=True, details=f"multi-tensor operations of PyTorch {torch.__version__}")


def refusal(device: torch.device) -> str:
    """Every device that computes."""
    return "it takes tensors on devices that compute" if device.type == "meta" else ""


def reduce(statistic: str, tensors: Sequence[Tensor], unrounded: bool = False) -> tuple[Tensor, Tensor]:
    """See :class:`trainops.adapters.interface.Kernels`."""
    total, norms = sum_norms(list(map(local, tensors)), specification.ORDERS[statistic])
    if unrounded:
        return total, norms
    dtype = reference.norm_dtype(tensors)
    return total.to(dtype), norms.to(dtype)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """See :func:`trainops.reference.scale_`. On a CPU, a coefficient of 1 leaves the tensors unread."""
    device = tensors[0].device
    coefficient = coefficient.to(device)
    if on_host(device) and coefficient.item() == 1.0:
        return
    for types, columns in kinds({"tensor": _written(tensors, lambda rest: specification.scale_(rest, coefficient))}):
        if types[0] in WIDE:
            torch._foreach_mul_(columns["tensor"], coefficient.to(types[0]))
            continue
        for chunk in chunks(columns, chunk_numel(device)):
            gathered = Gathered(chunk)
            reference.scale_(list(gathered.columns.values()), coefficient)
            gathered.scatter("tensor")


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """See :func:`trainops.reference.clamp_`."""
    for _, columns in kinds({"tensor": _written(tensors, lambda rest: specification.clamp_(rest, bound))}):
        torch._foreach_clamp_min_(columns["tensor"], -bound)
        torch._foreach_clamp_max_(columns["tensor"], bound)


def _written(tensors: Sequence[Tensor], serve_rest: Callable[[list[Tensor]], None]) -> list[Tensor]:
    """The tensors as real numbers, for operations that write them; the specification serves those that are odd."""
    rest = list(filter(is_odd, tensors))
    if rest:
        advice.left_to_reference(rest[0].device)
        serve_rest(rest)
        tensors = [x for x in tensors if not is_odd(x)]
    return [as_real(x, written=True) for x in tensors if x.numel() > 0]
