"""What an optimizer keeps and takes of a state that is pickled or loaded."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import advice
from .reference_codes import CODE_OF, CODES, encoded
from .rows import check_state
from .storage import (
    MASTER,
    StateDtype,
    codes_key,
    dtypes_of_state,
    loaded_master,
    values_of_codes,
    wants_master,
)
from .tables import aligned, local

Dtypes = dict[tuple[Tensor, str], torch.dtype]


class LoadsState(torch.optim.Optimizer):
    """An optimizer with attributes of its own, which pickles keep, and state that keeps its dtype."""

    own_attributes: ClassVar[tuple[str, ...]]
    state_dtype: StateDtype
    master: str | None
    _loading: tuple[dict[str, Any], Dtypes] | None = None  # what load_state_dict loads, and the dtypes to keep

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of the state that a group uses, beside ``step``."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.own_attributes}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickling and load_state_dict both come here, the latter after its pre-hooks and before anything is set.
        for group in state["param_groups"]:
            for param in group["params"]:
                is_pickled = self._loading is None
                check_state(param, state["state"].get(param), self.state_names(group), is_pickled)
        if self._loading is not None:
            loaded, held = self._loading
            _keep_dtypes(state, loaded, held | self._chosen_dtypes(state["param_groups"]))
            self._load_masters(state, loaded)
        super().__setstate__(state)
        if state.get("_max_grad_norm") is not None:
            advice.clips_inside(self)
        for ema in state.get("_averages", ()):
            if ema.optimizer is None:
                ema.attach_to(self)

    def state_dict(self) -> dict[str, Any]:
        """The state, as in torch. Moments of 8 bits are bfloat16 tensors, which hold them exactly."""
        own = self.state
        if not any(codes_key(name) in its for its in own.values() if isinstance(its, dict) for name in CODE_OF):
            return super().state_dict()
        exported = {x: _exported(x, its) if isinstance(x, Tensor) else its for x, its in own.items()}
        self.state = defaultdict(dict, exported)
        try:
            return super().state_dict()
        finally:
            self.state = own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as in torch.

        Moments are converted to ``state_dtype``; to 8 bits, they are rounded to nearest. Without one, state that this
        optimizer holds in another dtype than its parameter's keeps that dtype, and where there is none yet, it gets
        the parameter's, as in torch. Masters are converted from one kind to the other, added and left out, as
        ``master`` asks for: load the model's weights before. Where a master is not that of the parameter, the
        parameter is taken for the weight. Where the state has no masters, as that of torch's class, those that are
        here stay.

        Raises:
            ValueError: the state does not fit the parameters. Nothing has been changed.
        """
        seen: dict[str, Any] = {}
        last_hook = self.register_load_state_dict_pre_hook(lambda _, loaded: seen.update(loaded))
        self._loading = seen, _unlike_their_parameters(self.state)
        try:
            super().load_state_dict(state_dict)
        finally:
            last_hook.remove()
            self._loading = None
        for ema in self.__dict__.get("_averages", ()):
            ema.optimizer_loaded(is_fresh=not any(float(its.get("step", 0)) for its in seen["state"].values()))

    def _load_masters(self, state: dict[str, Any], loaded: dict[str, Any]) -> None:
        """Convert loaded masters to this optimizer's kind, from what they were before PyTorch cast them."""
        for param, its, theirs in _states(state, loaded):
            its.pop(MASTER, None)
            if its and self.master is not None and wants_master(param, self.master):
                own = self.state.get(param, {}).get(MASTER)
                its[MASTER] = loaded_master(param, [theirs.get(MASTER), own], self.master)

    def _chosen_dtypes(self, param_groups: list[dict[str, Any]]) -> Dtypes:
        """The dtypes that ``state_dtype`` asks for, by parameter and name."""
        return {
            (param, name): dtype
            for group in param_groups
            for name, dtype in dtypes_of_state(self.state_names(group), self.state_dtype).items()
            for param in group["params"]
        }


def _unlike_their_parameters(state: dict[Any, Any]) -> Dtypes:
    """The dtypes of state that are not those of its parameter, by parameter and name."""
    return {
        (param, name): x.dtype
        for param, its in state.items()
        if isinstance(param, Tensor)
        for name, x in its.items()
        if name != "step" and isinstance(x, Tensor) and x.dtype != param.dtype
    }


def _keep_dtypes(state: dict[str, Any], loaded: dict[str, Any], dtypes: Dtypes) -> None:
    """Convert what was loaded to these dtypes, from what it was before PyTorch gave it its parameter's."""
    for param, its, theirs in _states(state, loaded) if dtypes else ():
        for name, value in theirs.items():
            if (dtype := dtypes.get((param, name))) is None:
                continue
            if dtype == CODES:
                del its[name]
                shard, layout = local(aligned(value.to(param.device), param)), local(param)
                its[codes_key(name)] = encoded(shard, CODE_OF[name], layout)
            else:
                its[name] = value.to(device=param.device, dtype=dtype, copy=True)


def _exported(param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter, with moments of its shape in place of codes."""
    exported = dict(state)
    for name in CODE_OF:
        codes = exported.pop(codes_key(name), None)
        if codes is not None:
            exported[name] = values_of_codes(param, name, codes, torch.bfloat16)
    return exported


def _states(state: dict[str, Any], loaded: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
    """Each parameter that has a state, with that state, and as it was loaded."""
    params = [param for group in state["param_groups"] for param in group["params"]]
    keys = [key for group in loaded["param_groups"] for key in group["params"]]
    for param, key in zip(params, keys, strict=True):
        if param in state["state"]:
            yield param, state["state"][param], loaded["state"].get(key, {})
