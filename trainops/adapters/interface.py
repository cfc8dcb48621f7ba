"""The interface of a backend, and the arguments and results of a fused step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Backend:
    """The state of a backend on this machine.

    Attributes:
        available: whether it can be used.
        reason: why not; empty where it can.
        details: what it was built with and what it found on this machine, for people to read.
    """

    available: bool
    reason: str = ""
    details: str = ""


# The columns of averages that a step moves in one pass, as csrc/core/schema.h names them.
AVERAGES = ("average", "average2", "average3", "average4")


class Places(NamedTuple):
    """What the random bits of a row depend on, beside seed and step (``csrc/core/table.h``).

    With a place, bfloat16 is rounded stochastically; without one, the place is negative. 8-bit state has random bits
    in any case, by the first place.
    """

    first: int = -1  # the parameter's in ``param_groups``; of an average by itself, its own in its model
    averages: tuple[int, ...] = ()  # of the averages that a step moves
    origin: int = 0  # of a shard: the index of its first element in the whole parameter
    rounds_first: bool = True  # false: the first place is for 8-bit state alone


class Seeds(NamedTuple):
    """What random bits of a step depend on, beside the places: words (``reference_rounding.seed_word``)."""

    params: int = 0
    averages: tuple[int, ...] = ()


NO_SEEDS = Seeds()


class Rounding(NamedTuple):
    """What a step rounds stochastically, where it is bfloat16."""

    params: bool = False
    average_places: Sequence[Mapping[int, int]] = ()  # of each average, by ``id`` of what it follows
    seeds: Seeds = NO_SEEDS
    codes: bool = False  # whether parameters may have 8-bit state, which is always rounded stochastically


TO_NEAREST = Rounding()


class AverageRounding(NamedTuple):
    """How averages are rounded stochastically that are moved by themselves."""

    seed: int = 0  # a word
    places: Sequence[Places] = ()  # of each average; without any, they are rounded to nearest


NEAREST = AverageRounding()


@dataclass
class Group:
    """The parameters of one group that have a gradient, their state, and the group's settings.

    Attributes:
        settings: those of the rule by name; a 0-dim tensor may stay on its device.
        rows: how many parameters.
        columns: by the names of a table's columns, one tensor (or None) per parameter. Empty if they are collected.
        places: of each parameter. Empty if nothing is rounded stochastically.
    """

    settings: Mapping[str, float | Tensor]
    rows: int
    columns: dict[str, list[Any]] = field(default_factory=dict)
    places: list[Places] = field(default_factory=list)


@dataclass(frozen=True)
class StepControl:
    """The inputs that decide the coefficient of the gradients, and whether the step is taken."""

    max_norm: float | Tensor | None = None  # 0-dim
    skip_nonfinite: bool = False
    grad_scale: Tensor | None = None  # gradients are this many times too large
    found_inf: Tensor | None = None  # nonzero: skip the step
    total_norm: Tensor | None = None  # of the unscaled gradients, if it is already known
    skipped_steps: Tensor | None = None  # 0-dim int64; incremented if the step is skipped
    seeds: Seeds = NO_SEEDS  # of what is rounded stochastically
    guard: Tensor | None = None  # against spikes: its numbers (``trainops.spike_guard``), which the step updates

    @property
    def measures(self) -> bool:
        """Whether the step needs a pass over the gradients for their norm."""
        return self.total_norm is None and (
            self.max_norm is not None or self.skip_nonfinite or self.guard is not None
        )

    @property
    def may_skip(self) -> bool:
        """Whether the step could be skipped."""
        return self.skip_nonfinite or self.found_inf is not None or self.guard is not None


class StepResult(NamedTuple):
    """The results of a step, on its device. None where it was not needed."""

    total_norm: Tensor | None = None  # 0-dim, before clipping, of the unscaled gradients
    norms: Tensor | None = None  # 1-D, one per parameter
    skipped: Tensor | None = None  # 0-dim bool


class Collected(Protocol):
    """The rows of a step, collected by a backend straight from an optimizer's containers."""

    @property
    def params(self) -> list[Tensor]:
        """The parameters that have a gradient."""

    @property
    def group_rows(self) -> list[int]:
        """The number of these parameters in each group."""

    @property
    def averaged(self) -> list[int]:
        """The number of these parameters that have each average."""

    @property
    def has_shards(self) -> bool:
        """Whether one of these parameters is a DTensor."""

    @property
    def left(self) -> list[list[int]]:
        """For each average, the ids of the buffers that an update leaves alone."""


