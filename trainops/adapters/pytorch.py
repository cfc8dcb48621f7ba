"""The ``reference`` backend: the specification itself, on any device and dtype."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference, reference_storage
from ..reference import drop_path, drop_path_backward
from ..reference_codes import CODE_OF, CODES, encoded, random_bits_of
from ..reference_rounding import Random, random_of, random_of_codes
from ..reference_statistics import rows_of as statistics
from ..storage import values_of_codes
from ..tables import as_real, check_no_overlap, local
from ._control import decide
from .interface import (
    AVERAGES,
    NEAREST,
    AverageRounding,
    Backend,
    Collected,
    Group,
    Places,
    Seeds,
    StepControl,
    StepResult,
)

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
    """The reference is always available."""
    return Backend(available=True, details=f"plain PyTorch {torch.__version__}")


def refusal(device: torch.device) -> str:
    """Every device."""
    return ""


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """See :func:`trainops.reference.scale_`."""
    resolved: list[tuple[Tensor, Tensor]] = []
    # As real numbers: a product of complex ones makes NaN of what stands beside an infinity.
    reference.scale_([_writable(x, resolved) for x in tensors], coefficient)
    for original, copy in resolved:
        original.copy_(copy)


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """See :func:`trainops.reference.clamp_`."""
    _check_writable(tensors)
    reference.clamp_(tensors, bound)


def ema_(
    averages: Sequence[Tensor],
    tensors: Sequence[Tensor],
    decay: float,
    skip: Tensor | None = None,
    rounding: AverageRounding = NEAREST,
) -> None:
    """See :func:`trainops.reference.ema_`."""
    _check_writable(averages)
    if not rounding.places:
        reference.ema_(averages, tensors, decay, skip)
        return
    averages, tensors = list(map(local, averages)), list(map(local, tensors))
    randoms = [
        random_of(x, x, rounding.seed, its.first, its.origin)
        for x, its in zip(averages, rounding.places, strict=True)
    ]
    reference.ema_(averages, tensors, decay, skip, randoms)


def try_ema_(*tensors: Any) -> bool:
    """Always False: the caller then uses :func:`ema_`."""
    return False


def collect(*containers: Any) -> None:
    """Always None: the specification takes lists of tensors, not tables."""


ORDERS = {"l1_norm": 1.0, "l2_norm": 2.0, "inf_norm": math.inf}


def reduce(statistic: str, tensors: Sequence[Tensor], unrounded: bool = False) -> tuple[Tensor, Tensor]:
    """See :func:`trainops.reference.grad_norms`."""
    return (reference.sum_norms if unrounded else reference.grad_norms)(tensors, ORDERS[statistic])


def update(
    rule: str,
    groups: Sequence[Group],
    control: StepControl,
    ema_decays: Sequence[float],
    collected: Collected | None = None,
) -> StepResult:
    """See :class:`trainops.adapters.interface.Kernels`."""
    rows = [Row(group, i) for group in groups for i in range(group.rows)]
    grads = [row.grad for row in rows]
    decision = decide(grads, control, reference.sum_norms)
    for row in rows:
        row.update(rule, decision.coefficient, decision.skipped, ema_decays, control.seeds)
    return decision.result


class Row:
    """One parameter with all that belongs to it, as real numbers."""

    def __init__(self, group: Group, index: int) -> None:
        columns = {name: column[index] for name, column in group.columns.items()}
        self.settings, self.places = group.settings, group.places[index] if group.places else Places()
        self.grad = as_real(columns.pop("grad"))
        self.step = columns.pop("step").reshape(())
        self._resolved: list[tuple[Tensor, Tensor]] = []
        written = {name: _writable(x, self._resolved) for name, x in columns.items()}
        self.param, self.averages = written.pop("param"), [written.pop(name, None) for name in AVERAGES]
        self.master = written.pop("master", None)
        self.state = written

    def update(
        self,
        rule: str,
        coefficient: Tensor | float,
        skipped: Tensor | None,
        ema_decays: Sequence[float],
        seeds: Seeds,
    ) -> None:
        device = self.param.device
        random = self._random(seeds)
        weight = self.param if random is None else reference_storage.wide(self.param)
        weight = weight if self.master is None else reference_storage.join(self.param, self.master)
        formula = getattr(reference, f"{rule}_")
        coded, state = self._decoded()
        bits = self._random_bits_of_codes(coded, seeds)
        formula(
            weight,
            self.grad,
            **state,
            step=self.step,
            **self.settings,
            coefficient=coefficient.to(device) if isinstance(coefficient, Tensor) else coefficient,
            skip=skipped,
        )
        for name, codes in coded.items():
            fresh = encoded(local(state[name]), CODE_OF[name], local(self.param), bits[name])
            reference_storage.write(codes, fresh, skipped)
        if self.master is not None:
            reference_storage.write_weight(self.param, self.master, weight, skipped)
        if random is not None:
            reference_storage.write(local(self.param), local(weight), skipped, random)
            weight = self.param
        for i, (average, decay) in enumerate(zip(self.averages, ema_decays, strict=False)):
            if average is not None:
                its = self._random_of_average(i, seeds)
                moved, followed = (x if its is None else local(x) for x in (average, weight))
                reference.ema_([moved], [followed], decay, skipped, [its])
        for original, copy in self._resolved:
            original.copy_(copy)

    def _random(self, seeds: Seeds) -> Random | None:
        """Of the parameter, if it is rounded stochastically."""
        layout, (place, _, origin, is_rounded) = local(self.param), self.places
        return random_of(layout, layout, seeds.params, place if is_rounded else -1, origin, self.step + 1)

    def _random_bits_of_codes(self, coded: dict[str, Tensor], seeds: Seeds) -> dict[str, Tensor]:
        """Of 8-bit state, by its name."""
        if not coded:
            return {}
        (place, _, origin, _), numel = self.places, local(self.param).numel()
        random = random_of_codes(numel, seeds.params, place, origin, self.step + 1)
        return {name: random_bits_of(random, CODE_OF[name]) for name in coded}

    def _decoded(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What of the state are codes, and the state with their values in their place."""
        coded = {name: x for name, x in self.state.items() if x.dtype == CODES}
        values = {name: values_of_codes(self.param, name, x, torch.float32) for name, x in coded.items()}
        return coded, self.state | values

    def _random_of_average(self, i: int, seeds: Seeds) -> Random | None:
        """Of one of the averages."""
        if i >= len(self.places.averages):
            return None
        place, layout = self.places.averages[i], local(self.param)
        return random_of(local(self.averages[i]), layout, seeds.averages[i], place, self.places.origin)


def _check_writable(tensors: Sequence[Tensor]) -> None:
    """Raise before anything is written where a tensor cannot be."""
    for x in tensors:
        check_no_overlap(local(x))


def _writable(x: Any, resolved: list[tuple[Tensor, Tensor]]) -> Any:
    """``x`` as real numbers; where it is lazily conjugated, a copy of it, which is to be copied back."""
    if x is None:
        return None
    _check_writable([x])
    if x.is_conj():
        resolved.append((x, x.resolve_conj()))
        x = resolved[-1][1]
    return as_real(x, written=True)
