"""The base of optimizers whose step also unscales, clips, skips and averages."""

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import advice
from .adapters import check
from .averages import as_averages
from .ema import EMA
from .ema_shards import reshard
from .lost_updates import share_of_lost_updates
from .own_settings import OWN_SETTINGS, HasOwnSettings
from .ranks import NormGroup
from .rows import complete_state
from .seeds import HasSeed, check_bfloat16, checked_seed
from .spike_guard import SpikeGuard, as_guard
from .step import TakesFusedSteps, checked_norm
from .step_stats import check_stats
from .storage import (
    StateDtype,
    check_is_served,
    check_master,
    check_masters,
    check_state_dtype,
    has_codes,
    wants_master,
)
from .uploads import prepare_capture
from .wrappers import unwrap

if TYPE_CHECKING:
    from typing_extensions import Self


Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class FusedOptimizer(HasOwnSettings, TakesFusedSteps, HasSeed):
    """A mixin that replaces ``step`` of a ``torch.optim`` class. List it before that class among the bases."""

    _max_grad_norm: float | Tensor | None
    _averages: tuple[EMA, ...]
    own_attributes = (
        "_max_grad_norm",
        "skip_nonfinite",
        "_spike_guard",
        "collects",
        "stats_every",
        "stats",
        "_norm_group",
        "_averages",
        "master",
        "state_dtype",
        "stochastic_rounding",
        "backend",
        "grad_norm",
        "grad_norms",
        "skipped_steps",
        "_unscaling_by_hand",
    )

    def __new__(cls, *args: Any, **options: Any) -> "Self":
        """Settings that hold where a subclass calls the constructor of PyTorch's class in place of ours."""
        self = super().__new__(cls)
        self._max_grad_norm = None
        self.skip_nonfinite = self.stochastic_rounding = False
        self._norm_group = self._repeatable = self._spike_guard = None
        self.collects, self.stats_every, self.stats = None, 1, None
        self._averages = ()
        self.master = self.state_dtype = self.backend = None
        self.grad_norm = self.grad_norms = None
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device="cpu")
        return self

    def __init__(
        self,
        *args: Any,
        max_grad_norm: float | Tensor | None = None,
        skip_nonfinite: bool = False,
        spike_guard: SpikeGuard | float | None = None,
        norm_group: NormGroup = None,
        ema: EMA | Sequence[EMA] | None = None,
        master: str | None = None,
        state_dtype: StateDtype = None,
        stochastic_rounding: bool = False,
        seed: int | None = None,
        stats: str | None = None,
        stats_every: int = 1,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"max_grad_norm": max_grad_norm, "skip_nonfinite": skip_nonfinite or None, "ema": ema}
        own |= {"master": master, "state_dtype": state_dtype, "norm_group": norm_group}
        own |= {"spike_guard": spike_guard, "stats": stats}
        own |= {"stochastic_rounding": stochastic_rounding or None, "seed": seed}
        if options.get("differentiable") and any(x is not None for x in own.values()):
            raise ValueError(f"differentiable=True runs PyTorch's own step, without {', '.join(own)}")
        if not isinstance(skip_nonfinite, bool):
            raise TypeError(f"skip_nonfinite must be True or False, got {skip_nonfinite!r:.60}")
        check(backend)
        as_guard(spike_guard)
        check_stats(stats, stats_every)
        check_master(master)
        check_state_dtype(state_dtype)
        checked = checked_seed(seed, stochastic_rounding, has_codes(state_dtype))
        self.norm_group = norm_group
        self.master, self.state_dtype = None, state_dtype  # first: they are asked for each group that is added
        flags = {"skip_nonfinite": skip_nonfinite, "stochastic_rounding": stochastic_rounding}
        with self._while_constructed({**own, **flags, "stats_every": stats_every, "backend": backend}):
            super().__init__(*args, **options)
        check_masters((p for group in self.param_groups for p in group["params"]), master)
        self.master = master
        self._set_stochastic_rounding(checked, stochastic_rounding, master)
        self._unscaling_by_hand = None  # what PyTorch's constructor has set for fused=True
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.spike_guard = spike_guard
        self.collects, self.stats_every = stats, stats_every
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
            checked_norm(max_grad_norm)
        if (inner := unwrap(self)) is not self:  # as below
            inner.max_grad_norm = max_grad_norm
            return
        self._max_grad_norm = max_grad_norm
        if max_grad_norm is not None:
            advice.clips_inside(self)

    @property
    def ema(self) -> Any:
        """The average that steps update, or a tuple of several, or None; may be changed between steps."""
        return self._averages[0] if len(self._averages) == 1 else self._averages or None

    @ema.setter
    def ema(self, ema: EMA | Sequence[EMA] | None) -> None:
        averages = as_averages(ema)
        own = {id(p) for group in self.param_groups for p in group["params"]}
        for average in averages:
            reshard(average.model)
            if own and own.isdisjoint(map(id, average.model.parameters())):
                raise ValueError("ema follows a model that has none of these parameters")
        if (inner := unwrap(self)) is not self:  # Lightning's and Fabric's wrappers imitate their optimizer's class
            inner.ema = ema
            return
        before, self._averages = self._averages, averages
        for average in before:
            if average not in averages and average.optimizer is self:
                average.detach()
        for average in averages:
            average.attach_to(self)

    @property
    def averages(self) -> tuple[EMA, ...]:
        """All averages that steps update, in their order."""
        return self._averages

    def drop_average(self, ema: EMA) -> None:
        """Go on without an average: what :meth:`EMA.detach` calls."""
        self._averages = tuple(x for x in self._averages if x is not ema)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in torch.

        Raises:
            ValueError: the group has a setting that all groups share, or a parameter that ``state_dtype``,
                ``master`` or ``stochastic_rounding`` is not for.
        """
        super().add_param_group(self._without_own(param_group))
        params = self.param_groups[-1]["params"]
        try:
            if self.state_dtype is not None:
                check_is_served(params, self.state_dtype)
            if self.stochastic_rounding:
                check_bfloat16("parameters", params, some=False)
            for param in params:
                wants_master(param, self.master)
        except ValueError:
            self.param_groups.pop()
            raise

    def init_state(self) -> None:
        """Make the state that parameters have before their first step, where they have none, without taking a step.

        Of all that require a gradient. ``torch.distributed.checkpoint`` saves and loads no state that is not there
        yet: it makes it by a step with zero gradients, which counts as one, and moves an average. After this call, it
        has no reason to.

        Raises:
            ValueError: a parameter cannot have the ``master`` that was asked for.
        """
        made: dict[Tensor, dict[str, Any]] = {}
        for group in self.param_groups:
            for param in (p for p in group["params"] if p.requires_grad):
                made[param] = dict(self.state.get(param, {}))
                complete_state(made[param], param, self.state_names(group), self)
        for param, its in made.items():
            self.state[param].update(its)

    @torch.no_grad()
    def lost_updates(self) -> Tensor:
        """How much of the next step rounding would lose: call it before ``step()``, now and then, to see a stall.

        An update is lost where the rule moves a weight by less than half of its last place, so that it stays what it
        was. Of bfloat16 weights without a ``master`` that is most of them, near the end of training. It takes no step
        and changes nothing. The rule runs in float64 by PyTorch's operations, on copies of one parameter at a time,
        which takes longer than a step. With a GradScaler, call it after ``scaler.unscale_``. With
        ``stochastic_rounding``, it is what rounding to nearest would lose.

        Returns:
            The share of each parameter's elements whose update is lost, between 0 and 1; 1-D float32, one number for
            each parameter that has a gradient, in group order, on the device of the first parameter. Of a DTensor it
            is that of this rank's shard; with ``max_grad_norm``, all ranks must call it.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        return share_of_lost_updates(self, params, self.coefficient())

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
        named = {name: getattr(self, "collects" if name == "stats" else name) for name in OWN_SETTINGS}
        own = "".join(f"{name}: {value}\n" for name, value in named.items())
        return super().__repr__().removesuffix(")") + own + ")"