class Kernels(Protocol):
    """The ops of a backend, with the meaning of ``trainops.reference``."""

    def probe(self) -> Backend:
        """Whether the backend can be used on this machine."""

    def refusal(self, device: torch.device) -> str:
        """Why it does not take tensors on this device; empty if it does."""

    def collect(
        self,
        rule: str,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        averages: list[dict[int, Tensor]],
        buffers: list[list[Any]],
        states: list[tuple[str, ...]],
        rounding: Rounding = TO_NEAREST,
    ) -> Collected | None:
        """The rows of a step, if all rows are regular, else None.

        Args:
            rule: the name of the optimizer's rule.
            param_groups: the optimizer's.
            state: the optimizer's.
            averages: up to ``len(AVERAGES)`` of them, each by the ``id`` of its parameter.
            buffers: the pairs of buffers and averages (``trainops.model_pairs.Pair``) that each of these has beside.
            states: the names of the state that each group uses.
            rounding: what is rounded stochastically.
        """

    def update(
        self,
        rule: str,
        groups: Sequence[Group],
        control: StepControl,
        ema_decays: Sequence[float],
        collected: Collected | None = None,
    ) -> StepResult:
        """Norm, coefficient, a step of the rule, and EMA, for parameters on one device.

        The tensors are those of ``collected`` if given, else those in the groups' columns. There is a decay for each
        average, in the order of ``AVERAGES``.
        """

    def reduce(self, statistic: str, tensors: Sequence[Tensor], unrounded: bool = False) -> tuple[Tensor, Tensor]:
        """A statistic (``l1_norm``, ``l2_norm``, ``inf_norm``) of all tensors as one vector, and of each.

        In float64 if a tensor is, else in float32. ``unrounded``: in the dtype of scalars, to be joined further.
        """

    def statistics(self, tensors: Sequence[Tensor], histogram: bool) -> tuple[Tensor, Tensor | None]:
        """The rows of ``trainops.reference_statistics``, one for each tensor, and the histograms."""

    def scale_(self, tensors: Sequence[Tensor], coefficient: Tensor) -> None:
        """Multiply every tensor by a coefficient."""

    def clamp_(self, tensors: Sequence[Tensor], bound: float) -> None:
        """Limit every element to ``[-bound, bound]``."""

    def ema_(
        self,
        averages: Sequence[Tensor],
        tensors: Sequence[Tensor],
        decay: float,
        skip: Tensor | None = None,
        rounding: AverageRounding = NEAREST,
    ) -> None:
        """Move averages towards tensors."""

    def try_ema_(
        self,
        averages: Sequence[Tensor],
        tensors: Sequence[Tensor],
        decay: float,
        skip: Tensor | None = None,
        rounding: AverageRounding = NEAREST,
    ) -> bool:
        """Like :meth:`ema_`, if all rows are regular. Else returns False and does nothing."""

    def drop_path(
        self,
        branch: Tensor,
        mask: Tensor,
        residual: Tensor | None = None,
        layer_scale: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Stochastic depth, without autograd."""

    def drop_path_backward(
        self,
        grad: Tensor,
        branch: Tensor | None,
        mask: Tensor,
        layer_scale: Tensor | None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of the branch and, where ``branch`` is given, of the layer scale.

        The first has the dtype of ``mask``, or that of ``branch`` where a kernel computes both.
        """
