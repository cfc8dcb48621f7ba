"""What an average holds of a model: which parameters, which buffers, and where."""

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .plain import all_in_memory, all_plain
from .storage import kind
from .tables import local

Patterns = str | re.Pattern[str] | Iterable[str | re.Pattern[str]]

USES = ("average", "copy", "leave")  # of a buffer

_answers: dict[Any, bool] = {}  # whether subclasses have the operations of an average, by types and dtypes


class AveragePolicy:
    """The arguments of :class:`trainops.EMA` that say what is averaged. The model is asked, and not changed.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a pattern fits no name of the model, or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None,
        device: torch.device | str | int | None,
        average_buffers: bool | str | Mapping[str | re.Pattern[str], str],
        trainable_only: bool,
        include: Patterns | None,
        exclude: Patterns | None,
    ) -> None:
        if not isinstance(trainable_only, bool):
            raise TypeError(f"trainable_only must be True or False, got {trainable_only!r:.60}")
        self.dtype = dtype
        self.device = None if device is None else torch.empty(0, device=device).device
        self.average_buffers = average_buffers
        self.trainable_only = trainable_only
        parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self.include = None if include is None else checked_patterns("include", include, parameters, "parameter")
        self.exclude = () if exclude is None else checked_patterns("exclude", exclude, parameters, "parameter")
        self._buffers = _uses(average_buffers, model)
        self.shared: set[str] = set()  # names of the parameters that the averaged module has of the model itself

    def use_of_buffer(self, name: str) -> str:
        """``"average"``, ``"copy"`` or ``"leave"``: the first pattern that fits decides, and else it is averaged."""
        return next((use for pattern, use in self._buffers if fits(name, pattern)), "average")

    def is_shared(self, names: list[str], param: Tensor) -> bool:
        """Whether a parameter, by all its names, is left out: the averaged module then holds the model's own."""
        if self.trainable_only and not param.requires_grad:
            return True
        if self.include is not None and not any(fits(name, x) for name in names for x in self.include):
            return True
        if any(fits(name, x) for name in names for x in self.exclude):
            return True
        # Quantised weights that are never trained.
        return not param.requires_grad and self.device in (None, param.device) and not can_average(param, param)

    def averaged_parameters(self, module: nn.Module) -> list[Tensor]:
        """The parameters of the averaged module that it does not share with the model."""
        return [p for name, p in module.named_parameters() if name not in self.shared and can_average(p, p)]

    def new(self, source: Tensor) -> Tensor:
        """The average of a tensor of the model that had none until now: a copy."""
        return self.copy_of(source, self.converted)

    @staticmethod
    def copy_of(source: Tensor, convert: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """A copy that no mode for inference has made, and a parameter without gradient if the source is one."""
        with torch.inference_mode(False):
            copied = convert(source.detach().clone())
        return nn.Parameter(copied, requires_grad=False) if isinstance(source, nn.Parameter) else copied

    def converted(self, x: Tensor) -> Tensor:
        """``x`` where the average lives and in its dtype."""
        dtype = self.dtype if x.is_floating_point() and can_average(x, x) else None
        if dtype in (None, x.dtype) and self.device in (None, x.device):
            return x
        return x.to(device=self.device, dtype=dtype)


def can_average(average: Tensor, source: Tensor) -> bool:
    """Whether an average of this type can follow a tensor. A subclass is tried, on copies, once for each dtype."""
    if all_in_memory((average, source)):
        return is_dense(average) and is_dense(source) and kind(average) == kind(source) != "other"
    key = type(average), type(source), average.dtype, source.dtype, average.device.type == source.device.type
    if key not in _answers:
        _answers[key] = _can_be_moved(average, source)
    return _answers[key]


def is_dense(x: Tensor) -> bool:
    """Whether a tensor, or its shard, is memory with strides, and nothing else: it can be written in place."""
    x = local(x) if all_in_memory([x]) else x
    return all_plain([x]) and x.layout is torch.strided and not (x.is_nested or x.is_quantized)


@torch.no_grad()
def _can_be_moved(average: Tensor, source: Tensor) -> bool:
    try:
        skip = torch.zeros((), dtype=torch.bool, device=average.device)
        source = source.detach().to(average.device)
        reference.ema_([average.detach().clone()], [source], 0.5, skip)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a subclass raises where it lacks an operation
        return False
    return True


def _uses(
    average_buffers: bool | str | Mapping[str | re.Pattern[str], str], model: nn.Module
) -> list[tuple[str | re.Pattern[str], str]]:
    """Patterns of names of buffers, and what is done with those."""
    if isinstance(average_buffers, bool):
        average_buffers = "average" if average_buffers else "copy"
    if isinstance(average_buffers, str):
        average_buffers = {"*": average_buffers}
        names = None
    elif isinstance(average_buffers, Mapping):
        names = [f"{path}.{key}" if path else key for path, m in model.named_modules() for key in m._buffers]
    else:
        raise TypeError(
            "average_buffers must be True, False, 'average', 'copy', 'leave' or a dictionary from patterns to these "
            f"words, got {average_buffers!r:.60}"
        )
    for pattern, use in average_buffers.items():
        if use not in USES:
            raise ValueError(f"average_buffers must be one of {', '.join(map(repr, USES))}, got {use!r:.60}")
        if names is not None:
            checked_patterns("average_buffers", [pattern], names, "buffer")
    return list(average_buffers.items())


def checked_patterns(
    argument: str, patterns: Patterns, names: list[str], what: str
) -> tuple[str | re.Pattern[str], ...]:
    """Patterns as a tuple; an error where one fits no name."""
    patterns = (patterns,) if isinstance(patterns, (str, re.Pattern)) else patterns
    found = tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    for pattern in found:
        if not isinstance(pattern, (str, re.Pattern)):
            raise TypeError(f"{argument} must be names, or patterns of names, got {pattern!r:.60}")
        if not any(fits(name, pattern) for name in names):
            raise ValueError(f"{argument}: the model has no {what} whose name fits {pattern!r:.60}")
    return found


def fits(name: str, pattern: str | re.Pattern[str]) -> bool:
    """Whether a name is the pattern, lies within the module of that name, or matches it."""
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)
