"""Clipping by the norm of all gradients together, in place: what `torch.nn.utils.clip_grad_norm_` does."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import trainops

from .__main__ import main
from .peers import compilable
from .runner import Case, Options, Provider
from .saved import OURS
from .work import MAX_NORM, STEPS, Work, clip_coefficient, model_cases

# Read the gradients for their norm; read and write them.
ELEMENTS = 3


class ClipWork(Work):
    """Every call clips: its limit is below the last one's, as gradients that were clipped already are left alone."""

    limit = MAX_NORM
    slack = 256.0  # all take the error of the norm, which PyTorch sums in float32: 9e-4 at 39 million elements

    def next_limit(self) -> float:
        """The limit of the next call."""
        self.limit *= 0.999
        return self.limit

    def admit(self, name: str) -> tuple[Provider, float]:
        """Begin with the same limit."""
        self.limit = MAX_NORM
        return super().admit(name)

    def truth(self) -> dict[str, Tensor]:
        """The last step's norm and gradients."""
        self.prepare(STEPS - 1)
        norm, coefficient = clip_coefficient(self.grads(), MAX_NORM * 0.999**STEPS)
        return {"grads": coefficient * self.tiles[-1].double(), "norm": norm}


def clipping(clip: Callable[..., Tensor], **options: Any) -> Callable[[Work], Provider]:
    """A provider that calls a function of this name and these arguments."""

    def provider(work: ClipWork) -> Provider:
        norms: list[Tensor] = []

        def step() -> None:
            norms[:] = [clip(work.params, work.next_limit(), **options)]

        return Provider({"step": step}, lambda: {"grads": work.grads(), "norm": norms[0]})

    return provider


def compiled(work: ClipWork) -> Provider:
    """The whole function compiled; the limit is a tensor, lest it be compiled into the code."""
    compile_ = compilable(work)
    clip = compile_(lambda params, limit: torch.nn.utils.clip_grad_norm_(params, limit, foreach=True))
    return clipping(lambda params, limit: clip(params, torch.tensor(limit, device=work.device)))(work)


ClipWork.makers = {
    "torch loop": clipping(torch.nn.utils.clip_grad_norm_, foreach=False),
    "torch foreach": clipping(torch.nn.utils.clip_grad_norm_, foreach=True),
    "torch compiled": compiled,
    OURS: clipping(trainops.clip_grad_norm_),
}


def cases(options: Options) -> Iterator[Case]:
    """Models, in both dtypes."""
    yield from model_cases("clip_grad_norm", ClipWork, ELEMENTS, 3, options)


def test_clip_grad_norm(benchmark, admitted) -> None:
    """Under pytest-benchmark."""
    benchmark(admitted.step)


if __name__ == "__main__":
    sys.exit(main(["--ops", "clip_grad_norm", *sys.argv[1:]]))
