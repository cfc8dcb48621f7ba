"""Every tensor of a model with its average, as both are now: frameworks replace parameters at will."""

import operator
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Pair(NamedTuple):
    """A tensor of the model and its average."""

    average: Tensor
    source: Tensor
    averaged: bool  # else it is copied


class Pairs:
    """Pairs of tensors, by what an update does with them."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        self.averages = [pair.average for pair in pairs if pair.averaged]
        self.sources = [pair.source for pair in pairs if pair.averaged]
        self.copied = [pair for pair in pairs if not pair.averaged]

    def without(self, done: Collection[int]) -> "Pairs":
        """The pairs whose source is not ``done``, by ``id``."""
        return Pairs([pair for pair in self.pairs if id(pair.source) not in done])


class Matched(Pairs):
    """All pairs of a model and its average, and everything that both modules held when they were paired."""

    def __init__(self, pairs: list[Pair], module: nn.Module, model: nn.Module) -> None:
        super().__init__(pairs)
        self.fusable = {id(pair.source): pair.average for pair in pairs if _is_fusable(pair)}
        self._others = [pair for pair in pairs if id(pair.source) not in self.fusable]
        modules = [m for root in (module, model) for m in root.modules()]
        self._containers: list[dict[str, Any]] = [x for m in modules for x in (m._parameters, m._buffers, m._modules)]
        self._size = sum(map(len, self._containers))
        self._owners = [container for container in self._containers for _ in container]
        self._keys = [key for container in self._containers for key in container]
        self._values = [value for container in self._containers for value in container.values()]

    def is_current(self) -> bool:
        """Whether both modules still hold the same tensors and modules in the same places, and no others.

        Kernels compare the shapes of what an optimizer can update; those of the other pairs are compared here.
        """
        same = all(map(operator.is_, map(dict.get, self._owners, self._keys), self._values))
        return (
            same
            and sum(map(len, self._containers)) == self._size
            and all(pair.average.shape == pair.source.shape for pair in self._others)
        )


def _is_fusable(pair: Pair) -> bool:
    return isinstance(pair.source, nn.Parameter) and pair.average.device == pair.source.device


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module by name, tied ones once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, submodule in module.named_modules():
        for owner in (submodule._parameters, submodule._buffers):
            for key, tensor in owner.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{prefix}.{key}" if prefix else key] = tensor
    return found


def match(module: nn.Module, model: nn.Module, average_buffers: bool) -> Matched:
    """Pairs every tensor of ``model`` with that of ``module``; ValueError naming the first that does not match."""
    averages, sources = _tensors(module), _tensors(model)
    if averages.keys() != sources.keys():
        name = min(averages.keys() ^ sources.keys())
        raise ValueError(f"{name} is in {'the average' if name in averages else 'the model'} alone")
    pairs = []
    for name, average in averages.items():
        source = sources[name]
        check_pair(name, average, source)
        averaged = kind(average) != "other" and (average_buffers or isinstance(source, nn.Parameter))
        pairs.append(Pair(average, source, averaged))
    return Matched(pairs, module, model)


def check_pair(name: str, average: Tensor, tensor: Tensor) -> None:
    """ValueError naming a tensor whose average has another shape, or is of another kind."""
    if average.shape != tensor.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but its average has shape {tuple(average.shape)}")
    if kind(average) != kind(tensor):
        raise ValueError(f"{name} is {tensor.dtype}, but its average is {average.dtype}")


def kind(x: Tensor) -> str:
    """Whether a tensor can be averaged, and with which others: "complex", "real" or "other"."""
    return "complex" if x.is_complex() else "real" if x.is_floating_point() else "other"


def converted(module: nn.Module, device: torch.device | str | int | None, dtype: torch.dtype | None) -> nn.Module:
    """The module, moved, its floating-point tensors in a dtype. Tied tensors stay tied."""
    done: dict[int, tuple[Tensor, Tensor]] = {}

    def convert_once(x: Tensor) -> Tensor:
        if id(x) not in done:
            done[id(x)] = (x, x.to(device=device, dtype=dtype if x.is_floating_point() else None))
        return done[id(x)][1]

    return module._apply(convert_once)  # type: ignore[no-untyped-call, no-any-return]


def check_checkpoint(own: dict[str, Any], loaded: dict[str, Any]) -> None:
    """ValueError where weights that are to be loaded are not those of the average."""
    if own.keys() != loaded.keys():
        absent, unexpected = sorted(own.keys() - loaded.keys()), sorted(loaded.keys() - own.keys())
        raise ValueError(
            f"the checkpoint does not fit the model: missing {listed(absent)}, unexpected {listed(unexpected)}"
        )
    for name, value in loaded.items():
        if isinstance(own[name], Tensor) and not isinstance(value, Tensor):
            raise ValueError(f"{name} is no tensor but {value!r}")  # noqa: TRY004
        if isinstance(value, Tensor) and value.shape != own[name].shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}")


def listed(keys: Iterable[Any], most: int = 4) -> str:
    """Some keys, and how many there are beside them."""
    names = list(keys)
    rest = len(names) - most
    return f"[{', '.join(map(repr, names[:most]))}{f', and {rest} more' if rest > 0 else ''}]"
