"""What a step of a fused optimizer does: measure, unscale, clip, skip, apply the rule, average."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import advice
from .adapters import Group, Rounding, StepControl, StepResult, select, skips
from .adapters.interface import AVERAGES
from .averages import StepAverages
from .ema import EMA
from .joint_norm import JointNorm, TakesJointNorm, known_norm
from .loading import LoadsState
from .masters import KeepsMasters
from .plain import all_in_memory
from .ranks import ComingNorm
from .rows import by_device, gather
from .spike_guard import HasSpikeGuard
from .step_stats import CollectsStats
from .storage import MASTER, has_codes, keys_of_state
from .tables import count_writes, have_common_memory
from .torch_step import KnowsTorchStep


class TakesFusedSteps(KnowsTorchStep, TakesJointNorm, LoadsState, KeepsMasters, HasSpikeGuard, CollectsStats):
    """An optimizer whose step also unscales, clips, skips and averages.

    A subclass names its ``rule`` (``csrc/math/<rule>.h``, ``trainops.reference.<rule>_``), the state and the settings
    that a group of parameters has for it.
    """

    rule: ClassVar[str]
    max_grad_norm: float | Tensor | None
    skip_nonfinite: bool
    stochastic_rounding: bool
    seed: int | None
    _averages: tuple[EMA, ...]
    grad_norm: Tensor | None
    grad_norms: Tensor | None
    skipped_steps: Tensor

    def settings(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        """The settings of the rule for a group, by name."""
        raise NotImplementedError

    def adopt_state(self, state: dict[str, Any], names: tuple[str, ...]) -> bool:
        """Whether a parameter's state is there. If not, it is made anew."""
        return bool(state)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, total_norm: float | Tensor | None = None
    ) -> float | None:
        """Unscale, clip, update and average: see the class.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned from here.
            total_norm: the norm to clip by, and to skip by, in place of that of this optimizer's gradients: that of
                all gradients of a model that several optimizers share, for example, as
                :func:`trainops.get_total_norm` returns it, one number. It is that of the gradients as they are, which
                may be scaled by a GradScaler. ``grad_norms`` is then None.

        Raises:
            RuntimeError: a gradient is sparse, or another optimizer updates the same ``ema``.
            ValueError: the model no longer matches its ``ema``; or ``total_norm`` has more than one number, comes
                with a closure, which computes other gradients, or is of no use without ``max_grad_norm``,
                ``skip_nonfinite`` and ``spike_guard``.
        """
        if total_norm is not None:
            self._check_total_norm(total_norm, closure)
        if self.defaults["differentiable"]:
            return self._torch_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        advice.before_step(self)
        averages = StepAverages(self, self._averages)
        collection = self._begin_stats(total_norm)
        averaged, result = self._update(averages, total_norm)
        averages.finish(averaged, result.skipped)
        self._finish_stats(collection, result.skipped)
        self._unscale_as_fused()
        return loss

    def _check_total_norm(self, total_norm: float | Tensor, closure: Callable[[], float] | None) -> None:
        if isinstance(total_norm, Tensor) and total_norm.numel() != 1:
            raise ValueError(f"total_norm must be one number, got a tensor of shape {tuple(total_norm.shape)}")
        if closure is not None:
            raise ValueError("total_norm is not that of the gradients that a closure computes: give one of the two")
        if (not isinstance(total_norm, Tensor) or total_norm.device.type == "cpu") and float(total_norm) < 0.0:
            raise ValueError(f"total_norm must not be negative, got {float(total_norm)}")
        if not self._measures:
            raise ValueError("total_norm is of no use without max_grad_norm, skip_nonfinite or spike_guard")

    def _update(
        self, averages: StepAverages, total_norm: float | Tensor | None
    ) -> tuple[list[Collection[int]], StepResult]:
        """Measure, clip, apply the rule, move fused averages.

        Returns for each of these the ids of what it has followed, and the step's result.
        """
        device = self._device()
        if self.skipped_steps.device != device:  # the model was moved
            self.skipped_steps = self.skipped_steps.to(device)
        codes = has_codes(self.state_dtype)
        seed = self.seed if self.stochastic_rounding or codes else None
        rounding = averages.rounding(seed, self.stochastic_rounding, codes)
        control = StepControl(
            None if self.max_grad_norm is None else checked_norm(self.max_grad_norm),
            self.skip_nonfinite,
            self._from_scaler("grad_scale"),
            self._from_scaler("found_inf"),
            skipped_steps=self.skipped_steps,
            seeds=rounding.seeds,
            guard=self._guard_on(device),
        )
        known = None if total_norm is None else known_norm(control, total_norm, device)
        control = control if known is None else known.control
        kernels = select(self.backend, device)
        masters = () if self.master is None else (MASTER,)
        names = [self.state_names(group) for group in self.param_groups]
        states = [(*keys_of_state(its, self.state_dtype), *masters) for its in names]
        containers = self.param_groups, self.state, averages.params, averages.buffers, states
        coming = self._begin_joint_norm(control)
        table = kernels.collect(self.rule, *containers, rounding)
        if table is not None:
            pairs = zip(self.param_groups, table.group_rows, strict=True)
            groups = [Group(self.settings(group), rows) for group, rows in pairs]
            averaged = averages.collected(table)
            if control.measures and self._is_spread():
                known = self._joint_norm(control, coming=coming)
                control = known.control
            count_writes([*table.params, *averages.tensors()], table.has_shards)
            result = kernels.update(self.rule, groups, control, averages.decays, table)
        else:
            averaged, result = self._update_any(averages, control, rounding, coming)
        if known is not None:
            result = known.result(result)
        if self._measures:
            self.grad_norm, self.grad_norms = result.total_norm, result.norms
        return averaged, result

    def _update_any(
        self, averages: StepAverages, control: StepControl, rounding: Rounding, coming: ComingNorm | None = None
    ) -> tuple[list[Collection[int]], StepResult]:
        """The slow path: missing state, several devices, subclasses, other layouts, no gradients at all."""
        known = set(self.state)
        try:
            if self._is_left_to_torch():
                averages.gathered(())
                self._torch_step()
                return [], StepResult()
            groups = gather(self, averages.params, rounding)
            params = [p for group in groups for p in group.columns["param"]]
            averaged = averages.gathered(params)
            count_writes([*params, *averages.tensors()])
            in_turn = have_common_memory(params)
            if in_turn:  # the averages follow when all rows are done
                for group in groups:
                    group.columns |= {name: [None] * group.rows for name in AVERAGES}
            return [] if in_turn else averaged, self._update_groups(groups, control, averages.decays, in_turn, coming)
        except BaseException as error:
            for param in self.state.keys() - known:
                del self.state[param]
            if isinstance(error, Exception):
                averages.check_models()
            raise

    def _update_groups(
        self,
        groups: list[Group],
        control: StepControl,
        ema_decays: list[float],
        in_turn: bool,
        coming: ComingNorm | None = None,
    ) -> StepResult:
        """``in_turn``: rows share memory, and so come one after the other, as in the reference alone."""
        parts = by_device(groups)
        joint: JointNorm | None = None
        if control.measures and (len(parts) > 1 or self._is_spread()):
            grads = [pair for g in groups for pair in zip(g.columns["param"], g.columns["grad"], strict=True)]
            joint = self._joint_norm(control, {id(param): grad for param, grad in grads}, coming)
            control = joint.control
        result = self._empty_step(control) if not groups else StepResult()
        if groups and len(parts) > 1:
            control = self._judged(control)
        for device, part in parts.items():
            columns = [column for group in part for column in group.columns.values()]
            in_memory = all_in_memory(x for column in columns for x in column if x is not None)
            kernels = select(self.backend, device, in_memory and not in_turn)
            result = kernels.update(self.rule, part, control, ema_decays)
            control = replace(control, skipped_steps=None)  # counted
        return result if joint is None else joint.result(result)

    def _judged(self, control: StepControl) -> StepControl:
        """The control of a step on several devices, which the guard has judged for all of them."""
        if control.guard is None or control.total_norm is None:
            return control
        skipped = skips(control, control.total_norm)
        return control if skipped is None else replace(control, guard=None, found_inf=skipped.to(torch.float32))

    def _empty_step(self, control: StepControl) -> StepResult:
        """The norm of no gradients is 0, as in torch; a step that a GradScaler wants skipped counts all the same.

        So does one that is skipped because of the gradients of other ranks.
        """
        device = self._device()
        skipped = skips(control, None if control.total_norm is None else control.total_norm.to(device))
        if skipped is not None:
            skipped = skipped.to(device)
            self.skipped_steps.add_(skipped)
        total_norm, norms = (torch.zeros(shape, dtype=torch.float32, device=device) for shape in ((), 0))
        return StepResult(total_norm, norms, skipped)

    def _from_scaler(self, name: str) -> Tensor | None:
        """A GradScaler's attribute as a 0-dim tensor. Its found_inf is a number if there are no gradients."""
        value = getattr(self, name, None)
        if value is None:
            return None
        return (value if isinstance(value, Tensor) else torch.tensor(float(value), device="cpu")).reshape(())

    def _device(self) -> torch.device:
        """The device of the first parameter; a group may be empty."""
        return next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))


def checked_norm(max_grad_norm: float | Tensor) -> float | Tensor:
    """The largest norm as a number, or on its device, where its value is not looked at.

    Raises:
        ValueError: it is negative or NaN.
    """
    limit = setting(max_grad_norm)
    if not isinstance(limit, Tensor) and not limit >= 0.0:
        raise ValueError(f"Invalid max_grad_norm: {max_grad_norm}")
    return limit


def setting(x: float | Tensor) -> float | Tensor:
    """A setting as a number, or on its device as a 0-dim tensor: there, reading it would wait for the device."""
    return x.reshape(()) if isinstance(x, Tensor) and x.device.type != "cpu" else float(x)
