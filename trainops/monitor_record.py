"""What a monitor has seen of a step."""

import math
from typing import Any, NamedTuple

from torch import Tensor

from .statistics import TensorStats, keyed
from .step_stats import Measured, numbers_of
from .tables import local


class Watched(NamedTuple):
    """The outputs of modules in the batches of one step.

    Attributes:
        names: of the modules.
        outputs: their statistics, a row for each module.
        dead: the share of units that were 0 for all inputs, for each module; of ReLU and the like.
        saturated: the share of outputs at an end of their range, for each module; NaN where they have none.
    """

    names: list[str]
    outputs: TensorStats
    dead: Tensor
    saturated: Tensor


class Record(NamedTuple):
    """Statistics of a step.

    Attributes:
        step: its number, from 1.
        names: of the parameters that had a gradient, the rows of the statistics; DTensors that other ranks may have
            gradients of are among them, with a row of no elements where none has.
        grads: of the gradients, without a GradScaler's scale.
        weights: of the weights before the step; with a ``master``, in full.
        updates: of what the step has added to the weights.
        activations: of the outputs of modules; None where none are watched.
        skipped: whether the step left all weights as they were, because it was skipped: by a GradScaler, or by
            ``skip_nonfinite`` or ``spike_guard``; None where the optimizer counts no steps. May be a tensor.
        lrs: the learning rate of each parameter.
    """

    step: int
    names: list[str]
    grads: TensorStats
    weights: TensorStats
    updates: TensorStats
    activations: Watched | None
    skipped: Tensor | bool | None = None
    lrs: tuple[Tensor | float, ...] = ()

    @property
    def update_ratios(self) -> Tensor:
        """The norm of each update over that of its weight."""
        return self.updates.l2_norm / self.weights.l2_norm

    def without_histograms(self) -> "Record":
        """The same, in little memory."""
        watched = self.activations
        if watched is not None:
            watched = watched._replace(outputs=TensorStats(watched.outputs.rows))
        grads, weights, updates = (TensorStats(x.rows) for x in (self.grads, self.weights, self.updates))
        return self._replace(grads=grads, weights=weights, updates=updates, activations=watched)

    def flat(self) -> dict[str, float]:
        """All numbers, by keys like ``grad/l2_norm/<name>``."""
        found = numbers_of(self, self.names)
        if (watched := self.activations) is not None:
            found |= watched.outputs.to_dict(watched.names, "activation/")
            found |= keyed("activation/dead", watched.names, watched.dead)
            saturated = keyed("activation/saturated", watched.names, watched.saturated)
            found |= {key: x for key, x in saturated.items() if x == x}
        return found

    def by_layer(self) -> dict[str, list[int]]:
        """The rows of each layer."""
        layers: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            layers.setdefault(layer_of(name), []).append(row)
        return layers

    def norms_by_layer(self, stats: TensorStats) -> dict[str, float]:
        """The norm of all tensors of each layer together."""
        norms = stats.l2_norm.tolist()
        return {layer: math.hypot(*(norms[i] for i in rows)) for layer, rows in self.by_layer().items()}

    def sums_by_layer(self, counts: Tensor) -> dict[str, int]:
        """The sum of a count over the tensors of each layer."""
        numbers = counts.tolist()
        return {layer: sum(numbers[i] for i in rows) for layer, rows in self.by_layer().items()}


def layer_of(name: str) -> str:
    """The module that has a parameter; a parameter of the model itself is a layer of its own."""
    return name.rpartition(".")[0] or name


class BegunStep:
    """A step that is looked at, before it is taken."""

    def __init__(self, optimizer: Any, params: dict[str, Tensor], measured: Measured) -> None:
        self.optimizer, self.names, self.measured = optimizer, list(params), measured
        self.first = next((p for p in params.values() if p.grad is not None), None)
        self.steps_before = self._steps(0)
        groups = [(_own(group.get("lr", 1.0)), group["params"]) for group in optimizer.param_groups]
        lr_of = {p: lr for lr, its in groups for p in its}
        self.lrs = tuple(lr_of.get(p, 1.0) for p in params.values())

    def _steps(self, default: Any) -> Any:
        """How many steps the optimizer has counted of a parameter, as most do in its state."""
        return default if self.first is None else _own(self.optimizer.state.get(self.first, {}).get("step", default))

    def finish(self, step: int, seen: Watched | None) -> Record:
        """The record, when the step was taken."""
        its, steps = self.measured, self._steps(None)
        skipped = None if steps is None else steps == self.steps_before
        return Record(step, self.names, its.grads, its.weights, its.updates(), seen, skipped, self.lrs)


def _own(x: Any) -> Any:
    """A number; of one on a device, which may be written in place, a copy; None if it is not one number."""
    if not isinstance(x, Tensor):
        return x
    x = local(x.detach())
    return x.clone().reshape(()) if x.numel() == 1 else None
