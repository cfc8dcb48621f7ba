"""The model that an average follows: whether it is still the same, and fits."""

from collections.abc import Collection
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import select
from .ema_shards import reshard
from .ema_state import KeepsState
from .model_match import match
from .model_pairs import Matched
from .parameter_list import as_model, same_parameters
from .wrappers import is_same_model


class FollowsModel(KeepsState):
    """An average whose tensors are paired with those of its model, anew whenever one of them was replaced."""

    backend: str | None
    _matched: Matched | None = None
    _matched_models: tuple[nn.Module, nn.Module] | None = None  # the average's and the model that these are of

    def check_model(self) -> Matched:
        """Look at every tensor of the model anew; ValueError naming the first that its average does not match."""
        reshard(self.model, self._module)
        self._matched = match(self._module, self.model, self.policy)
        if self._matched.placed:
            self.synchronize()
            self._was_written()  # looks at the tensors that go
            self._matched.place()
            self._remember_weights()
            self._matched = match(self._module, self.model, self.policy)
        self._matched_models = (self._module, self.model)
        return self._matched

    def check_rest(self, done: Collection[int]) -> None:
        """Before an optimizer's step: ValueError where an average that its kernel does not move does not fit."""
        if self._matched is not None and not self._matched.fits_without(done):
            self.check_model()

    def _weights(self, sources: list[Tensor]) -> list[Tensor]:
        """Weights of the model as the optimizer knows them that has the average: in full, if there are masters."""
        optimizer: Any = self.optimizer
        return sources if optimizer is None or optimizer.master is None else [*map(optimizer.float32_weight, sources)]

    def _match(self) -> Matched:
        """Pair every tensor of the model with its average, again if one was replaced: frameworks do that at will."""
        models = self._matched_models
        if models is None or models[0] is not self._module or models[1] is not self.model:
            return self.check_model()
        return self._matched if self._matched is not None and self._matched.is_current() else self.check_model()

    def _check_can_move(self, matched: Matched) -> None:
        """Raise where the averages could not be moved."""
        for device in matched.devices:
            select(self.backend, device)
        on_gpu = matched.waits or (self.seed is not None and any(x.type == "cuda" for x in matched.devices))
        captures = on_gpu and torch.cuda.is_current_stream_capturing()
        if matched.waits and captures:
            raise RuntimeError("a CUDA graph cannot hold the update of an average on the CPU: see EMA(device=)")
        if self.seed is not None and captures:
            raise RuntimeError("a CUDA graph would repeat the random bits of EMA(stochastic_rounding=True)")

    def _check_followed(self, model: Any) -> None:
        """Raise unless this is the model that the average follows, or what it follows from now on."""
        if isinstance(model, nn.Module):
            if not is_same_model(model, self.model):
                raise ValueError(
                    f"this {type(model).__name__} is not the model that the average follows: make an EMA of it, or "
                    "set ema.model to it"
                )
            return
        if isinstance(model, Integral):
            raise TypeError(f"model must be a torch.nn.Module, got {model}: write update(step={model})")
        given = as_model(model)
        if same_parameters(self.model, given):
            return
        self._check_not_swapped("update()")
        if not isinstance(self.model, nn.ParameterList):
            message = "these are not the parameters of the model that the average follows, in their order"
            raise ValueError(message)  # noqa: TRY004
        match(self._module, given, self.policy, follows=False)
        self.model = given
