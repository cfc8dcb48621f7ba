"""Pairs the tensors of a model with those of its average, by name, and says what the average has to take over."""

from typing import Any

import torch
from torch import Tensor, nn

from .ema_policy import AveragePolicy, can_average, is_dense
from .ema_shards import fsdp_modules, layout, placed_as, reshard
from .model_pairs import Change, Found, Matched, Pair, Replaced, check_pair
from .model_slots import Slot, moved, names_by_id, slots
from .plain import all_plain
from .storage import kind


def match(module: nn.Module, model: nn.Module, policy: AveragePolicy, follows: bool = True) -> Matched:
    """Pairs every tensor of ``model`` with that of ``module``. Changes neither.

    Args:
        module: the averaged module.
        model: the model that it follows, or another one that is to be written.
        policy: what is averaged.
        follows: whether ``module`` follows ``model``: it then shares parameters that are left out, and takes over
            which buffers there are.

    Raises:
        ValueError: a tensor does not match. The message names it.
    """
    return Matched(_Matcher(module, model, policy, follows).found, module, model)


def given_module(module: Any, model: nn.Module, policy: AveragePolicy) -> nn.Module:
    """A module that the user has made for the average, in eval mode, without gradients.

    Raises:
        TypeError: it is no module.
        ValueError: it does not match, or shares parameters with the model, or is asked to. Nothing has been changed.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not set(map(id, module.parameters())).isdisjoint(map(id, model.parameters())):
        raise ValueError("module has parameters of the model itself: give it parameters of its own")
    if policy.trainable_only or policy.include is not None or policy.exclude:
        raise ValueError("trainable_only, include and exclude share parameters with the model: `module` shares none")
    reshard(module, model)
    match(module, model, policy)
    return moved(module.eval().requires_grad_(False), policy)


class _Matcher:
    def __init__(self, module: nn.Module, model: nn.Module, policy: AveragePolicy, follows: bool) -> None:
        self.module, self.policy, self.follows, self.found = module, policy, follows, Found()
        self.own, self.theirs = slots(module), slots(model)
        first = {names[0] for names in names_by_id(self.own).values()}  # tied tensors come once
        self.averages = {name: self.own[name][1] for name in first}
        self.may_place = follows and not fsdp_modules(module)  # those keep their parameters themselves
        self.by_source: dict[int, Tensor] = {}  # averages by ``id`` of their source
        self.settled: set[str] = set()
        order = list(names_by_id(self.theirs).values())
        self.places = {names[0]: place for place, names in enumerate(order)}
        for names in order:
            source = self.theirs[names[0]][1]
            if isinstance(source, nn.Parameter):
                self._parameter(names, source)
            elif source is not None:
                self._buffer(names, source)
        for name in self.own:
            if name in first and name not in self.settled:
                self._lost(name)

    def _parameter(self, names: list[str], source: Tensor) -> None:
        name, average = names[0], self.averages.get(names[0])
        if self.follows and name in self.policy.shared:
            if self.policy.is_shared(names, source):
                self._share(names, source)
                return
            average = None  # it was the model's own
            self.found.begun.add(name)
        elif average is None:
            raise ValueError(f"{name} is in the model alone")
        else:
            average = self._placed(names, average, source)
            check_pair(name, average, source)
        if can_average(source if average is None else average, source):
            self._pair(names, average, source, averaged=True)
        elif source.requires_grad:
            raise ValueError(f"{name} is {_described(source)}, of which there is no average: exclude it")
        else:
            self._copy(names, average, source)

    def _buffer(self, names: list[str], source: Tensor) -> None:
        name, average = names[0], self.averages.get(names[0])
        use = self.policy.use_of_buffer(name) if self.follows else "copy"
        if use == "leave":
            self.found.unseen += [places[x][0] for places in (self.own, self.theirs) for x in names if x in places]
            self.settled.update(names)
            return
        if average is None and not self.follows:
            raise ValueError(f"{name} is in the model alone")
        if average is not None:
            average = self._placed(names, average, source)
        if average is not None and is_dense(average) and is_dense(source):
            if use == "average" and not (kind(average) == kind(source) == "other"):
                check_pair(name, average, source, f'. Write average_buffers={{"{name}": "copy"}} if it may change')
            elif not self.follows:
                check_pair(name, average, source)
        if use == "average" and can_average(source if average is None else average, source):
            self._pair(names, average, source, averaged=True)
        else:
            self._copy(names, average, source)

    def _copy(self, names: list[str], average: Tensor | None, source: Tensor) -> None:
        """Let the source be copied: into its average, where that can be."""
        if is_dense(source) and (average is None or is_dense(average)):
            if average is not None and _form(average) != _form(source):
                average = None
            self._pair(names, average, source, averaged=False)
            return
        self._new(names[0], source)  # raises where there is no copy
        places = [self._slot(x) for x in names]
        self.found.replaced.append(Replaced(source, average, places, [self.theirs[x][0] for x in names]))
        self.settled.update(names)

    def _placed(self, names: list[str], average: Tensor, source: Tensor) -> Tensor:
        """The average as its source lies by now: on this rank's shards; with memory, after initialisation on meta."""
        if not self.may_place or (type(average) is type(source) and average.is_meta == source.is_meta):
            return average
        stays_meta = self.policy.device is not None and self.policy.device.type == "meta"
        is_filled = average.is_meta and not source.is_meta and not stays_meta
        placed = self.policy.new(source) if is_filled else placed_as(average, source)
        if placed is not average:
            self.found.placed += [Change(self.own[name][0], placed) for name in names if name in self.own]
        return placed

    def _pair(self, names: list[str], average: Tensor | None, source: Tensor, averaged: bool) -> None:
        """Pair a source with its average, which is made if there is none."""
        if average is None:
            average = self._new(names[0], source)
            for name in names:
                owner, kind, key = self.theirs[name][0]
                persistent = kind == "_parameters" or key not in owner._non_persistent_buffers_set
                self.found.changes.append(Change(self._slot(name), average, persistent))
            self.settled.update(names)
            averaged = False  # it begins as a copy
        elif self.follows:
            _check_writable(names[0], average)
        self.settled.add(names[0])
        self.by_source[id(source)] = average
        self.found.pairs.append(Pair(average, source, averaged, self.places[names[0]]))

    def _share(self, names: list[str], source: Tensor) -> None:
        for name in names:
            if (slot := self._slot(name)).container.get(slot.key) is not source:
                self.found.changes.append(Change(slot, source))
        self.settled.update(names)
        if not source.requires_grad:
            self.found.frozen.append(source)

    def _lost(self, name: str) -> None:
        """The average has a tensor of a name that the model does not have, or under which another one is there."""
        slot = self.own[name][0]
        if slot.kind == "_parameters" or not self.follows:
            raise ValueError(f"{name} is in the average alone")
        if self.policy.use_of_buffer(name) == "leave":
            return
        _, tied = self.theirs.get(name, (None, None))
        if tied is None:
            self.found.changes.append(Change(slot, None, gone=name not in self.theirs))
        elif (average := self.by_source.get(id(tied))) is not None:
            self.found.changes.append(Change(slot, average))

    def _slot(self, name: str) -> Slot:
        """The slot of the averaged module that has a name, or would have it."""
        if name in self.own:
            return self.own[name][0]
        path, _, key = name.rpartition(".")
        try:
            return Slot(self.module.get_submodule(path), self.theirs[name][0].kind, key)
        except AttributeError:
            raise ValueError(f"{name} is in the model alone") from None

    def _new(self, name: str, source: Tensor) -> Tensor:
        try:
            return self.policy.new(source)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            what = f"{name} is {_described(source)}, which can be neither averaged nor copied"
            raise ValueError(f'{what}: write average_buffers={{"{name}": "leave"}}') from error


def _check_writable(name: str, average: Tensor) -> None:
    """ValueError where an average was replaced by a tensor that no update can write in place."""
    if average.is_inference():
        raise ValueError(f"the average of {name} was made in inference mode: load it outside of that")
    if is_dense(average) and torch._debug_has_internal_overlap(average) == 1:
        raise ValueError(f"elements of the average of {name} share memory, as those of an expanded tensor do")


def _form(x: Tensor) -> tuple[Any, ...]:
    return x.shape, kind(x), layout(x)


def _described(x: Tensor) -> str:
    name = "" if all_plain([x]) else f"{type(x).__name__} of "
    return f"{name}{x.dtype}" + ("" if x.layout is torch.strided else f" in {x.layout}")
