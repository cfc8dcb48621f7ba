"""The ops that ``cpu``, ``cuda`` and ``triton`` build from a table in the same way."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import core
from ..tables import staged_table
from .interface import Group, StepControl, StepResult

Operation = Callable[..., Any]


def step_operations(
    device_type: Callable[[], str],
    run: Callable[[Any, str, Sequence[Group], StepControl, Sequence[float]], StepResult],
) -> tuple[Operation, Operation]:
    """A backend's ``collect`` and ``update``. ``run`` runs its kernels on a table, which holds all groups."""
    rows_of: Operation = core.collect

    def collect(*containers: Any) -> Any:
        """See :class:`trainops.adapters.interface.Kernels`."""
        return rows_of(*containers, device_type())

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
        with staged_table(rule, columns, device_type(), [group.rows for group in groups]) as table:
            return run(table, rule, groups, control, ema_decays)

    return collect, update


def ema_operations(
    device_type: Callable[[], str], run: Callable[[Any, float, Tensor | None], None]
) -> tuple[Operation, Operation]:
    """A backend's ``ema_`` and ``try_ema_``. ``run`` runs its kernel on a table."""

    def ema_(averages: Sequence[Tensor], tensors: Sequence[Tensor], decay: float, skip: Tensor | None = None) -> None:
        """See :func:`trainops.reference.ema_`."""
        if averages:
            columns = {"average": list(averages), "tensor": list(tensors)}
            with staged_table("ema", columns, device_type()) as table:
                run(table, decay, skip)

    def try_ema_(
        averages: Sequence[Tensor], tensors: Sequence[Tensor], decay: float, skip: Tensor | None = None
    ) -> bool:
        """See :class:`trainops.adapters.interface.Kernels`."""
        table = core.table("ema", {"average": list(averages), "tensor": list(tensors)}, device_type())
        if table.irregular:
            return False
        run(table, decay, skip)
        return True

    return ema_, try_ema_
