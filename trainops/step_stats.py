"""Statistics of a step: of the gradients before clipping, of the weights, and of what the step did to them."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from . import reference
from .adapters import StepControl
from .joint_norm import known_norm
from .lost_updates import share_of_lost_updates
from .ranks import is_sharded
from .reference_storage import wide
from .seeds import OWN_STATE
from .statistics import TensorStats, keyed, tensor_stats
from .tables import local

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

KINDS = ("norms", "full")
KEY = "stats_step"  # of the count of steps, among what the first group keeps


@dataclass(frozen=True)
class StepStats:
    """What ``stats="norms"`` or ``"full"`` collects of a step, one row for each parameter that has a gradient.

    A DTensor has a row wherever one rank may have a gradient; where none has, it is a row of no elements.

    Attributes:
        step: which call of ``step()`` it was, from 1, counted by the optimizer; checkpoints keep the count.
        params: for each row, the place of its parameter among all of the optimizer, in group order.
        grads: of the gradients, before clipping, divided by a GradScaler's scale.
        weights: of the weights before the step; with a ``master``, in full.
        updates: of what the step added to the weights, as they are stored; zeros if it was skipped.
        lost_updates: with ``"full"``, the share of each parameter's elements whose update rounding has lost: see
            ``lost_updates()``. Else None.
        skipped: whether the step was skipped, as a tensor on the device; None if nothing could have skipped it.
    """

    step: int
    params: tuple[int, ...]
    grads: TensorStats
    weights: TensorStats
    updates: TensorStats
    lost_updates: Tensor | None = None
    skipped: Tensor | None = None

    @property
    def update_ratios(self) -> Tensor:
        """The norm of each update, divided by that of its weight; NaN where both are 0."""
        return self.updates.l2_norm / self.weights.l2_norm

    def to_dict(self, names: Sequence[str] | None = None) -> dict[str, float]:
        """Plain numbers under keys like ``grad/l2_norm/<name>``, ``weight/...`` and ``update/ratio/<name>``.

        Waits for the device. ``names``: of all parameters of the optimizer, in group order; default: their places.

        Raises:
            ValueError: there are fewer names than parameters that were measured.
        """
        if names is not None and max(self.params, default=-1) >= len(names):
            raise ValueError(f"there are {len(names)} names, but parameter {max(self.params)} was measured")
        own = [str(i) if names is None else names[i] for i in self.params]
        lost = {} if self.lost_updates is None else keyed("update/lost", own, self.lost_updates)
        return numbers_of(self, own) | lost


def numbers_of(stats: Any, names: Sequence[str]) -> dict[str, float]:
    """What :class:`StepStats` and a monitor's records have in common, under keys like ``grad/l2_norm/<name>``."""
    found: dict[str, float] = {}
    for prefix, its in (("grad/", stats.grads), ("weight/", stats.weights), ("update/", stats.updates)):
        found |= its.to_dict(names, prefix)
    return found | keyed("update/ratio", names, stats.update_ratios)


class Measured:
    """Statistics of some parameters' gradients and weights before a step, and of what the step then does to them.

    Of any optimizer of PyTorch. Keeps a copy of the weights: with a master, in full; of 16-bit weights, in float32.
    """

    def __init__(
        self, optimizer: Any, params: Sequence[Tensor], scale: Tensor | None, histogram: bool, backend: str | None
    ) -> None:
        """``scale``: that of a GradScaler, which the gradients still have."""
        self._params = params
        self._weight_of: Callable[[Tensor], Tensor] = getattr(optimizer, "float32_weight", lambda param: param)
        self._options: dict[str, Any] = {"histogram": histogram, "backend": backend}
        grads = tensor_stats([_gradient(p) for p in params], **self._options)
        self.grads = grads if scale is None else grads.divided(scale)
        self._before = [_wide_copy(p, self._weight_of(p)) for p in params]
        self.weights = tensor_stats(self._before, **self._options)

    def updates(self) -> TensorStats:
        """After the step, once: the copies of the weights become the updates."""
        for old, param in zip(self._before, self._params, strict=True):
            old.sub_(wide(self._weight_of(param).detach())).neg_()
        return tensor_stats(self._before, **self._options)


