"""The ops that ``cpu``, ``cuda`` and ``triton`` build from a table in the same way."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import core
from ..tables import origin, staged_table
from .interface import NEAREST, AverageRounding, Group, StepControl, StepResult

Operation = Callable[..., Any]


def step_operations(
    device_type: Callable[[], str],
    run: Callable[[Any, str, Sequence[Group], StepControl, Sequence[float]], StepResult],
) -> tuple[Operation, Operation]:
    """A backend's ``collect`` and ``update``. ``run`` runs its kernels on a table, which holds all groups."""
    rows_of: Operation = core.collect

    def collect(*containers: Any) -> Any:
        """See :class:`trainops.adapters.interface.Kernels`."""
        *lists, rounding = containers
        return rows_of(*lists, device_type(), rounding.params, rounding.average_places, origin, rounding.codes)

    def update(
        rule: str,
        groups: Sequence[Group],
        control: StepControl,
        ema_decays: Sequence[float],
        collected: Any = None,
    ) -> StepResult:
        """See :class:`trainops.adapters.interface.Kernels`."""
        if collected is not None:
            return run(collected, rule, groups, control, ema_decays)
        columns = {
            name: [x for group in groups for x in group.columns.get(name) or [None] * group.rows]
            for name in core.schema(rule, len(ema_decays)).places
        }
        places = [its for group in groups for its in group.places]
        with staged_table(rule, columns, device_type(), [group.rows for group in groups], places) as table:
            return run(table, rule, groups, control, ema_decays)

    return collect, update


def ema_operations(
    device_type: Callable[[], str], run: Callable[[Any, float, Tensor | None, int], None]
) -> tuple[Operation, Operation]:
    """A backend's ``ema_`` and ``try_ema_``. ``run`` runs its kernel on a table."""

    def ema_(
        averages: Sequence[Tensor],
        tensors: Sequence[Tensor],
        decay: float,
        skip: Tensor | None = None,
        rounding: AverageRounding = NEAREST,
    ) -> None:
        """See :func:`trainops.reference.ema_`."""
        if averages:
            columns = {"average": list(averages), "tensor": list(tensors)}
            with staged_table("ema", columns, device_type(), places=rounding.places) as table:
                run(table, decay, skip, rounding.seed)

    def try_ema_(
        averages: Sequence[Tensor],
        tensors: Sequence[Tensor],
        decay: float,
        skip: Tensor | None = None,
        rounding: AverageRounding = NEAREST,
    ) -> bool:
        """See :class:`trainops.adapters.interface.Kernels`."""
        columns = {"average": list(averages), "tensor": list(tensors)}
        table = core.table("ema", columns, device_type(), places=rounding.places)
        if table.irregular:
            return False
        run(table, decay, skip, rounding.seed)
        return True

    return ema_, try_ema_
