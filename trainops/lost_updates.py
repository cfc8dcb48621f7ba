"""Updates that rounding loses: where a step would leave a weight as it is, although the rule moves it."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference, reference_storage
from .reference_codes import CODE_OF, decoded
from .rows import complete_state
from .storage import MASTER, codes_key
from .tables import aligned, as_real, local

if TYPE_CHECKING:
    from .step import TakesFusedSteps


def share_of_lost_updates(
    optimizer: "TakesFusedSteps", params: Sequence[Tensor], coefficient: Tensor | float
) -> Tensor:
    """For each of these parameters, the share of its elements whose update would be lost; 0 without a gradient.

    On the device of the first parameter. ``coefficient`` is a factor of the gradients.
    """
    device, shares = optimizer._device(), dict(_shares(optimizer, coefficient))
    found = [shares[p].to(device) if p in shares else torch.zeros((), device=device) for p in params]
    return torch.stack(found) if found else torch.zeros(0, device=device)


def _shares(optimizer: "TakesFusedSteps", coefficient: Tensor | float) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter that has a gradient, with its share. The rule runs in float64 on copies of one at a time."""
    formula = getattr(reference, f"{optimizer.rule}_")
    for group in optimizer.param_groups:
        names, settings = optimizer.state_names(group), optimizer.settings(group)
        for param in (p for p in group["params"] if p.grad is not None):
            if param.grad.layout is not torch.strided:
                raise RuntimeError("there are no lost updates of sparse gradients")
            state: dict[str, Any] = dict(optimizer.state.get(param, {}))
            complete_state(state, param, names, optimizer)
            master = state.get(MASTER)
            weight = param.detach() if master is None else reference_storage.join(param.detach(), master)
            before, moved = as_real(local(weight)), _copy(weight)
            formula(
                moved,
                _copy(aligned(param.grad, param)),
                **{name: _moment(state, name, param) for name in names},
                step=local(state["step"]).clone().reshape(()).to(moved.device),
                **settings,
                coefficient=coefficient.to(moved.device) if isinstance(coefficient, Tensor) else coefficient,
            )
            lost = (moved != before) & (moved.to(before.dtype) == before)
            yield param, lost.sum(dtype=torch.float32) / max(1, lost.numel())


def _moment(state: dict[str, Any], name: str, param: Tensor) -> Tensor:
    codes = state.get(codes_key(name))
    return _copy(state[name] if codes is None else decoded(codes, CODE_OF[name], local(param)))


def _copy(x: Tensor) -> Tensor:
    """Real numbers in the widest type that their device has. Of a DTensor, this rank's shard."""
    x = as_real(local(x.detach()))
    return x.to(reference.scalar_dtype(x.device), copy=True)
