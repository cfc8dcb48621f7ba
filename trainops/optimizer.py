"""The base of optimizers whose step also unscales, clips, skips and averages."""

from collections.abc import Callable, Collection
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from . import advice, reference
from .adapters import Group, StepControl, StepResult, check, select
from .ema import EMA
from .loading import LoadsState
from .masters import KeepsMasters
from .plain import all_in_memory, all_plain
from .rows import by_device, gather
from .storage import MASTER, StateDtype, check_is_real, check_master, check_masters, check_state_dtype, wants_master
from .tables import have_common_memory
from .torch_step import KnowsTorchStep
from .uploads import prepare_capture
from .wrappers import unwrap

if TYPE_CHECKING:
    from typing_extensions import Self


class FusedOptimizer(KnowsTorchStep, LoadsState, KeepsMasters):
    """A mixin that replaces ``step`` of a ``torch.optim`` class. List it before that class among the bases.

    A subclass names its ``rule`` (``csrc/math/<rule>.h``, ``trainops.reference.<rule>_``), the state and the settings
    that a group of parameters has for it.
    """

    rule: ClassVar[str]
    _max_grad_norm: float | Tensor | None
    _ema: EMA | None
    backend: str | None
    grad_norm: Tensor | None
    grad_norms: Tensor | None
    skipped_steps: Tensor
    own_attributes = (
        "_max_grad_norm",
        "skip_nonfinite",
        "_ema",
        "master",
        "state_dtype",
        "backend",
        "grad_norm",
        "grad_norms",
        "skipped_steps",
        "_unscaling_by_hand",
    )

    def settings(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        """The settings of the rule for a group, by name."""
        raise NotImplementedError

    def __new__(cls, *args: Any, **options: Any) -> "Self":
        """Settings that hold where a subclass calls the constructor of PyTorch's class in place of ours."""
        self = super().__new__(cls)
        self._max_grad_norm = None
        self.skip_nonfinite = False
        self._ema = None
        self.master = self.state_dtype = self.backend = None
        self.grad_norm = self.grad_norms = None
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device="cpu")
        return self

    def __init__(
        self,
        *args: Any,
        max_grad_norm: float | Tensor | None = None,
        skip_nonfinite: bool = False,
        ema: EMA | None = None,
        master: str | None = None,
        state_dtype: StateDtype = None,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"max_grad_norm": max_grad_norm, "skip_nonfinite": skip_nonfinite or None, "ema": ema}
        own |= {"master": master, "state_dtype": state_dtype}
        if options.get("differentiable") and any(x is not None for x in own.values()):
            raise ValueError(f"differentiable=True runs PyTorch's own step, without {', '.join(own)}")
        check(backend)
        check_master(master)
        check_state_dtype(state_dtype)
        self.master, self.state_dtype = None, state_dtype  # first: they are asked for each group that is added
        super().__init__(*args, **options)
        check_masters((p for group in self.param_groups for p in group["params"]), master)
        self.master = master
        self._unscaling_by_hand = None  # what PyTorch's constructor has set for fused=True
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.backend = backend
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=self._device())
        self.ema = ema  # last: it is taken from the optimizer that has it

    @property
    def max_grad_norm(self) -> float | Tensor | None:
        """The norm to which gradients are clipped; may be changed between steps."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | Tensor | None) -> None:
        if max_grad_norm is not None:
            is_number = isinstance(max_grad_norm, Real) and not isinstance(max_grad_norm, bool)
            if not is_number and not (isinstance(max_grad_norm, Tensor) and max_grad_norm.numel() == 1):
                raise TypeError(f"max_grad_norm must be a number or None, got {max_grad_norm!r:.60}")
            limit = setting(max_grad_norm)
            if not isinstance(limit, Tensor) and not limit >= 0.0:
                raise ValueError(f"Invalid max_grad_norm: {max_grad_norm}")
        if (inner := unwrap(self)) is not self:  # as below
            inner.max_grad_norm = max_grad_norm
            return
        self._max_grad_norm = max_grad_norm
        if max_grad_norm is not None:
            advice.clips_inside(self)

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
        if (inner := unwrap(self)) is not self:  # Lightning's and Fabric's wrappers imitate their optimizer's class
            inner.ema = ema
            return
        before, self._ema = self._ema, ema
        if before is not None and before is not ema and before.optimizer is self:
            before.detach()
        if ema is not None:
            ema.attach_to(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in torch.

        Raises:
            ValueError: the group has a setting that all groups share, or a parameter that ``state_dtype`` or
                ``master`` is not for.
        """
        if isinstance(param_group, dict) and (shared := [name for name in _OWN_SETTINGS if name in param_group]):
            raise ValueError(f"{shared[0]} is a setting of the optimizer, not of a group of parameters")
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        try:
            if self.state_dtype is not None:
                check_is_real(params)
            for param in params:
                wants_master(param, self.master)
        except ValueError:
            self.param_groups.pop()
            raise

    def prepare_capture(self) -> None:
        """Make ready for captures of ``step()`` in CUDA graphs. Without effect for parameters on a CPU.

        Equivalent to PyTorch's warm-up of a few steps on another stream than the default one. That, too, prepares
        for captures: such steps keep pinned memory for four captured steps of the same sizes. After this call, so do
        steps on every stream, and memory of the sizes of earlier steps is made anew at once. Call it before a
        warm-up on the default stream, or again when four steps have been captured.

        A graph's pinned memory is freed after the graph. (On ROCm, it is kept until the process ends.)

        Raises:
            RuntimeError: in a capture.
        """
        if any(p.is_cuda for group in self.param_groups for p in group["params"]):
            prepare_capture()

    def __repr__(self) -> str:
        own = "".join(f"{name}: {getattr(self, name)}\n" for name in _OWN_SETTINGS)
        return super().__repr__().removesuffix(")") + own + ")"

    def _device(self) -> torch.device:
        """The device of the first parameter; a group may be empty."""
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
            return self._torch_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        advice.before_step(self)
        update = None if self.ema is None else self.ema.plan_update(self)
        averages = {} if update is None else update.fusable
        averaged, result = self._update(averages, 0.0 if update is None or update.decay is None else update.decay)
        if self.ema is not None and update is not None:
            self.ema.finish_update(update, averaged, result.skipped)
        self._unscale_as_fused()
        return loss

    def _update(self, averages: dict[int, Tensor], ema_decay: float) -> tuple[Collection[int], StepResult]:
        """Measure, clip, apply the rule, move fused averages.

        Returns the ids of the parameters whose averages were moved, and the step's result.
        """
        device = self._device()
        if self.skipped_steps.device != device:  # the model was moved
            self.skipped_steps = self.skipped_steps.to(device)
        control = StepControl(
            None if self.max_grad_norm is None else setting(self.max_grad_norm),
            self.skip_nonfinite,
            self._from_scaler("grad_scale"),
            self._from_scaler("found_inf"),
            skipped_steps=self.skipped_steps,
        )
        kernels = select(self.backend, device)
        masters = () if self.master is None else (MASTER,)
        states = [(*self.state_names(group), *masters) for group in self.param_groups]
        table = kernels.collect(self.rule, self.param_groups, self.state, averages, states)
        if table is not None:
            pairs = zip(self.param_groups, table.group_rows, strict=True)
            groups = [Group(self.settings(group), rows) for group, rows in pairs]
            params = table.params
            all_averaged = table.averaged == len(averages)
            if self.ema is not None and not all_averaged:
                self.ema.check_rest(averages.keys() & set(map(id, params)))
            torch.autograd.graph.increment_version([*params, *averages.values()])
            result = kernels.update(self.rule, groups, control, ema_decay, table)
        else:
            params, result = self._update_any(averages, control, ema_decay)
            all_averaged = False
        if self._measures:
            self.grad_norm, self.grad_norms = result.total_norm, result.norms
        return averages.keys() if all_averaged else averages.keys() & set(map(id, params)), result

    def _update_any(
        self, averages: dict[int, Tensor], control: StepControl, ema_decay: float
    ) -> tuple[list[Tensor], StepResult]:
        """The slow path: missing state, several devices, subclasses, other layouts, no gradients at all."""
        known = set(self.state)
        try:
            if self._is_left_to_torch():
                if self.ema is not None:
                    self.ema.check_rest(())
                self._torch_step()
                return [], StepResult()
            groups = gather(self, averages)
            params = [p for group in groups for p in group.columns["param"]]
            if self.ema is not None:
                self.ema.check_rest(averages.keys() & set(map(id, params)))
            torch.autograd.graph.increment_version([*params, *averages.values()])
            in_turn = have_common_memory(params)
            if in_turn:  # the average follows when all rows are done
                for group in groups:
                    group.columns["average"] = [None] * group.rows
            return [] if in_turn else params, self._update_groups(groups, control, ema_decay, in_turn)
        except BaseException as error:
            for param in self.state.keys() - known:
                del self.state[param]
            if self.ema is not None and isinstance(error, Exception):
                self.ema.check_model()
            raise

    def _update_groups(
        self, groups: list[Group], control: StepControl, ema_decay: float, in_turn: bool
    ) -> StepResult:
        """``in_turn``: rows share memory, and so come one after the other, as in the reference alone."""
        if not groups:
            return self._empty_step(control)
        parts = by_device(groups)
        joint: tuple[Tensor, Tensor] | None = None
        if control.measures and (len(parts) > 1 or not all(all_plain(g.columns["param"]) for g in groups)):
            joint = _joint_norm(groups, control)
            control = replace(control, total_norm=joint[0])
        result = StepResult()
        for device, part in parts.items():
            columns = [column for group in part for column in group.columns.values()]
            in_memory = all_in_memory(x for column in columns for x in column if x is not None)
            kernels = select(self.backend, device, in_memory and not in_turn)
            result = kernels.update(self.rule, part, control, ema_decay)
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

    def _from_scaler(self, name: str) -> Tensor | None:
        """A GradScaler's attribute as a 0-dim tensor. Its found_inf is a number if there are no gradients."""
        value = getattr(self, name, None)
        if value is None:
            return None
        return (value if isinstance(value, Tensor) else torch.tensor(float(value), device="cpu")).reshape(())


def setting(x: float | Tensor) -> float | Tensor:
    """A setting as a number, or on its device as a 0-dim tensor: there, reading it would wait for the device."""
    return x.reshape(()) if isinstance(x, Tensor) and x.device.type != "cpu" else float(x)


_OWN_SETTINGS = ("max_grad_norm", "skip_nonfinite", "ema", "master", "state_dtype", "backend")


def _joint_norm(groups: list[Group], control: StepControl) -> tuple[Tensor, Tensor]:
    """The norms over several devices, or over the shards of a DTensor: of all (unrounded), and of each."""
    grads = [grad for group in groups for grad in group.columns["grad"]]
    norms = reference.sum_norms(grads)[1]
    norms = norms.full_tensor() if hasattr(norms, "full_tensor") else norms
    if control.grad_scale is not None:
        norms = norms / reference.scalar(control.grad_scale, norms.device)
    return torch.linalg.vector_norm(norms), norms.to(reference.norm_dtype(grads))
