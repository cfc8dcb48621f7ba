"""Clipping by the norm of all gradients together, in place: what `torch.nn.utils.clip_grad_norm_` does."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import trainops

from .__main__ import main
from .runner import Case, Options, Provider
from .saved import OURS
from .work import Expected, Work, clip_coefficient, compilable, expect, model_cases

# Read the gradients for their norm; read and write them.
ELEMENTS = 3


class ClipWork(Work):
    """Before each call, gradients of more than the limit: those that were clipped already are left alone."""

    clips = True

    def prepare(self, step: int = 0) -> None:
        """The first step's gradients, each time."""
        self.set_grads(self.tiles[0])

    def truth(self) -> dict[str, Expected]:
        """The norm, and the clipped gradients."""
        self.prepare()
        norm, coefficient = clip_coefficient(self.grads(), self.max_norm)
        grads = self.tiles[0].double()
        return {"grads": expect(coefficient * grads, grads), "norm": expect(norm)}


def clipping(clip: Callable[..., Tensor], **options: Any) -> Callable[[ClipWork], Provider]:
    """A provider that calls a function of this name and these arguments."""

    def provider(work: ClipWork) -> Provider:
        norms: list[Tensor] = []

        def step() -> None:
            norms[:] = [clip(work.params, work.max_norm, **options)]

        return Provider({"step": step}, lambda: {"grads": work.grads(), "norm": norms[0]})

    return provider


def compiled(work: ClipWork) -> Provider:
    """The whole function compiled."""
    return clipping(compilable(work)(torch.nn.utils.clip_grad_norm_), foreach=True)(work)


ClipWork.makers = {
    "torch loop": clipping(torch.nn.utils.clip_grad_norm_, foreach=False),
    "torch foreach": clipping(torch.nn.utils.clip_grad_norm_, foreach=True),
    "torch compiled": compiled,
    OURS: clipping(trainops.clip_grad_norm_),
}


def cases(options: Options) -> Iterator[Case]:
    """Models, in both dtypes."""
    yield from model_cases("clip_grad_norm", ClipWork, ELEMENTS, 3, options)


def test_clip_grad_norm(measured) -> None:
    """Under pytest-benchmark."""


if __name__ == "__main__":
    sys.exit(main(["--ops", "clip_grad_norm", *sys.argv[1:]]))
