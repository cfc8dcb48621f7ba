"""The whole tail of a step with Adam: clip by the norm, Adam, average."""

import sys
from collections.abc import Iterator
from typing import ClassVar

import torch

import trainops

from .__main__ import main
from .bench_step import StepWork, fused, of_torch
from .runner import Case, Options
from .saved import OURS
from .work import ADAM_EPS, BETAS, LR, WEIGHT_DECAY, adam_truth, model_cases

# Norm: read the gradient. Adam: read the gradient, read and write the parameter and two moments. Average: read and
# write it; the parameter is in registers.
ELEMENTS = 1 + 7 + 2

SETTINGS = {"lr": LR, "betas": BETAS, "eps": ADAM_EPS, "weight_decay": WEIGHT_DECAY}


class AdamWork(StepWork):
    """New gradients before each step."""

    makers: ClassVar = {
        **of_torch(torch.optim.Adam, **SETTINGS),
        OURS: fused(trainops.Adam, **SETTINGS),
    }
    formula = staticmethod(adam_truth)


def cases(options: Options) -> Iterator[Case]:
    """Models, in both dtypes."""
    yield from model_cases("adam", AdamWork, ELEMENTS, 22, options)


def test_adam(measured) -> None:
    """Under pytest-benchmark."""


if __name__ == "__main__":
    sys.exit(main(["--ops", "adam", *sys.argv[1:]]))
