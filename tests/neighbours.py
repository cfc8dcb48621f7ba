"""Stochastic rounding: what a stored number may be, and wrong rounding that checks have to notice."""

import numpy as np
import pytest
import torch
from contract import TOLERANCES, exact, ulp

from trainops import reference_rounding, reference_storage

BFLOAT16 = torch.bfloat16
SHAPES = ((), (0,), (7,), (33, 31), (3, 4099))


def drawn(shapes=SHAPES, seed=0, dtype=BFLOAT16):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def assert_neighbour(ours, true, what):
    """A stored number is one of the two neighbours of the exact one, give or take what arithmetic loses before."""
    value, slack = true.value, TOLERANCES[BFLOAT16].terms * true.terms
    got, unit = exact(ours), ulp(value, BFLOAT16)
    low, high = np.floor((value - slack) / unit) * unit, np.ceil((value + slack) / unit) * unit
    assert ((low <= got) & (got <= high)).all(), what


class Directions:
    """How often rounding goes away from zero, and how often towards it."""

    def __init__(self):
        self.away = self.towards = 0

    def add(self, ours, true):
        difference = np.abs(exact(ours)) - np.abs(true.value)
        self.away, self.towards = self.away + (difference > 0).sum(), self.towards + (difference < 0).sum()

    def assert_alike(self):
        assert min(self.away, self.towards) > 0.45 * (self.away + self.towards) > 0


class WrongRounding:
    """The specification with another rounding, as a context."""

    def __init__(self, wrong):
        self.wrong, self.context = wrong, pytest.MonkeyPatch()

    def __enter__(self):
        self.context.setattr(reference_storage, "rounded_stochastically", self.wrong)

    def __exit__(self, *_):
        self.context.undo()


def two_units_up(x, random):
    return (reference_rounding.rounded_stochastically(x, random).view(torch.int16) + 1).view(BFLOAT16)


def truncated(x, _):
    return (x.view(torch.int32) >> 16).to(torch.int16).view(BFLOAT16)


def to_nearest(x, _):
    return x.to(BFLOAT16)


def same_in_each_step(x, random):
    return reference_rounding.rounded_stochastically(x, random._replace(key=random.key * 0 + 7))