def check_stats(stats: Any, stats_every: Any) -> None:
    """Raise unless these say what is collected, and when.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there is no such kind, or the other argument is out of range or of no use.
    """
    if stats is not None and stats not in KINDS:
        raise ValueError(f"stats must be {' or '.join(map(repr, KINDS))}, or None, got {stats!r:.60}")
    if not isinstance(stats_every, int) or isinstance(stats_every, bool):
        raise TypeError(f"stats_every must be an integer, got {stats_every!r:.60}")
    if stats_every < 1:
        raise ValueError(f"stats_every must be at least 1, got {stats_every}")
    if stats is None and stats_every != 1:
        raise ValueError("stats_every is of no use without stats")


class CollectsStats(torch.optim.Optimizer):
    """An optimizer that may collect statistics of every so many steps."""

    collects: str | None
    stats_every: int
    stats: StepStats | None
    backend: str | None

    def coefficient(self, total_norm: float | Tensor | None = None) -> Tensor | float:
        """What the next step multiplies gradients with, as they are. With ``max_grad_norm``, all ranks must ask.

        ``total_norm``: as for ``step()``.
        """
        optimizer: Any = self
        scale, limit = optimizer._from_scaler("grad_scale"), optimizer.max_grad_norm
        clipped: Tensor | float = 1.0
        if limit is not None:
            control = StepControl(grad_scale=scale)
            if total_norm is None:
                norm = optimizer._joint_norm(control).control.total_norm
            else:
                norm = known_norm(control, total_norm, optimizer._device()).control.total_norm
            limit = limit.reshape(()) if isinstance(limit, Tensor) else float(limit)
            clipped = 1.0 if norm is None else reference.clip_coefficient(norm, limit)
        return clipped if scale is None else clipped / reference.scalar(scale, optimizer._device())

    def _begin_stats(self, total_norm: float | Tensor | None) -> "Collection | None":
        """What is to be known before a step of which statistics are due; ``total_norm``: what the step was given."""
        if self.collects is None:
            return None
        check_stats(self.collects, self.stats_every)  # anybody may set them
        step = self._stats_step() + 1
        if step % self.stats_every != 0:
            return None
        return Collection(self, step, total_norm)  # type: ignore[arg-type]

    def _finish_stats(self, collection: "Collection | None", skipped: Tensor | None) -> None:
        """Count a step, and look at what it has done."""
        if self.collects is None:
            return
        if collection is not None:
            self.stats = collection.finish(skipped)
        group = self.param_groups[0]
        group[OWN_STATE] = {**group.get(OWN_STATE, {}), KEY: self._stats_step() + 1}

    def _stats_step(self) -> int:
        return int(self.param_groups[0].get(OWN_STATE, {}).get(KEY, 0))


class Collection:
    """Statistics of one step, which begin before it: of its gradients and weights."""

    def __init__(self, optimizer: "FusedOptimizer", step: int, total_norm: float | Tensor | None) -> None:
        self.step = step
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.places = [i for i, p in enumerate(params) if is_measured(p)]
        measured = [params[i] for i in self.places]
        if any(p.grad.layout is not torch.strided for p in measured if p.grad is not None):
            raise RuntimeError("there are no statistics of sparse gradients: leave out `stats`")
        is_full = optimizer.collects == "full"
        self.lost = share_of_lost_updates(optimizer, measured, optimizer.coefficient(total_norm)) if is_full else None
        scale = optimizer._from_scaler("grad_scale")
        self.measured = Measured(optimizer, measured, scale, is_full, optimizer.backend)

    def finish(self, skipped: Tensor | None) -> StepStats:
        """After the step."""
        its = self.measured
        own = None if skipped is None else skipped.clone()
        return StepStats(self.step, tuple(self.places), its.grads, its.weights, its.updates(), self.lost, own)


def is_measured(param: Tensor) -> bool:
    """Whether there are statistics of a parameter: it has a gradient here, or may have one on other ranks."""
    return param.grad is not None or (param.requires_grad and is_sharded(param))


def _gradient(param: Tensor) -> Tensor:
    """A parameter's gradient, or one without elements where this rank of a DTensor's mesh has none."""
    if param.grad is not None:
        return param.grad
    spec, empty = cast(Any, param)._spec, local(param).new_empty(0)
    dtensor = importlib.import_module("torch.distributed.tensor").DTensor
    shape = {"shape": param.shape, "stride": param.stride()}
    return cast(Tensor, dtensor.from_local(empty, spec.mesh, spec.placements, run_check=False, **shape))


def _wide_copy(param: Tensor, weight: Tensor) -> Tensor:
    """A copy of a parameter's weight in the dtype of arithmetic."""
    copy = wide(weight.detach())
    return copy.clone() if weight is param and copy.dtype == param.dtype else copy
