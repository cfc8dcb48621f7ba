"""The ops that every compiled backend makes of a table in the same way."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import core
from ..tables import staged_table
from .interface import Group

Operation = Callable[..., Any]


def columns_of(rule: str, groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The columns of all groups, one after the other."""
    names = [column.name for column in core.schema(rule).columns]
    return {name: [x for group in groups for x in group.columns.get(name) or [None] * group.rows] for name in names}


def ema_operations(
    device_type: Callable[[], str], run: Callable[[Any, float, Tensor | None], None]
) -> tuple[Operation, Operation]:
    """A backend's ``ema_`` and ``try_ema_``, of what runs its kernel on a table."""

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
