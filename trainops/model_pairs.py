"""Tensors of a model with their averages, and whether both modules still hold the same ones."""

import operator
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .ema_shards import described_layout, layout, refuse_forward
from .model_slots import Slot
from .plain import all_plain
from .storage import kind


class Pair(NamedTuple):
    """A tensor of the model and its average."""

    average: Tensor
    source: Tensor
    averaged: bool  # else it is copied
    place: int  # among the tensors of the model


class Replaced(NamedTuple):
    """A tensor that is copied as a whole, because nothing can be written into it, such as one of a sparse layout."""

    source: Tensor
    average: Tensor | None
    slots: list[Slot]  # of the averaged module
    slots_of_model: list[Slot]


class Change(NamedTuple):
    """What a slot of the averaged module is to hold; with ``gone``, there will be no such slot."""

    slot: Slot
    tensor: Tensor | None
    persistent: bool = True  # of a new buffer
    gone: bool = False


class Found:
    """What there is to pair in two modules."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        self.replaced: list[Replaced] = []
        self.changes: list[Change] = []
        self.placed: list[Change] = []  # averages as they lie now: as shards, or with memory
        self.frozen: list[Tensor] = []  # parameters that are shared as long as they are frozen
        self.begun: set[str] = set()  # names of parameters that will be shared no longer
        self.unseen: list[Slot] = []  # their tensors do not matter


class Pairs:
    """Pairs of tensors, by what an update does with them."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        self.averages = [pair.average for pair in pairs if pair.averaged]
        self.sources = [pair.source for pair in pairs if pair.averaged]
        self.average_places = [pair.place for pair in pairs if pair.averaged]
        self.copied = [pair for pair in pairs if not pair.averaged]

    def without(self, done: Collection[int]) -> "Pairs":
        """The pairs whose source is not ``done``, by ``id``."""
        return Pairs([pair for pair in self.pairs if id(pair.source) not in done])


class Matched(Pairs):
    """All pairs of a model and its average, and everything that both modules held when they were paired."""

    def __init__(self, found: Found, module: nn.Module, model: nn.Module) -> None:
        super().__init__(found.pairs)
        self.replaced, self.placed = found.replaced, found.placed
        self._changes, self._frozen, self._begun = found.changes, found.frozen, found.begun
        on_device = [pair for pair in self.pairs if pair.average.device == pair.source.device]
        # What a step's kernels can move: parameters with a gradient, by ``id``, and buffers.
        of_params = [pair for pair in on_device if isinstance(pair.source, nn.Parameter)]
        self.fusable = {id(pair.source): pair.average for pair in of_params if pair.averaged}
        self.buffers = [x for x in on_device if not isinstance(x.source, nn.Parameter) and _is_memory(x)]
        self.of_buffers = frozenset(id(pair.source) for pair in self.buffers)
        self.places = {id(pair.source): pair.place for pair in self.pairs}
        self.in_step = self.of_buffers.union(self.fusable)
        self.written = frozenset(id(pair.average) for pair in self.pairs)
        self.devices = list(dict.fromkeys(x.device for x in self.averages))
        self.waits = any(x.source.is_cuda and x.average.device.type == "cpu" for x in self.pairs)
        self._others = [pair for pair in self.pairs if id(pair.source) not in self.fusable]
        modules = [m for root in (module, model) for m in root.modules()]
        self._containers: list[dict[str, Any]] = [x for m in modules for x in (m._parameters, m._buffers, m._modules)]
        self._size = sum(map(len, self._containers))
        unseen = {(id(slot.container), slot.key) for slot in _unseen(found)}
        seen = [(x, key) for x in self._containers for key in x if (id(x), key) not in unseen]
        self._owners, self._keys = [x for x, _ in seen], [key for _, key in seen]
        self._values = [x[key] for x, key in seen]

    def is_current(self) -> bool:
        """Whether both modules still hold the same tensors and modules in the same places, and no others.

        Kernels look at what an optimizer can update; the other pairs are looked at here.
        """
        same = all(map(operator.is_, map(dict.get, self._owners, self._keys), self._values))
        return (
            same
            and sum(map(len, self._containers)) == self._size
            and all(map(_fits, self._others))
            and not self._changes
            and not (self._frozen and any(x.requires_grad for x in self._frozen))
        )

    def fits_without(self, done: Collection[int]) -> bool:
        """Whether the pairs that are not ``done``, by ``id`` of the source, are still such that they can be moved."""
        return all(_fits(pair) for pair in self.pairs if id(pair.source) not in done)

    def place(self) -> None:
        """Let the averaged module hold averages that lie as the tensors of the model do. Then match anew."""
        for slot, tensor, *_ in self.placed:
            old, slot.container[slot.key] = slot.container[slot.key], tensor
            if tensor is not None and old is not None and layout(tensor) is not None and layout(old) is None:
                refuse_forward(slot.owner)

    def settle(self, shared: set[str]) -> bool:
        """Let the averaged module hold what it was paired for; whether that is anything new.

        ``shared``: names of the parameters that it shares.
        """
        for slot, tensor, persistent, gone in self._changes:
            if gone:
                del slot.container[slot.key]
                slot.owner._non_persistent_buffers_set.discard(slot.key)
                continue
            if slot.key not in slot.container and not persistent:
                slot.owner._non_persistent_buffers_set.add(slot.key)
            slot.container[slot.key] = tensor
        shared -= self._begun
        return bool(self._changes)


def _unseen(found: Found) -> Iterable[Slot]:
    """Slots whose tensors may change without a need to look at the modules anew."""
    return [*found.unseen, *(slot for x in found.replaced for slot in x.slots)]


def _is_memory(pair: Pair) -> bool:
    """Whether kernels can move an average, or copy its bits: as far as can be told before a step."""
    average, source, averaged, _ = pair
    if not all_plain((average, source)) or source.is_complex():
        return False
    return kind(average) == kind(source) == "real" if averaged else average.dtype == source.dtype


def _fits(pair: Pair) -> bool:
    average, source, averaged, _ = pair
    return average.shape == source.shape and (not averaged or kind(average) == kind(source) != "other")


def check_pair(name: str, average: Tensor, tensor: Tensor, advice: str = "") -> None:
    """ValueError naming a tensor whose average has another shape, or is of another kind."""
    if average.shape != tensor.shape:
        shapes = f"shape {tuple(tensor.shape)}, but its average has shape {tuple(average.shape)}"
        raise ValueError(f"{name} has {shapes}{advice}")
    if (average.device.type == "meta") != (tensor.device.type == "meta"):
        raise ValueError(f"{name} is on {tensor.device}, but its average on {average.device}")
    if layout(average) != layout(tensor):
        raise ValueError(f"{name} is {described_layout(tensor)}, but its average is {described_layout(average)}")
    if kind(average) != kind(tensor):
        raise ValueError(f"{name} is {tensor.dtype}, but its average is {average.dtype}{advice}")
