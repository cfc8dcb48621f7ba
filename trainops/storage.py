"""How a parameter and its state are stored: the dtypes of its moments, and the master of a 16-bit weight."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from . import reference_storage
from .reference_codes import CODE_OF, CODES, decoded
from .tables import local

MomentDtype = torch.dtype | Literal["int8"]
StateDtype = MomentDtype | tuple[MomentDtype, MomentDtype] | None
MOMENT_DTYPES = (torch.float32, torch.bfloat16)

# The kinds of master: the dtype of its state, and the dtypes of the parameters that have one.
MASTER = "master"  # its key in a parameter's state
MASTERS = {
    "split": (torch.int16, (torch.bfloat16,)),
    "float32": (torch.float32, (torch.bfloat16, torch.float16)),
}


def check_state_dtype(state_dtype: Any) -> None:
    """ValueError where this is not a ``state_dtype`` that moments can have."""
    if state_dtype is None:
        return
    chosen = state_dtype if isinstance(state_dtype, (tuple, list)) else (state_dtype, state_dtype)
    if len(chosen) != 2 or not all(map(_is_of_moments, chosen)):
        names = ", ".join(map(str, MOMENT_DTYPES))
        raise ValueError(f'state_dtype must be {names} or "int8", or a pair of them, got {state_dtype!r:.60}')


def _is_of_moments(x: Any) -> bool:
    return x in MOMENT_DTYPES if isinstance(x, torch.dtype) else isinstance(x, str) and x == "int8"


def check_is_served(params: Iterable[Tensor], state_dtype: StateDtype) -> None:
    """ValueError where a parameter cannot have moments of a ``state_dtype``, which is one."""
    for param in params:
        if param.dtype == torch.float64 and has_codes(state_dtype):
            raise ValueError(
                f'state_dtype="int8" is for float32 and 16 bits, but a parameter of {tuple(param.shape)} is float64'
            )
        if not param.is_floating_point():
            raise ValueError(f"state_dtype is for real parameters, but one of {tuple(param.shape)} is {param.dtype}")


def dtypes_of_state(names: tuple[str, ...], state_dtype: StateDtype) -> dict[str, torch.dtype]:
    """The dtype of each state by name: of a pair, the first moment has the first, all others have the second.

    That of 8-bit state is that of its codes. Empty where ``state_dtype`` is None: a state then has its parameter's
    dtype, as in torch.
    """
    if state_dtype is None:
        return {}
    first, others = state_dtype if isinstance(state_dtype, (tuple, list)) else (state_dtype, state_dtype)
    chosen = {name: others if i else first for i, name in enumerate(names)}
    return {name: x if isinstance(x, torch.dtype) else CODES for name, x in chosen.items()}


def has_codes(state_dtype: StateDtype) -> bool:
    """Whether some moments are kept in 8 bits."""
    return "int8" in (state_dtype if isinstance(state_dtype, (tuple, list)) else (state_dtype,))


def keys_of_state(names: tuple[str, ...], state_dtype: StateDtype) -> tuple[str, ...]:
    """The keys under which a parameter's state has these: codes never stand under torch's names."""
    dtypes = dtypes_of_state(names, state_dtype)
    return tuple(codes_key(name) if dtypes.get(name) == CODES else name for name in names)


def codes_key(name: str) -> str:
    """The key of the codes of a state."""
    return f"{name}_codes"


def values_of_codes(param: Tensor, name: str, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of a state's codes, in a tensor that is placed as its parameter is."""
    values = torch.zeros_like(param, dtype=dtype)
    local(values).copy_(decoded(codes, CODE_OF[name], local(param)))
    return values


def check_master(master: Any) -> None:
    """ValueError where there is no such kind of master."""
    if master is not None and not (isinstance(master, str) and master in MASTERS):
        raise ValueError(f'master must be "split", "float32" or None, got {master!r:.60}')


def wants_master(param: Tensor, master: str | None) -> bool:
    """Whether a parameter has a master of this kind.

    Raises:
        ValueError: the parameter is float16, which no remainder can split.
    """
    if master is None:
        return False
    if master == "split" and param.dtype == torch.float16:
        raise ValueError(
            f'master="split" is for bfloat16, but a parameter of {tuple(param.shape)} is float16: master="float32" '
            "serves that"
        )
    return param.dtype in MASTERS[master][1]


def check_masters(params: Iterable[Tensor], master: str | None) -> None:
    """ValueError where no parameter has a master of this kind, or one cannot."""
    wanted = [wants_master(param, master) for param in params]
    if master is not None and wanted and not any(wanted):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in MASTERS[master][1])
        raise ValueError(f'master="{master}" is for {names} parameters, and none is')


def new_master(param: Tensor, master: str) -> Tensor:
    """The master of a parameter that is the whole weight."""
    return torch.zeros_like(param, dtype=torch.int16) if master == "split" else param.detach().float()


def fits(param: Tensor, master: Any) -> bool:
    """Whether a tensor can be a parameter's master, by its dtype, shape and device."""
    return (
        isinstance(master, Tensor)
        and any(master.dtype == dtype and param.dtype in params for dtype, params in MASTERS.values())
        and (master.shape, master.device) == (param.shape, param.device)
    )


@torch.no_grad()
def loaded_master(param: Tensor, candidates: Iterable[Any], master: str) -> Tensor:
    """A new master of a parameter, with the weight of the first of these that is one, of either kind.

    Torch's class casts a master to the dtype of the parameter, and it is none any more.
    """
    moved = (x.to(param.device, copy=True) for x in candidates if isinstance(x, Tensor))
    own: Tensor | None = next((x for x in moved if fits(param, x)), None)
    if own is None:
        return new_master(param, master)
    if own.dtype == MASTERS[master][0]:
        return own
    weight = reference_storage.join(param, own)
    return weight if master == "float32" else reference_storage.remainder(weight, param)


# Float8 and narrower are stored, but no arithmetic knows them.
_REAL = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def kind(x: Tensor) -> str:
    """Whether a tensor can be averaged, and with which others: "complex", "real" or "other"."""
    return "real" if x.dtype in _REAL else "complex" if x.is_complex() else "other"
