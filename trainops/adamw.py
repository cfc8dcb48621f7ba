"""AdamW whose step also unscales, clips, skips and averages, in two passes over memory."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backends import AdamWGroup, StepControl, StepResult, check, select
from .ema import EMA
from .model_pairs import kind
from .tensor_table import aligned, all_plain

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Betas = tuple[float, float] | tuple[Tensor, Tensor]


class AdamW(torch.optim.AdamW):
    """:class:`torch.optim.AdamW` with the rest of the training step fused into it.

    Equivalent to::

        norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm)    # with max_grad_norm
        if norm.isfinite():                                             # with skip_nonfinite
            torch.optim.AdamW.step()
            ema.update()                                                # with ema

    in one pass over the gradients for their norm and one over everything for the rest, without waiting for the
    device. ``isinstance(opt, torch.optim.AdamW)`` holds, and a ``state_dict`` of one loads into the other.

    Args:
        params: parameters, named parameters or parameter groups, as in torch.
        lr: learning rate, a float or a one-element tensor.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled weight decay, times the learning rate per step.
        amsgrad: use the largest second moment so far (arXiv:1904.09237).
        maximize: ascend.
        foreach: accepted for compatibility.
        capturable: accepted for compatibility; step counts are on their parameter's device anyway. Take a step on
            tensors of the same sizes outside of a CUDA graph before each capture.
        differentiable: run PyTorch's own step, with autograd.
        fused: accepted for compatibility.
        max_grad_norm: clip the gradients of all groups together to this norm. They are read, not rewritten: the
            coefficient is applied inside the update; 0 takes them as zero. The norm is that of the gradients this
            optimizer holds: the global one under DDP and FSDP2, but a rank's own under ZeroRedundancyOptimizer and
            FSDP1.
        skip_nonfinite: leave everything bit for bit as it was when the norm of the gradients is infinite or NaN.
        ema: an average to update in the same pass, instead of calling ``ema.update()`` after each step, which is then
            an error, as is a second optimizer that takes turns with this one. Of several optimizers, give it to the
            one that steps last. A skipped step leaves the average alone and counts as an update in its warm-up. Every
            call of ``step()`` is an update, also those of tools that call it to make the state
            (``torch.distributed.checkpoint``): load the average after the optimizer.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Attributes:
        grad_norm: norm of all gradients before clipping, divided by a GradScaler's scale; 0-dim, on the device of
            the first parameter. None until a step measures it (``max_grad_norm`` or ``skip_nonfinite``); 0.0 where
            no parameter has a gradient.
        grad_norms: the same for each parameter that had a gradient, 1-D, in group order.
        skipped_steps: how many steps were skipped; 0-dim int64, on the device of the first parameter.

    Raises:
        TypeError: ``max_grad_norm`` or ``ema`` is of another type.
        ValueError: an argument is out of range, there is no such backend, or ``ema`` follows another model.
        RuntimeError: the backend is not available; in ``step()``, a gradient is sparse. Nothing has been changed.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        ema: EMA | None = None,
        backend: str | None = None,
    ) -> None:
        if differentiable and (max_grad_norm is not None or skip_nonfinite or ema is not None):
            raise ValueError(
                "differentiable=True runs PyTorch's own step, without max_grad_norm, skip_nonfinite or ema"
            )
        check(backend)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.ema = ema
        self.backend = backend
        self.grad_norm: Tensor | None = None
        self.grad_norms: Tensor | None = None
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=self._device())
        self._accept_amp_scaling()

    @property
    def max_grad_norm(self) -> float | None:
        """The norm to which gradients are clipped; may be changed between steps."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | None) -> None:
        if max_grad_norm is not None:
            is_number = isinstance(max_grad_norm, Real) and not isinstance(max_grad_norm, bool)
            if not is_number and not (isinstance(max_grad_norm, Tensor) and max_grad_norm.numel() == 1):
                raise TypeError(f"max_grad_norm must be a number or None, got {max_grad_norm!r:.60}")
            if not max_grad_norm >= 0.0:
                raise ValueError(f"Invalid max_grad_norm: {max_grad_norm}")
        self._max_grad_norm = max_grad_norm

    @property
    def ema(self) -> EMA | None:
        """The average that steps update; may be changed between them."""
        return self._ema

    @ema.setter
    def ema(self, ema: EMA | None) -> None:
        if ema is not None:
            if not isinstance(ema, EMA):
                raise TypeError(f"ema must be a trainops.EMA, got {type(ema).__name__}")
            own = {id(p) for group in self.param_groups for p in group["params"]}
            if own and own.isdisjoint(map(id, ema.model.parameters())):
                raise ValueError("ema follows a model that has none of these parameters")
        self._ema = ema

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in torch.

        Raises:
            ValueError: the group asks for ``decoupled_weight_decay=False``, which is :class:`torch.optim.Adam`, or
                has a setting that all groups share.
        """
        if isinstance(param_group, dict):
            if not param_group.get("decoupled_weight_decay", True):
                raise ValueError("decoupled_weight_decay=False is torch.optim.Adam: AdamW's decay is decoupled")
            if shared := [name for name in _OWN_SETTINGS if name in param_group]:
                raise ValueError(f"{shared[0]} is a setting of the optimizer, not of a group of parameters")
        super().add_param_group(param_group)

    def __repr__(self) -> str:
        own = "".join(f"{name}: {getattr(self, name)}\n" for name in _OWN_SETTINGS)
        return super().__repr__().removesuffix(")") + own + ")"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _OWN_ATTRIBUTES}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickling and load_state_dict both come here, the latter after its hooks and before anything is set.
        for group in state["param_groups"]:
            for param in group["params"]:
                _check_state(param, state["state"].get(param), amsgrad=group.get("amsgrad", False))
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._accept_amp_scaling()

    def _accept_amp_scaling(self) -> None:
        """A GradScaler then leaves unscaling and skipping to step(), by the attributes grad_scale and found_inf."""
        self._step_supports_amp_scaling = not self.defaults["differentiable"]

    def _device(self) -> torch.device:
        """Where the first parameter is; a group may be empty."""
        return next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Unscale, clip, update and average: see the class.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned from here.

        Raises:
            RuntimeError: a gradient is sparse, or another optimizer updates the same ``ema``.
            ValueError: the model no longer matches its ``ema``.
        """
        if self.defaults["differentiable"]:
            return _torch_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        update = None if self.ema is None else self.ema.plan_update(self)
        averages = {} if update is None else update.fusable
        averaged, result = self._update(averages, 0.0 if update is None or update.decay is None else update.decay)
        if self.ema is not None and update is not None:
            self.ema.finish_update(update, averaged, result.skipped)
        return loss

    def _update(self, averages: dict[int, Tensor], ema_decay: float) -> tuple[Collection[int], StepResult]:
        """Norm, clipping, AdamW and the fused averages, which are returned by the ``id`` of their parameter."""
        device = self._device()
        if self.skipped_steps.device != device:  # the model was moved
            self.skipped_steps = self.skipped_steps.to(device)
        control = StepControl(
            None if self.max_grad_norm is None else float(self.max_grad_norm),
            self.skip_nonfinite,
            self._from_scaler("grad_scale"),
            self._from_scaler("found_inf"),
            skipped_steps=self.skipped_steps,
        )
        kernels = select(self.backend, device.type)
        table = kernels.collect(self.param_groups, self.state, averages)
        if table is not None:
            groups = [_group(*pair) for pair in zip(self.param_groups, table.group_rows, strict=True)]
            params = table.params
            all_averaged = table.averaged == len(averages)
            torch.autograd.graph.increment_version([*params, *averages.values()])
            result = kernels.adamw_step(groups, control, ema_decay, table)
        else:
            known = set(self.state)
            try:
                groups = self._gather(averages)
                params = [p for group in groups for p in group.params]
                all_averaged = False
                torch.autograd.graph.increment_version([*params, *averages.values()])
                result = self._update_groups(groups, control, ema_decay)
            except Exception:
                for param in self.state.keys() - known:
                    del self.state[param]
                if self.ema is not None:
                    self.ema.check_model()
                raise
        if control.max_norm is not None or control.skip_nonfinite:
            self.grad_norm, self.grad_norms = result.total_norm, result.norms
        return averages.keys() if all_averaged else averages.keys() & set(map(id, params)), result

    def _from_scaler(self, name: str) -> Tensor | None:
        """What a GradScaler has set, as a 0-dim tensor: its found_inf is a number where there are no gradients."""
        value = getattr(self, name, None)
        if value is None:
            return None
        return (value if isinstance(value, Tensor) else torch.tensor(float(value), device="cpu")).reshape(())

    def _gather(self, averages: dict[int, Tensor]) -> list[AdamWGroup]:
        """The parameters that have a gradient, with their state, which is made where there is none yet."""
        selected = []
        for settings in self.param_groups:
            params, grads = settings["params"], [p.grad for p in settings["params"]]
            if any(grad is None for grad in grads):
                params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
                grads = [grad for grad in grads if grad is not None]
            if any(grad.layout is not torch.strided for grad in grads):
                raise RuntimeError("AdamW does not support sparse gradients, please consider SparseAdam instead")
            grads = [aligned(grad, param) for grad, param in zip(grads, params, strict=True)]
            if params:
                selected.append((settings, params, grads))
        groups = []
        for settings, params, grads in selected:
            states = [self.state[p] for p in params]
            for param, state in zip(params, states, strict=True) if not all(states) else ():
                _init_state(state, param, settings)
            for param, state in zip(params, states, strict=True):
                _move_step(state, param)
            group = _group(settings, len(params))
            group.params, group.grads = params, grads
            group.exp_avgs = [state["exp_avg"] for state in states]
            group.exp_avg_sqs = [state["exp_avg_sq"] for state in states]
            amsgrad = settings["amsgrad"]
            group.max_exp_avg_sqs = [state["max_exp_avg_sq"] for state in states] if amsgrad else [None] * len(states)
            group.averages = list(map(averages.get, map(id, params)))
            group.steps = [state["step"] for state in states]
            _check_rows(group)
            groups.append(group)
        return groups

    def _update_groups(self, groups: list[AdamWGroup], control: StepControl, ema_decay: float) -> StepResult:
        """The general path: any devices, tensor subclasses, layouts, and no gradient at all."""
        if not groups:
            return self._empty_step(control)
        parts = _by_device(groups)
        joint: tuple[Tensor, Tensor] | None = None
        if control.measures and (len(parts) > 1 or not all(all_plain(g.params) for g in groups)):
            joint = self._joint_norm(groups, control)
            control = replace(control, total_norm=joint[0])
        result = StepResult()
        for device, part in parts.items():
            result = select(self.backend, device.type).adamw_step(part, control, ema_decay)
            control = replace(control, skipped_steps=None)  # counted
        if joint is None:
            return result
        total_norm, norms = joint
        return StepResult(total_norm.to(norms.dtype), norms, result.skipped)

    def _empty_step(self, control: StepControl) -> StepResult:
        """The norm of no gradients is 0, as in torch; a step that a GradScaler wants skipped counts all the same."""
        device = self._device()
        skipped = None if control.found_inf is None else control.found_inf.to(device) != 0
        if skipped is not None:
            self.skipped_steps.add_(skipped)
        total_norm, norms = (torch.zeros(shape, dtype=torch.float32, device=device) for shape in ((), 0))
        return StepResult(total_norm, norms, skipped)

    def _joint_norm(self, groups: list[AdamWGroup], control: StepControl) -> tuple[Tensor, Tensor]:
        """The norms over several devices, or over the shards of a DTensor: of all (unrounded), and of each."""
        grads = [grad for group in groups for grad in group.grads]
        norms = reference.sum_norms(grads)[1]
        norms = norms.full_tensor() if hasattr(norms, "full_tensor") else norms
        if control.grad_scale is not None:
            norms = norms / reference.scalar(control.grad_scale, norms.device)
        return torch.linalg.vector_norm(norms), norms.to(reference.norm_dtype(grads))


_OWN_SETTINGS = ("max_grad_norm", "skip_nonfinite", "ema", "backend")
_OWN_ATTRIBUTES = ("_max_grad_norm", "skip_nonfinite", "_ema", "backend", "grad_norm", "grad_norms", "skipped_steps")


def _group(settings: dict[str, Any], rows: int) -> AdamWGroup:
    lr, (beta1, beta2) = settings["lr"], settings["betas"]
    return AdamWGroup(
        lr=lr.squeeze() if isinstance(lr, Tensor) else lr,
        beta1=float(beta1),
        beta2=float(beta2),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        maximize=settings["maximize"],
        rows=rows,
    )


def _init_state(state: dict[str, Tensor], param: Tensor, settings: dict[str, Any]) -> None:
    if state:
        return
    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if settings["amsgrad"] else 2]:
        state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)


def _move_step(state: dict[str, Any], param: Tensor) -> None:
    """Bring a step count to its parameter, where steps can be skipped without waiting for the device."""
    step = state["step"]
    if isinstance(step, Tensor) and step.device != param.device:
        state["step"] = step.to(param.device)


def _check_rows(group: AdamWGroup) -> None:
    """Raise where tensors of one parameter do not belong together, before anything is written."""
    for row, param in enumerate(group.params):
        for name in AdamWGroup.COLUMNS[1:-1]:
            x = getattr(group, name)[row]
            if x is None:
                continue
            if x.shape != param.shape or x.device != param.device:
                raise RuntimeError(
                    f"{name.removesuffix('s')} of shape {tuple(x.shape)} on {x.device} does not fit a parameter of "
                    f"shape {tuple(param.shape)} on {param.device}"
                )
            if kind(x) != kind(param):
                raise RuntimeError(f"{name.removesuffix('s')} of {x.dtype} does not fit a parameter of {param.dtype}")
        step = group.steps[row]
        if not isinstance(step, Tensor) or step.numel() != 1:
            raise RuntimeError(f"the state's step must be a one-element tensor, got {step!r:.60}")


def _by_device(groups: list[AdamWGroup]) -> dict[torch.device, list[AdamWGroup]]:
    """The groups as they are where everything is on one device; else one of each per device."""
    devices = list(dict.fromkeys(p.device for group in groups for p in group.params))
    if len(devices) == 1:
        return {devices[0]: groups}
    parts: dict[torch.device, list[AdamWGroup]] = {}
    for device in devices:
        for group in groups:
            rows = [row for row, param in enumerate(group.params) if param.device == device]
            if rows:
                columns: Any = {name: [getattr(group, name)[row] for row in rows] for name in AdamWGroup.COLUMNS}
                parts.setdefault(device, []).append(replace(group, rows=len(rows), **columns))
    return parts


def _check_state(param: Tensor, state: dict[str, Any] | None, *, amsgrad: bool) -> None:
    if not state:
        return
    needed = ["step", "exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"the state of a parameter of shape {tuple(param.shape)} has no {', '.join(missing)}")
    for name in needed[1:]:
        if state[name].shape != param.shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, but its parameter has shape {tuple(param.shape)}"
            )


def _torch_step(optimizer: AdamW, closure: Callable[[], float] | None) -> float | None:
    """PyTorch's own step, without the wrapper that runs the step hooks: they run around ours already."""
    step: Any = torch.optim.AdamW.step
    loss: float | None = (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer, closure)
    return loss
