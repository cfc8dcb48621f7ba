"""AdamW alone: every optimizer's `step()` on the same parameters and gradients."""

import sys
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch

import trainops

from .__main__ import main
from .peers import ADAMW, SETTINGS, Optimizer, compiled_adamw
from .runner import Case, Options, Provider
from .saved import OURS
from .work import STEPS, Expected, Moments, Work, adamw_truth, compilable, expect, model_cases, moments_of

# Read the gradient, read and write the parameter and two moments.
ELEMENTS = 7


def stepping(make: Callable[[Work], Optimizer]) -> Callable[[Work], Provider]:
    """A provider whose work is its optimizer's step."""

    def provider(work: Work) -> Provider:
        optimizer = make(work)
        return Provider({"step": optimizer.step}, lambda: {"params": work.params}, lambda: moments_of(optimizer))

    return provider


def compiled(work: Work) -> Provider:
    """PyTorch's recipe for compiled optimizers."""
    compile_ = compilable(work)
    optimizer = compiled_adamw(work)
    step = compile_(lambda: optimizer.step(), fullgraph=False)
    return Provider({"step": step}, lambda: {"params": work.params}, lambda: moments_of(optimizer))


class AdamWork(Work):
    """New gradients before each step."""

    makers: ClassVar = {
        **{name: stepping(make) for name, make in ADAMW.items()},
        "torch compiled": compiled,
        OURS: stepping(lambda work: trainops.AdamW(work.params, **SETTINGS)),
    }

    def truth(self) -> dict[str, Expected]:
        """The paper's formulas."""
        param = self.start.double().clone()
        moments = Moments(torch.zeros_like(param), torch.zeros_like(param))
        for step in range(STEPS):
            adamw_truth(param, self.tiles[step].double(), moments, step + 1)
        return {"params": expect(param, self.start.double())}


def cases(options: Options) -> Iterator[Case]:
    """Models, in both dtypes."""
    yield from model_cases("adamw", AdamWork, ELEMENTS, 18, options)


def test_adamw(measured) -> None:
    """Under pytest-benchmark."""


if __name__ == "__main__":
    sys.exit(main(["--ops", "adamw", *sys.argv[1:]]))
