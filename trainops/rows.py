"""The rows of a step: the parameters that have a gradient, with the state that belongs to each."""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adapters import Group, Places, Rounding
from .adapters.interface import AVERAGES
from .reference_codes import CODE_OF, CODES, new_codes, size_of_codes
from .storage import MASTER, codes_key, dtypes_of_state, fits, keys_of_state, kind, new_master, wants_master
from .tables import aligned, local, origin

if TYPE_CHECKING:
    from .step import TakesFusedSteps


def gather(optimizer: "TakesFusedSteps", averages: list[dict[int, Tensor]], rounding: Rounding) -> list[Group]:
    """The groups of a step, whatever tensors they hold. State is made where there is none yet.

    Each of ``averages`` is by the ``id`` of its parameter. ``rounding``: what is rounded stochastically.

    Raises:
        RuntimeError: a gradient is sparse, or tensors of one parameter do not belong together.
    """
    selected = []
    for param_group in optimizer.param_groups:
        params, grads = param_group["params"], [p.grad for p in param_group["params"]]
        if any(grad is None for grad in grads):
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        if any(grad.layout is not torch.strided for grad in grads):
            raise RuntimeError(
                f"{type(optimizer).__name__} does not support sparse gradients, please consider SparseAdam instead"
            )
        grads = [aligned(grad, param) for grad, param in zip(grads, params, strict=True)]
        if params:
            selected.append((param_group, params, grads))
    groups = []
    places = _places(optimizer.param_groups, rounding)
    for param_group, params, grads in selected:
        own, names = [optimizer.state[p] for p in params], optimizer.state_names(param_group)
        for param, its in zip(params, own, strict=True):
            if not its and param_group.get("fused") and param.is_meta:
                raise RuntimeError("`fused=True` requires parameters on a device that computes, got one on meta")
            complete_state(its, param, names, optimizer)
            _move_step(its, param)
        columns = {"param": params, "grad": grads}
        columns |= {AVERAGES[i]: list(map(its.get, map(id, params))) for i, its in enumerate(averages)}
        columns["step"] = [its["step"] for its in own]
        keys = keys_of_state(names, optimizer.state_dtype)
        columns |= {name: [its[key] for its in own] for name, key in zip(names, keys, strict=True)}
        if optimizer.master is not None:
            columns[MASTER] = [its.get(MASTER) for its in own]
        _check_rows(columns)
        its_places = [places[id(param)] for param in params] if places else []
        groups.append(Group(optimizer.settings(param_group), len(params), columns, its_places))
    return groups


def _places(param_groups: list[dict[str, Any]], rounding: Rounding) -> dict[int, Places]:
    """Where parameters stand in the groups, whether they have a gradient or not, by ``id``; empty if nobody asks."""
    if not rounding.params and not rounding.codes and not any(rounding.average_places):
        return {}
    params = [param for group in param_groups for param in group["params"]]
    return {
        id(param): Places(
            place if rounding.params or rounding.codes else -1,
            tuple(places.get(id(param), -1) for places in rounding.average_places),
            origin(param),
            rounding.params,
        )
        for place, param in enumerate(params)
    }


