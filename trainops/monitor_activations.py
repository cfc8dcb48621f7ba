"""Hooks that look at the outputs of modules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, which imports no compiler until it is called

from .ema_policy import Patterns, checked_patterns, fits
from .monitor_record import Watched
from .statistics import TensorStats, tensor_stats

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

# Modules whose units are the second dimension; of all others, they are the last one.
CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


class Activations:
    """The statistics of the outputs of chosen modules since they were last taken."""

    def __init__(self, model: nn.Module, patterns: Patterns, is_due: Callable[[], bool]) -> None:
        named = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if name]
        chosen = checked_patterns("activations", patterns, [name for name, _ in named], "module")
        exact = {name for name, _ in named}.intersection(x for x in chosen if isinstance(x, str))
        names: dict[nn.Module, str] = {}
        for name, module in named:
            if name in exact or any(fits(name, x) for x in chosen if x not in exact):
                names.setdefault(module, name)
        self._is_due = is_due
        self._seen: dict[str, _Seen] = {}
        self._hooks = [m.register_forward_hook(_Hook(self._look, name)) for m, name in names.items()]

    def __len__(self) -> int:
        return len(self._hooks)

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def take(self) -> Watched | None:
        """What was seen since the last time, and forget it."""
        seen, self._seen = self._seen, {}
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
        if not isinstance(x, Tensor) or x.layout is not torch.strided or not x.is_floating_point() or x.numel() == 0:
            return
        now = _Seen(module, x.detach())
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

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.stats = tensor_stats([x], histogram=True)
        units = 1 if x.ndim > 3 or (x.ndim > 1 and isinstance(module, CHANNELS_FIRST)) else -1
        self.zero = (x == 0).movedim(units, 0).flatten(1).all(1) if x.ndim > 0 else x == 0
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
