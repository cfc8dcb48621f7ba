"""SGD with momentum whose step also unscales, clips, skips and averages, in two passes over memory."""

from typing import Any

import torch
from torch import Tensor

from .optimizer import FusedOptimizer, Params
from .step import setting
from .storage import codes_key

_TorchSGD = torch.optim.SGD  # the name may stand for another class later: `integrations.patch()`


class SGD(FusedOptimizer, _TorchSGD):
    """:class:`torch.optim.SGD` with the rest of the training step fused into it.

    Its state has a ``step`` beside torch's ``momentum_buffer``, which the first step fills. A ``state_dict`` of one
    loads into the other. Sparse gradients are left to PyTorch's own step, if no setting of ours asks for more.

    Args:
        params: parameters, named parameters or parameter groups, as in torch.
        lr: learning rate, a float or a one-element tensor. On a GPU, no step waits for it.
        momentum: what is kept of the buffer in each step; 0 has no buffer.
        dampening: the gradient enters the buffer times 1 less this, but for the first step.
        weight_decay: factor of the L2 penalty: ``weight_decay * param`` is added to the gradient after clipping.
        nesterov: look ahead (https://proceedings.mlr.press/v28/sutskever13.html).
        options: ``maximize``, ``foreach``, ``differentiable`` and ``fused``, as in torch, and ``max_grad_norm``,
            ``skip_nonfinite``, ``spike_guard``, ``norm_group``, ``ema``, ``master``, ``state_dtype``,
            ``stochastic_rounding``, ``seed``, ``stats``, ``stats_every`` and ``backend``, all as for
            :class:`trainops.AdamW`, which also lists the attributes and errors.
    """

    rule = "sgd"
    takes_sparse = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(self, SGD):
            # Under `integrations.patch()`, a subclass of PyTorch's calls `torch.optim.SGD.__init__(self, ...)`.
            _TorchSGD.__init__(self, params, lr, momentum, dampening, weight_decay, nesterov, **options)
            return
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            for param in group["params"]:
                if (its := state["state"].get(param)) and not self.adopt_state(its, self.state_names(group)):
                    its.clear()  # all begins anew
        super().__setstate__(state)

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The buffer, with momentum."""
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def adopt_state(self, state: dict[str, Any], names: tuple[str, ...]) -> bool:
        """Whether there is a buffer if there is momentum, which may begin at any step.

        The state of PyTorch's class has no step. If it has a buffer, that has had its first step.
        """
        if not state or any(state.get(name) is None and codes_key(name) not in state for name in names):
            return False
        if "step" not in state:
            state["step"] = torch.ones((), dtype=torch.float32, device="cpu")
        return True

    def settings(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        """The settings of a group, by the rule's names."""
        lr, weight_decay = group["lr"], group["weight_decay"]
        return {
            "lr": lr.squeeze() if isinstance(lr, Tensor) else lr,
            "momentum": setting(group["momentum"]),
            "dampening": group["dampening"],
            "weight_decay": setting(weight_decay),
            "nesterov": bool(group["nesterov"]),
            "maximize": bool(group["maximize"]),
        }
