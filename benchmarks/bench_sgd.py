"""The whole tail of a step with SGD: clip by the norm, SGD with momentum, average."""

import sys
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch

import trainops

from .__main__ import main
from .bench_step import StepWork, fused, of_torch
from .runner import Case, NotHere, Options, Provider
from .saved import OURS
from .work import LR, MOMENTUM, WEIGHT_DECAY, Work, model_cases, sgd_truth

# Norm: read the gradient. SGD: read the gradient, read and write the parameter and the buffer. Average: read and
# write it; the parameter is in registers.
ELEMENTS = 1 + 5 + 2

SETTINGS = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
BY_TORCH = of_torch(torch.optim.SGD, **SETTINGS)


def rightly_fused(name: str) -> Callable[[Work], Provider]:
    """A way with PyTorch's fused step, where that gives the right numbers."""

    def provider(work: Work) -> Provider:
        if work.device == "cpu" and work.dtype != torch.float32:
            raise NotHere("PyTorch's fused SGD with momentum gives wrong numbers in 16 bits on a CPU")
        return BY_TORCH[name](work)

    return provider


class SGDWork(StepWork):
    """New gradients before each step."""

    makers: ClassVar = {
        **BY_TORCH,
        **{name: rightly_fused(name) for name in BY_TORCH if "fused" in name},
        OURS: fused(trainops.SGD, **SETTINGS),
    }
    formula = staticmethod(sgd_truth)


def cases(options: Options) -> Iterator[Case]:
    """Models, in both dtypes."""
    yield from model_cases("sgd", SGDWork, ELEMENTS, 18, options)


def test_sgd(measured) -> None:
    """Under pytest-benchmark."""


if __name__ == "__main__":
    sys.exit(main(["--ops", "sgd", *sys.argv[1:]]))
