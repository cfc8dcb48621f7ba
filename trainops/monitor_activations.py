"""Hooks that look at the outputs of modules."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, which imports no compiler until it is called

from .ema_policy import Patterns, checked_patterns, fits
from .monitor_record import Watched
from .plain import PLAIN
from .statistics import TensorStats, tensor_stats
from .tables import local

# Activation functions with a range: its ends. An output within 1% of the range from an end is saturated.
RANGES: dict[type[nn.Module], tuple[float, float]] = {
    nn.Sigmoid: (0.0, 1.0),
    nn.Tanh: (-1.0, 1.0),
    nn.Softsign: (-1.0, 1.0),
    nn.Hardsigmoid: (0.0, 1.0),
    nn.Hardtanh: (-1.0, 1.0),
    nn.ReLU6: (0.0, 6.0),
}
NEAR = 0.01

# Modules whose units are the last dimension of what they return, and those of which they are the second one.
FEATURES_LAST = (
    nn.Linear,
    nn.Bilinear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
)
FEATURES_SECOND = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def units_known(module: nn.Module) -> int | None:
    """The dimension of the units in what a module returns, if its kind says it; negative: from the end."""
    if isinstance(module, FEATURES_LAST):
        return -1
    if isinstance(module, FEATURES_SECOND):
        return 1
    if isinstance(module, nn.modules.conv._ConvNd):
        return -len(module.kernel_size) - 1
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return -int(type(module).__name__[-2]) - 1 if type(module).__name__[-1:] == "d" else None
    return None


def units_of(module: nn.Module, every: list[nn.Module]) -> int | None:
    """The same of any module: as of the last one within it whose kind says it, or of the nearest one before it.

    So a ReLU has the units of its convolution, and a GELU those of its linear layer. ``every``: of the whole model.
    """
    within = [units_known(x) for x in module.modules()]
    before = [units_known(x) for x in every[: every.index(module)]]
    return next((x for x in (*within[::-1], *before[::-1]) if x is not None), None)


class Activations:
    """The statistics of the outputs of chosen modules since they were last taken."""

    def __init__(
        self, model: nn.Module, patterns: Patterns, params: Iterable[Tensor], is_due: Callable[[], bool]
    ) -> None:
        """``params``: those of which the gradients are watched. ``is_due``: whether the step that comes is."""
        named = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if name]
        chosen = checked_patterns("activations", patterns, [name for name, _ in named], "module")
        exact = {name for name, _ in named}.intersection(x for x in chosen if isinstance(x, str))
        names: dict[nn.Module, str] = {}
        for name, module in named:
            if name in exact or any(fits(name, x) for x in chosen if x not in exact):
                names.setdefault(module, name)
        self._is_due = is_due
        self._seen: dict[str, _Seen] = {}
        every = list(model.modules())
        self._units = {name: units_of(m, every) for m, name in names.items()}
        self._hooks: list[Any] = [m.register_forward_hook(_Hook(self._look, name)) for m, name in names.items()]
        self._watched = len(names)
        # Where a step is skipped, as by a GradScaler, nobody takes what was seen, and its gradients are thrown away.
        self._first = next((p for p in params if p.is_leaf and p.requires_grad), None) if names else None
        self._has_gradient = False
        if self._first is not None:
            first: Any = self._first
            self._hooks.append(first.register_post_accumulate_grad_hook(self._gradient_came))

    def _gradient_came(self, _: Tensor) -> None:
        self._has_gradient = True

    def __len__(self) -> int:
        return self._watched if self._hooks else 0

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def take(self) -> Watched | None:
        """What was seen since the last time, and forget it."""
        seen, self._seen = self._seen, {}
        self._has_gradient = False
        if not seen:
            return None
        parts = list(seen.values())
        device = parts[0].stats.rows.device
        histograms = [x.stats.histogram.to(device) for x in parts if x.stats.histogram is not None]
        outputs = TensorStats(torch.cat([x.stats.rows.to(device) for x in parts]), torch.cat(histograms))
        dead = torch.stack([x.zero.double().mean().to(device) for x in parts])
        saturated = torch.stack([(x.saturated / x.stats.numel[0]).to(device) for x in parts])
        return Watched(list(seen), outputs, dead, saturated)

    @_disable_dynamo  # it would compile again for each step: whether one is due is a number in Python
    @torch.no_grad()
    def _look(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        if not module.training or not self._is_due():
            return
        x = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(x, Tensor) or torch._C._are_functorch_transforms_active():
            return
        x = local(x.detach())  # of a DTensor, this rank's
        if (
            type(x) not in PLAIN
            or x.layout is not torch.strided
            or x.dtype not in DTYPES
            or x.is_meta
            or x.is_nested
            or not x.numel()
        ):
            return
        if self._has_gradient and self._first is not None and self._first.grad is None:
            self.take()  # of a step that was skipped
        now = _Seen(module, x, self._units[name])
        before = self._seen.get(name)
        self._seen[name] = now if before is None else before.merge(now)


class _Hook:
    """A forward hook. Copies of its module, such as averages, have one that does nothing and holds no monitor."""

    def __init__(self, look: Callable[..., None] | None, name: str) -> None:
        self.look, self.name = look, name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.look is not None:
            self.look(self.name, module, args, output)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[None, str]]:
        return _Hook, (None, self.name)


class _Seen:
    """What was seen of one module's outputs."""

    def __init__(self, module: nn.Module, x: Tensor, units: int | None) -> None:
        self.stats = tensor_stats([x], histogram=True)
        if units is None:
            units = 1 if x.ndim > 3 else -1
        x = x.reshape(-1) if x.ndim == 0 else x
        units = units if -x.ndim <= units < x.ndim else -1
        self.zero = (x == 0).movedim(units, 0).reshape(x.shape[units], -1).all(1)
        ends = RANGES.get(type(module))
        if ends is None:
            self.saturated = torch.full((), torch.nan, device=x.device)
        else:
            near = NEAR * (ends[1] - ends[0])
            self.saturated = ((x <= ends[0] + near) | (x >= ends[1] - near)).sum().float()

    def merge(self, other: "_Seen") -> "_Seen":
        """Both together: units that were 0 for all inputs of both."""
        self.stats = self.stats.merge(other.stats)
        self.zero = self.zero & other.zero if self.zero.shape == other.zero.shape else other.zero
        self.saturated = self.saturated + other.saturated
        return self
