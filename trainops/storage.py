"""How the state of a parameter is stored: the dtypes of its moments."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

StateDtype = torch.dtype | tuple[torch.dtype, torch.dtype] | None
MOMENT_DTYPES = (torch.float32, torch.bfloat16)


def check_state_dtype(state_dtype: Any) -> None:
    """ValueError where this is not a ``state_dtype`` that moments can have."""
    if state_dtype is None:
        return
    chosen = state_dtype if isinstance(state_dtype, (tuple, list)) else (state_dtype, state_dtype)
    if len(chosen) != 2 or not all(isinstance(x, torch.dtype) and x in MOMENT_DTYPES for x in chosen):
        names = " or ".join(map(str, MOMENT_DTYPES))
        raise ValueError(f"state_dtype must be {names}, or a pair of them, got {state_dtype!r:.60}")


def check_is_real(params: Iterable[Tensor]) -> None:
    """ValueError where a parameter cannot have moments of a ``state_dtype``."""
    for param in params:
        if not param.is_floating_point():
            raise ValueError(f"state_dtype is for real parameters, but one of {tuple(param.shape)} is {param.dtype}")


def dtypes_of_state(names: tuple[str, ...], state_dtype: StateDtype) -> dict[str, torch.dtype]:
    """The dtype of each state by name: of a pair, the first moment has the first, all others have the second.

    Empty where ``state_dtype`` is None: a state then has its parameter's dtype, as in torch.
    """
    if state_dtype is None:
        return {}
    first, others = (state_dtype, state_dtype) if isinstance(state_dtype, torch.dtype) else state_dtype
    return {name: others if i else first for i, name in enumerate(names)}
