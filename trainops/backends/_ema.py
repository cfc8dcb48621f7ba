"""EMA over the tables of a compiled module."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..tensor_table import regular_table

Operation = Callable[..., Any]


def operations(
    build: Callable[..., Any], run: Callable[[Any, float, Tensor | None], None]
) -> tuple[Operation, Operation]:
    """A backend's ``ema_`` and ``try_ema_``, of what builds its tables and what runs the kernel on one."""

    def ema_(averages: Sequence[Tensor], tensors: Sequence[Tensor], decay: float, skip: Tensor | None = None) -> None:
        """See :func:`trainops.reference.ema_`."""
        with regular_table(build, [list(averages), list(tensors)], written=[True, False]) as table:
            run(table, decay, skip)

    def try_ema_(
        averages: Sequence[Tensor], tensors: Sequence[Tensor], decay: float, skip: Tensor | None = None
    ) -> bool:
        """See :class:`trainops.backends._interface.Kernels`."""
        table = build([list(averages), list(tensors)])
        if table.irregular:
            return False
        run(table, decay, skip)
        return True

    return ema_, try_ema_
