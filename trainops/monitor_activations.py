"""Hooks that look at the outputs of modules."""

from collections.abc import Callable
from typing import Any, NamedTuple

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

# Modules whose units are the last dimension of what they return.
FEATURES_LAST = (
    nn.Linear,
    nn.Bilinear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
)
INSTANCE_NORMS = ((nn.InstanceNorm1d, 1), (nn.InstanceNorm2d, 2), (nn.InstanceNorm3d, 3))
# Where those are that keep the dimensions of what they are given.
KEEPING = frozenset(f"torch.nn.modules.{name}" for name in ("activation", "dropout", "pooling"))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Units(NamedTuple):
    """Which dimension of a module's outputs has its units.

    Attributes:
        dim: from the beginning, or negative from the end.
        dims: how many dimensions a batch of outputs has; None: any number.
    """

    dim: int
    dims: int | None = None


def units_known(module: nn.Module) -> Units | None:
    """The units of a module whose kind says them: channels of convolutions and of their norms, features of others."""
    if isinstance(module, FEATURES_LAST):
        return Units(-1)
    if isinstance(module, nn.modules.conv._ConvNd):
        return Units(-len(module.kernel_size) - 1, len(module.kernel_size) + 2)
    for kind, spatial in INSTANCE_NORMS:
        if isinstance(module, kind):
            return Units(-spatial - 1, spatial + 2)
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
        return Units(1)
    return None


def units_of(module: nn.Module, every: list[nn.Module]) -> Units | None:
    """The units of any module, or None where nothing says them.

    A Sequential has those of its last module, and an activation function, a dropout or a pooling those of the module
    before it in ``every``, the modules of the model in their order.
    """
    if (known := units_known(module)) is not None:
        return known
    if isinstance(module, nn.Sequential) and len(module) > 0:
        return units_of(module[-1], every)
    place = every.index(module)
    while _keeps_dimensions(every[place]) and place > 0:
        place -= 1
        while place > 0 and next(every[place].children(), None) is not None:
            place -= 1
        if (known := units_known(every[place])) is not None:
            return known
    return None


def _keeps_dimensions(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or any(base.__module__ in KEEPING for base in type(module).__mro__)


class Activations:
    """The statistics of the outputs of chosen modules since they were last taken."""

    def __init__(self, model: nn.Module, patterns: Patterns, is_due: Callable[[], bool]) -> None:
        """``is_due``: whether the next step is looked at."""
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
        for module, name in names.items():
            if (known := units_known(module)) is not None:
                self._units[name] = known._replace(dims=None)  # of one input without a batch, too
        self._hooks = [m.register_forward_hook(_Hook(self._look, name)) for m, name in names.items()]

    def __len__(self) -> int:
        return len(self._hooks)

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen = [], {}

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
        if not module.training or not self._is_due() or torch._C._current_graph_task_id() != -1:
            return  # the last: a checkpoint computes the outputs again, in the backward pass
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

    def __init__(self, module: nn.Module, x: Tensor, units: Units | None) -> None:
        self.stats = tensor_stats([x], histogram=True)
        x = x.reshape(-1) if x.ndim == 0 else x
        dim = self._dim_of(x.ndim, units)
        self.zero = (x == 0).movedim(dim, 0).reshape(x.shape[dim], -1).all(1)
        ends = RANGES.get(type(module))
        if ends is None:
            self.saturated = torch.full((), torch.nan, device=x.device)
        else:
            near = NEAR * (ends[1] - ends[0])
            self.saturated = ((x <= ends[0] + near) | (x >= ends[1] - near)).sum().float()

    @staticmethod
    def _dim_of(dims: int, units: Units | None) -> int:
        """The dimension of the units. Where nothing says it, images have channels first, all else features last."""
        fits = units is not None and units.dims in (None, dims)
        dim = units.dim if units is not None and fits else (1 if dims > 3 else -1)
        return dim if -dims <= dim < dims else -1

    def merge(self, other: "_Seen") -> "_Seen":
        """Both together: units that were 0 for all inputs of both."""
        self.stats = self.stats.merge(other.stats)
        zero = other.zero.to(self.zero.device)  # a module may be used on several devices
        self.zero = self.zero & zero if self.zero.shape == zero.shape else zero
        self.saturated = self.saturated + other.saturated.to(self.saturated.device)
        return self
