"""The averaged weights in the model, for an evaluation or for good."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from . import advice
from .ema_holder import HasOptimizer
from .ema_shards import check_reachable, listed, reshard
from .model_match import match
from .model_pairs import Matched, Pair, Replaced, check_pair
from .model_slots import write_into
from .wrappers import innermost, is_same_model


class LendsWeights(HasOptimizer):
    """An average whose weights can take the place of the model's own."""

    _own_weights: list[tuple[Tensor, Tensor]] | None = None  # the model's, while it has the averaged ones
    _stored: list[Tensor] | None = None

    def check_model(self) -> Matched:
        """Look at every tensor of the model anew; ValueError naming the first that its average does not match."""
        raise NotImplementedError

    def _match(self) -> Matched:
        """Pair every tensor of the model with its average, again if one was replaced."""
        raise NotImplementedError

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within the ``with`` block, the model has the averaged weights; afterwards its own again, bit for bit.

        The model's tensors stay where they are; their values are exchanged, and what is written into them within the
        block is lost. (``model.state_dict()`` shares them: copy what is to be kept.) Needs memory for one more copy
        of the model meanwhile. A copy of the model that is made within the block has the averaged weights; a copy or
        pickle of the ``EMA`` has the model's own, and is not swapped.

        Of a model of FSDP2, the shards are exchanged, and what is gathered of them is freed, before and afterwards:
        every forward pass gathers the weights that the model has then.

        Raises:
            RuntimeError: already swapped, or the average follows a list of DTensors, of which FSDP may hold copies.
        """
        self._check_not_swapped("swap()")
        check_reachable(self.model)
        advice.average_used(self)
        self.synchronize()
        pairs = self.check_model().pairs
        self._be_the_model()
        saved = [pair.source.detach().clone() for pair in pairs]
        self._own_weights = [(pair.source, weight) for pair, weight in zip(pairs, saved, strict=True)]
        try:
            with torch.no_grad():
                for pair in pairs:
                    write_into(pair.source, pair.average)
            yield
        finally:
            self._own_weights = None
            changed = self._give_back(pairs, saved)
            self._model_written()
        if changed is not None:  # and the block has raised nothing, which would say more
            raise changed

    @torch.no_grad()
    def _give_back(self, before: list[Pair], own: list[Tensor]) -> ValueError | None:
        """Copy the model's own weights into the tensors that it has now. Returns an error if some do not fit."""
        changed: ValueError | None = None
        try:
            pairs = self.check_model().pairs
        except ValueError as error:
            pairs, changed = before, error
        for pair, weight in zip(pairs, own, strict=True):
            if pair.source.shape == weight.shape:
                write_into(pair.source, weight)
        return changed

    @torch.no_grad()
    def copy_to(self, model: nn.Module | Iterable[Tensor] | None = None) -> None:
        """Copy the averaged weights and buffers into a model, or averaged parameters into parameters.

        Args:
            model: a model of the same weights, or parameters in the order of ``model.parameters()``, as diffusers'
                ``EMAModel`` takes them; default: the model that the average follows.

        Raises:
            ValueError: it has other weights than the average, or is sharded otherwise (see
                :meth:`full_state_dict`). Nothing has been changed.
            RuntimeError: the parameters are copies that FSDP has gathered.
        """
        model = self.model if model is None else model
        check_reachable(self.model)
        model = model if isinstance(model, nn.Module) else listed(model, self.model)
        self._follow_shards()
        replaced: list[Replaced] = []
        if isinstance(model, nn.Module):
            reshard(model)
            follows = is_same_model(model, self.model)
            module, model = (innermost(self.module), innermost(model)) if not follows else (self.module, self.model)
            matched = match(module, model, self.policy, follows=follows)
            pairs = [(x.average, x.source) for x in matched.pairs if x.average is not x.source]
            replaced = matched.replaced
        else:
            pairs = _in_order(list(self.module.parameters()), model)
        advice.average_used(self)
        self._be_the_model()
        for average, target in pairs:
            write_into(target, average)
        for _, tensor, _, slots_of_model in replaced:
            if tensor is not None:
                copied = self.policy.copy_of(tensor)
                for slot in slots_of_model:
                    slot.container[slot.key] = copied
        own = set(map(id, self.model.parameters()))
        if any(id(target) in own for _, target in pairs):
            self._model_written()

    @torch.no_grad()
    def store(self, parameters: nn.Module | Iterable[Tensor] | None = None) -> None:
        """Keep weights in the host's memory until :meth:`restore`, as diffusers' ``EMAModel`` does.

        ``store()``, ``copy_to()``, an evaluation and ``restore()`` do what :meth:`swap` does, which also works where
        the evaluation raises.

        Args:
            parameters: parameters, or a model with its buffers; default: the model that the average follows.

        Raises:
            RuntimeError: called inside :meth:`swap`, where the model has the averaged weights.
        """
        self._check_not_swapped("store()")
        check_reachable(self.model)
        self._stored = [x.detach().to("cpu", copy=True) for x in self._tensors(parameters)]

    @torch.no_grad()
    def restore(self, parameters: nn.Module | Iterable[Tensor] | None = None) -> None:
        """Copy back what :meth:`store` has kept, and forget it.

        Args:
            parameters: as for :meth:`store`.

        Raises:
            RuntimeError: there is nothing stored, or called inside :meth:`swap`.
            ValueError: these are other weights than those that were stored. Nothing has been changed.
        """
        self._check_not_swapped("restore()")
        if self._stored is None:
            raise RuntimeError("restore() without store(): there are no weights to copy back")
        pairs = _in_order(self._stored, self._tensors(parameters), "what was stored")
        for stored, target in pairs:
            write_into(target, stored)
        self._stored = None
        self._model_written()

    def _tensors(self, parameters: nn.Module | Iterable[Tensor] | None) -> list[Tensor]:
        """The tensors that store() and restore() are about."""
        parameters = self.model if parameters is None else parameters
        if isinstance(parameters, nn.Module):
            reshard(parameters)
            return [*parameters.parameters(), *parameters.buffers()]
        return listed(parameters, self.model)

    def _model_written(self) -> None:
        """The average itself has written its model's weights, which is no training, and sets no average back."""
        holder: Any = self.optimizer
        for ema in (self,) if holder is None else holder.averages:
            ema._overlook(None if ema._last_source is None or ema._set_back is not None else ema._last_source[0])

    @torch.no_grad()
    def _be_the_model(self) -> None:
        """Before its first update, take over the weights that the model has now, unless others have written some."""
        self._look_back()
        self._follow_shards()
        if self._has_moved or self._own_weights is not None or self._was_written():
            return
        try:
            matched = self.check_model()
        except ValueError:  # who uses the average needs no model
            return
        self._settle(matched)
        for pair in matched.pairs:
            pair.average.copy_(pair.source)
        self._remember_weights()

    def _follow_shards(self) -> None:
        """Let the average lie as its model does by now. Who uses the average needs no model."""
        if "torch.distributed.tensor" in sys.modules:
            with suppress(ValueError):
                self._match()

    def _check_not_swapped(self, what: str) -> None:
        if self._own_weights is not None:
            raise RuntimeError(f"{what} inside `with ema.swap()`: the model holds the averaged weights")


def _in_order(own: list[Tensor], others: Iterable[Tensor], what: str = "the average") -> list[tuple[Tensor, Tensor]]:
    """Each tensor with that at the same place of another list; ValueError where the lists do not fit."""
    others = list(others)
    if len(own) != len(others):
        raise ValueError(f"there are {len(others)} tensors, but {what} has {len(own)}")
    for i, (mine, other) in enumerate(zip(own, others, strict=True)):
        if not isinstance(other, Tensor):
            raise TypeError(f"parameters must be tensors, got {type(other).__name__}")
        if mine.shape != other.shape:
            raise ValueError(f"tensor {i} has shape {tuple(other.shape)}, but in {what} {tuple(mine.shape)}")
        check_pair(f"tensor {i}", mine, other)
    return list(zip(own, others, strict=True))