def complete_state(
    state: dict[str, Tensor], param: Tensor, names: tuple[str, ...], optimizer: "TakesFusedSteps"
) -> None:
    """Give a parameter the state that it has before its first step, or the master that it lacks."""
    missing: dict[str, Tensor] = {}
    if not optimizer.adopt_state(state, names):
        dtypes = dtypes_of_state(names, optimizer.state_dtype)
        missing["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        for name in names:
            if dtypes.get(name) == CODES:
                missing[codes_key(name)] = new_codes(local(param))
            else:
                missing[name] = torch.zeros_like(param, dtype=dtypes.get(name))
    if optimizer.master is not None and MASTER not in state and wants_master(param, optimizer.master):
        missing[MASTER] = new_master(param, optimizer.master)
    state.update(missing)  # at once: what interrupts this leaves no half of it


def check_state(
    param: Tensor, state: dict[str, Any] | None, names: Sequence[str], may_have_codes: bool = False
) -> None:
    """ValueError where a state that was loaded is not that of the parameter.

    ``may_have_codes``: a pickled state may.
    """
    if not state:
        return
    if may_have_codes:
        names = [name for name in names if codes_key(name) not in state]
    if missing := [name for name in ("step", *names) if name not in state]:
        raise ValueError(f"the state of a parameter of shape {tuple(param.shape)} has no {', '.join(missing)}")
    step = state["step"]
    if step.numel() != 1 if isinstance(step, Tensor) else not isinstance(step, Real):
        raise ValueError(f"the state's step must be a number or a one-element tensor, got {step!r:.60}")
    for name in (*names, *(key for key in (MASTER,) if isinstance(state.get(key), Tensor))):
        if state[name].shape != param.shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, but its parameter has shape {tuple(param.shape)}"
            )


def by_device(groups: list[Group]) -> dict[torch.device, list[Group]]:
    """Splits the groups by device. If all are on one device, they are returned as they are."""
    devices = list(dict.fromkeys(p.device for group in groups for p in group.columns["param"]))
    if len(devices) == 1:
        return {devices[0]: groups}
    parts: dict[torch.device, list[Group]] = {}
    for device in devices:
        for group in groups:
            rows = [row for row, param in enumerate(group.columns["param"]) if param.device == device]
            if rows:
                columns = {name: [column[row] for row in rows] for name, column in group.columns.items()}
                places = [group.places[row] for row in rows] if group.places else []
                part = replace(group, rows=len(rows), columns=columns, places=places)
                parts.setdefault(device, []).append(part)
    return parts


def _move_step(state: dict[str, Any], param: Tensor) -> None:
    """Moves the step count to the parameter's device, so that a skip needs no synchronization."""
    step = state["step"]
    if isinstance(step, Tensor) and step.device != param.device:
        state["step"] = step.to(param.device)


def _check_rows(columns: dict[str, list[Any]]) -> None:
    """Raise where tensors of one parameter do not belong together, before anything is written."""
    for row, param in enumerate(columns["param"]):
        for name, column in columns.items():
            x = column[row]
            if name == "step":
                if not isinstance(x, Tensor) or x.numel() != 1:
                    raise RuntimeError(f"the state's step must be a one-element tensor, got {x!r:.60}")
            elif x is not None and name in CODE_OF and x.dtype == CODES:
                _check_codes(name, x, param)
            elif x is not None and (x.shape != param.shape or x.device != param.device):
                raise RuntimeError(
                    f"{name} of shape {tuple(x.shape)} on {x.device} does not fit a parameter of "
                    f"shape {tuple(param.shape)} on {param.device}"
                )
            elif x is not None and name == MASTER:
                if not fits(param, x):
                    raise RuntimeError(
                        f"a master of {x.dtype} does not fit a parameter of {param.dtype}, which was cast since: see "
                        "float32_state_dict and load_float32_state_dict"
                    )
            elif x is not None and kind(x) != kind(param):
                raise RuntimeError(f"{name} of {x.dtype} does not fit a parameter of {param.dtype}")


def _check_codes(name: str, codes: Tensor, param: Tensor) -> None:
    """Raise where 8-bit state does not fit a parameter, or what it has become."""
    shape = (size_of_codes(local(param).numel()),)
    if codes.shape != shape or codes.device != param.device or not codes.is_contiguous():
        raise RuntimeError(
            f"codes of {name}, {tuple(codes.shape)} on {codes.device}, do not fit a parameter of shape "
            f"{tuple(param.shape)} on {param.device}"
        )
    if param.dtype == torch.float64 or param.is_complex():
        raise RuntimeError(f"8-bit {name} is for float32 and 16 bits, but its parameter has become {param.dtype}")
