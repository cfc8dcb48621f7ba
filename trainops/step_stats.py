"""Statistics of a step: of the gradients before clipping, of the weights, and of what the step did to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import TensorStats


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
