"""The averages of an optimizer within one of its steps."""

from collections.abc import Collection, Iterable, Sequence
from itertools import chain, permutations
from typing import Any

import torch
from torch import Tensor

from .adapters import TO_NEAREST, Rounding, Seeds
from .adapters.interface import AVERAGES, Collected
from .ema import EMA
from .model_pairs import Matched
from .reference_rounding import seed_word


def as_averages(ema: Any) -> tuple[EMA, ...]:
    """What is given as ``ema``: one average, several, or None.

    Raises:
        TypeError: it is something else.
        ValueError: an average is there twice.
    """
    if ema is None or isinstance(ema, EMA):
        return () if ema is None else (ema,)
    averages = tuple(ema) if isinstance(ema, (list, tuple)) else (ema,)
    if wrong := [type(x).__name__ for x in averages if not isinstance(x, EMA)]:
        raise TypeError(f"ema must be a trainops.EMA or a list of them, got {wrong[0]}")
    if len(set(map(id, averages))) < len(averages):
        raise ValueError("ema has an average twice")
    return averages


class StepAverages:
    """What a step does with averages: kernels move some tensors of some of them, and the rest is moved after it.

    Attributes:
        decays: of those averages that kernels move, as are the other two.
        params: their averages of parameters, by the ``id`` of the parameter.
        buffers: their other pairs, which kernels may move in the same launch; empty if there are none.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, averages: Iterable[EMA]) -> None:
        """Plan the updates. Changes nothing. Raises what :meth:`EMA.plan_update` does."""
        self._planned = [(ema, ema.plan_update(optimizer)) for ema in averages]
        self._fused: dict[int, Matched] = {}  # by the average's place among all
        self.decays: list[float] = []
        self._seeds: list[int | None] = []
        for place, (_, update) in enumerate(self._planned):
            if update.decay is not None and len(self._fused) < len(AVERAGES):
                self._fused[place] = update.matched
                self.decays.append(update.decay)
                self._seeds.append(update.seed)
        self.params = [matched.fusable for matched in self._fused.values()]
        self.buffers = [matched.buffers for matched in self._fused.values()]
        if not any(self.buffers) or self._follow_each_other():
            self.buffers = []

    def _follow_each_other(self) -> bool:
        """Whether an average has buffers that another one writes, and so comes after it."""
        every = [update.matched for _, update in self._planned]
        return any(not a.of_buffers.isdisjoint(b.written) for a, b in permutations(every, 2))

    def rounding(self, seed: int | None, params: bool, codes: bool) -> Rounding:
        """What the step rounds stochastically: of averages and, by a ``seed``, of parameters and 8-bit state."""
        if seed is None and all(x is None for x in self._seeds):
            return TO_NEAREST
        pairs = zip(self._seeds, self._fused.values(), strict=True)
        places: list[dict[int, int]] = [{} if x is None else matched.places for x, matched in pairs]
        seeds = Seeds(0 if seed is None else seed_word(seed), tuple(x or 0 for x in self._seeds))
        return Rounding(params, places, seeds, codes)

    def tensors(self) -> list[Tensor]:
        """The averages that kernels may write."""
        found = list(chain.from_iterable(its.values() for its in self.params))
        return found + [pair.average for pairs in self.buffers for pair in pairs]

    def collected(self, rows: Collected) -> list[Collection[int]]:
        """Of each average, the ids of what it follows in these rows: kernels will move that.

        Raises:
            ValueError: the rest of an average does not fit its model. Nothing has been changed.
        """
        if rows.averaged == list(map(len, self.params)) and not any(rows.left):
            done = self._nothing()
            for place, matched in self._fused.items():
                done[place] = matched.in_step if self.buffers else matched.fusable.keys()
            return done
        return self._checked(rows.params, rows.left)

    def gathered(self, params: Sequence[Tensor]) -> list[Collection[int]]:
        """The same where a step gathers lists of parameters, and no buffers."""
        self.buffers = []
        return self._checked(params, [])

    def _checked(self, params: Sequence[Tensor], left: Sequence[Collection[int]]) -> list[Collection[int]]:
        ids, done = set(map(id, params)), self._nothing()
        for i, (place, matched) in enumerate(self._fused.items()):
            buffers = matched.of_buffers.difference(left[i]) if self.buffers else ()
            done[place] = (matched.fusable.keys() & ids).union(buffers)
        for (ema, _), its in zip(self._planned, done, strict=True):
            ema.check_rest(its)
        return done

    def _nothing(self) -> list[Collection[int]]:
        return [()] * len(self._planned)

    def finish(self, done: Sequence[Collection[int]], skipped: Tensor | None) -> None:
        """Count the updates, and move what kernels have not; nothing is ``done`` if it is empty."""
        for (ema, update), its in zip(self._planned, done or self._nothing(), strict=True):
            ema.finish_update(update, its, skipped)

    def check_models(self) -> None:
        """After an error: raises a better one where an average does not fit its model."""
        for ema, _ in self._planned:
            ema.check_model()
