"""The settings that PyTorch's class lacks: the constructor's, of the optimizer, of no group and in no state dict."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

OWN_SETTINGS = (
    "max_grad_norm",
    "skip_nonfinite",
    "spike_guard",
    "norm_group",
    "ema",
    "master",
    "state_dtype",
    "stochastic_rounding",
    "seed",
    "stats",
    "stats_every",
    "backend",
)


class HasOwnSettings(torch.optim.Optimizer):
    """An optimizer that keeps them out of its groups.

    ZeroRedundancyOptimizer writes all arguments that it is given into the groups of the optimizer that it makes, when
    it makes it and at every step.
    """

    _repeatable: dict[str, Any] | None

    @contextmanager
    def _while_constructed(self, own: dict[str, Any]) -> Iterator[None]:
        """Meanwhile, groups may repeat the settings that the constructor was given."""
        self._repeatable = own
        try:
            yield
        finally:
            self._repeatable = None

    def _without_own(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """The group without what it repeats.

        Raises:
            ValueError: it has a setting that all groups share.
        """
        shared = [name for name in OWN_SETTINGS if name in param_group] if isinstance(param_group, dict) else []
        repeatable = self._repeatable or {}
        for name in shared:
            if name not in repeatable or repeatable[name] is not param_group[name]:
                raise ValueError(f"{name} is a setting of the optimizer, not of a group of parameters")
            if name == "ema" and param_group[name] is not None:
                raise ValueError(
                    "ema is a setting of the optimizer, not of a group of parameters. ZeroRedundancyOptimizer shares "
                    "out the new weights only after the step that would average them: call ema.update() after it"
                )
        return {key: x for key, x in param_group.items() if key not in shared} if shared else param_group

    def state_dict(self) -> dict[str, Any]:
        """The state, as in torch."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            for name in OWN_SETTINGS:
                group.pop(name, None)
        return state_dict
