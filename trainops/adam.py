"""Adam whose step also unscales, clips, skips and averages, in two passes over memory."""

from typing import Any

import torch
from torch import Tensor

from .optimizer import FusedOptimizer, Params
from .step import setting

Betas = tuple[float, float] | tuple[Tensor, Tensor]

_TorchAdam = torch.optim.Adam  # the name may stand for another class later: `integrations.patch()`


class WithMoments(FusedOptimizer):
    """What AdamW and Adam share: the state and the settings of a group."""

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The moments; with AMSGrad, the largest second moment, too."""
        names = ("exp_avg", "exp_avg_sq")
        return (*names, "max_exp_avg_sq") if group.get("amsgrad", False) else names

    def settings(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        """The settings of a group, by the rule's names."""
        lr, (beta1, beta2) = group["lr"], map(setting, group["betas"])
        if any(isinstance(beta, float) and not 0.0 <= beta < 1.0 for beta in (beta1, beta2)):
            raise ValueError(f"Invalid betas: {group['betas']}")
        return {
            "lr": lr.squeeze() if isinstance(lr, Tensor) else lr,
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "maximize": bool(group["maximize"]),
        }


class Adam(WithMoments, _TorchAdam):
    """:class:`torch.optim.Adam` with the rest of the training step fused into it.

    As :class:`trainops.AdamW`, but for its decay: ``weight_decay * param`` is added to the gradient after clipping,
    so that it goes into the moments (an L2 penalty).

    Args:
        params: parameters, named parameters or parameter groups, as in torch.
        lr: learning rate, a float or a one-element tensor. On a GPU, no step waits for it.
        betas: decay of the two moments, each in [0, 1); as ``lr``.
        eps: added to the denominator.
        weight_decay: factor of the L2 penalty.
        amsgrad: use the largest second moment so far (arXiv:1904.09237).
        decoupled_weight_decay: decay as AdamW instead. One value for all groups.
        options: ``maximize``, ``foreach``, ``capturable``, ``differentiable`` and ``fused``, as in torch, and
            ``max_grad_norm``, ``skip_nonfinite``, ``spike_guard``, ``norm_group``, ``ema``, ``master``,
            ``state_dtype``, ``stochastic_rounding``, ``seed``, ``stats``, ``stats_every`` and ``backend``, all as for
            :class:`trainops.AdamW`, which also lists the attributes and errors.

    Raises:
        ValueError: groups differ in ``decoupled_weight_decay``.

    Source: Kingma and Ba, https://arxiv.org/abs/1412.6980.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: Any,
    ) -> None:
        options |= {"decoupled_weight_decay": decoupled_weight_decay}
        if not isinstance(self, Adam):
            # Under `integrations.patch()`, a subclass of PyTorch's calls `torch.optim.Adam.__init__(self, ...)`.
            _TorchAdam.__init__(self, params, lr, betas, eps, weight_decay, amsgrad, **options)
            return
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)

    @property
    def rule(self) -> str:  # type: ignore[override]
        """That of AdamW with ``decoupled_weight_decay``."""
        return "adamw" if self.param_groups and _is_decoupled(self.param_groups[0]) else "adam"

    def __setstate__(self, state: dict[str, Any]) -> None:
        _check_decay(state["param_groups"])
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in torch.

        Raises:
            ValueError: the group differs from the others in ``decoupled_weight_decay``, or has a setting that all
                groups share.
        """
        if isinstance(param_group, dict):
            _check_decay([*self.param_groups[:1], {**self.defaults, **param_group}])
        super().add_param_group(param_group)


def _is_decoupled(group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", False))


def _check_decay(groups: list[dict[str, Any]]) -> None:
    """ValueError where groups would need different rules."""
    if len(set(map(_is_decoupled, groups))) > 1:
        raise ValueError("decoupled_weight_decay must be the same for all groups: use AdamW for those that it is for")
