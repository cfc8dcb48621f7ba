"""Statistics of a step: of the gradients before clipping, of the weights, and of what the step did to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference
from .adapters import StepControl
from .lost_updates import share_of_lost_updates
from .reference_storage import wide
from .seeds import OWN_STATE
from .statistics import TensorStats, tensor_stats

if TYPE_CHECKING:
    from .step import TakesFusedSteps

KINDS = ("norms", "full")
KEY = "stats_step"  # of the count of steps, among what the first group keeps


@dataclass(frozen=True)
class StepStats:
    """What ``stats="norms"`` or ``"full"`` collects of a step, one row for each parameter that has a gradient.

    Attributes:
        step: which call of ``step()`` it was, from 1, counted by the optimizer; checkpoints keep the count.
        params: for each row, the place of its parameter among all of the optimizer, in group order.
        grads: of the gradients, before clipping, divided by a GradScaler's scale.
        weights: of the weights before the step; with a ``master``, in full.
        updates: of what the step added to the weights, as they are stored; zeros if it was skipped.
        lost_updates: with ``"full"``, the share of each parameter's elements whose update rounding has lost: see
            ``lost_updates()``. Else None.
    """

    step: int
    params: tuple[int, ...]
    grads: TensorStats
    weights: TensorStats
    updates: TensorStats
    lost_updates: Tensor | None = None

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
        found = self.grads.to_dict(own, "grad/")
        found |= self.weights.to_dict(own, "weight/") | self.updates.to_dict(own, "update/")
        columns = {"ratio": self.update_ratios}
        if self.lost_updates is not None:
            columns["lost"] = self.lost_updates
        for key, column in columns.items():
            numbers = column.to(torch.float64).tolist()
            found |= {f"update/{key}/{name}": x for name, x in zip(own, numbers, strict=True)}
        return found


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

    def coefficient(self) -> Tensor | float:
        """What the next step multiplies gradients with, as they are. With ``max_grad_norm``, all ranks must ask."""
        optimizer: Any = self
        scale, limit = optimizer._from_scaler("grad_scale"), optimizer.max_grad_norm
        clipped: Tensor | float = 1.0
        if limit is not None:
            norm = optimizer._joint_norm(StepControl(grad_scale=scale)).control.total_norm
            limit = limit.reshape(()) if isinstance(limit, Tensor) else float(limit)
            clipped = 1.0 if norm is None else reference.clip_coefficient(norm, limit)
        return clipped if scale is None else clipped / reference.scalar(scale, optimizer._device())

    def _begin_stats(self) -> "Collection | None":
        """What is to be known before a step of which statistics are due."""
        if self.collects is None:
            return None
        check_stats(self.collects, self.stats_every)  # anybody may set them
        step = self._stats_step() + 1
        return Collection(self, step) if step % self.stats_every == 0 else None  # type: ignore[arg-type]

    def _finish_stats(self, collection: "Collection | None") -> None:
        """Count a step, and look at what it has done."""
        if self.collects is None:
            return
        if collection is not None:
            self.stats = collection.finish()
        group = self.param_groups[0]
        group[OWN_STATE] = {**group.get(OWN_STATE, {}), KEY: self._stats_step() + 1}

    def _stats_step(self) -> int:
        return int(self.param_groups[0].get(OWN_STATE, {}).get(KEY, 0))


class Collection:
    """Statistics of one step, which begin before it: of its gradients and weights."""

    def __init__(self, optimizer: "TakesFusedSteps", step: int) -> None:
        self.optimizer, self.step = optimizer, step
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.places = [i for i, p in enumerate(params) if p.grad is not None]
        self.params = [params[i] for i in self.places]
        self.options: dict[str, Any] = {"histogram": optimizer.collects == "full", "backend": optimizer.backend}
        if any(p.grad.layout is not torch.strided for p in self.params if p.grad is not None):
            raise RuntimeError("there are no statistics of sparse gradients: leave out `stats`")
        scale = optimizer._from_scaler("grad_scale")
        grads = tensor_stats([p.grad for p in self.params if p.grad is not None], **self.options)
        self.grads = grads if scale is None else grads.divided(scale)
        self.lost = self._lost_updates() if optimizer.collects == "full" else None
        self.before = [_wide_copy(p, optimizer.float32_weight(p)) for p in self.params]
        self.weights = tensor_stats(self.before, **self.options)

    def finish(self) -> StepStats:
        """After the step. The copies of the weights become the updates."""
        for old, param in zip(self.before, self.params, strict=True):
            old.sub_(wide(self.optimizer.float32_weight(param).detach())).neg_()
        updates = tensor_stats(self.before, **self.options)
        return StepStats(self.step, tuple(self.places), self.grads, self.weights, updates, self.lost)

    def _lost_updates(self) -> Tensor:
        shares = share_of_lost_updates(self.optimizer, self.optimizer.coefficient())
        device = self.grads.rows.device
        return torch.stack([x.to(device) for x in shares]) if shares else torch.zeros(0, device=device)


def _wide_copy(param: Tensor, weight: Tensor) -> Tensor:
    """A copy of a parameter's weight in the dtype of arithmetic."""
    copy = wide(weight.detach())
    return copy.clone() if weight is param and copy.dtype == param.dtype else copy
