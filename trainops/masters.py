"""Weights of 16-bit models in full, for who saves and loads them."""

from typing import Any

import torch
from torch import Tensor, nn

from . import reference_storage
from .model_slots import check_checkpoint
from .rows import complete_state
from .storage import MASTER, fits, wants_master


class KeepsMasters(torch.optim.Optimizer):
    """An optimizer whose ``master`` says whether it keeps the weights of 16-bit parameters in full."""

    master: str | None

    @torch.no_grad()
    def float32_weight(self, param: Tensor) -> Tensor:
        """The weight of a parameter: in full, as a new tensor, if it has a master; else the parameter itself."""
        master = (self.state.get(param) or {}).get(MASTER)
        if self.master is None or not isinstance(master, Tensor) or not fits(param, master):
            return param  # a master that does not fit is of a parameter that was cast since
        return reference_storage.join(param.detach(), master)

    @torch.no_grad()
    def float32_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The ``state_dict`` of a model, with its weights in full: a float32 model can load it.

        Equivalent to ``model.state_dict()``, but 16-bit tensors are float32, and those that have a master are that
        weight, bit for bit.
        """
        state_dict: dict[str, Any] = model.state_dict(keep_vars=True)
        for name, x in state_dict.items():
            if isinstance(x, Tensor):
                state_dict[name] = reference_storage.wide(self.float32_weight(x).detach())
        return state_dict

    @torch.no_grad()
    def load_float32_state_dict(self, model: nn.Module, state_dict: dict[str, Any]) -> None:
        """Load weights into a model, and what its 16-bit parameters cannot hold of them into their masters.

        A float32 model becomes a bfloat16 one with all of its bits by::

            state_dict = model.state_dict()
            model.bfloat16()
            optimizer = trainops.AdamW(model.parameters(), master="split")
            optimizer.load_float32_state_dict(model, state_dict)

        Moments and step counts stay, and are made where there are none.

        Raises:
            ValueError: keys are missing or unexpected, a shape differs, or a 16-bit parameter of this optimizer has
                no master to hold its weight. Nothing has been changed.
        """
        own = model.state_dict(keep_vars=True)
        check_checkpoint(own, state_dict)
        groups = {param: group for group in self.param_groups for param in group["params"]}
        held = {name: x for name, x in own.items() if isinstance(x, nn.Parameter) and x in groups}
        for name, param in held.items():
            if param.dtype in (torch.bfloat16, torch.float16) and not wants_master(param, self.master):
                raise ValueError(f"{name} is {param.dtype} and has no master to hold a float32 weight: see `master`")
        model.load_state_dict(state_dict)
        optimizer: Any = self
        for name, param in held.items():
            if not wants_master(param, self.master):
                self.state.get(param, {}).pop(MASTER, None)
            else:
                state = self.state[param]
                complete_state(state, param, optimizer.state_names(groups[param]), optimizer)
                reference_storage.write_weight(param, state[MASTER], state_dict[name].to(param.device, torch.float32))
