"""The average of a model's parameters alone: one update."""

import sys
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import trainops

from .__main__ import main
from .peers import timm_module
from .runner import Case, Options, Provider, Step
from .saved import OURS
from .work import DECAY, Expected, Work, compilable, expect, model_cases, spread

# Read the parameter; read and write the average.
ELEMENTS = 3


def provider(averages: list[Tensor], step: Step) -> Provider:
    """One update, and the averages that it moves."""
    return Provider({"step": step}, lambda: {"averages": averages}, lambda: {"averages": averages})


@torch.no_grad()
def lerp_foreach(averages: list[Tensor], params: list[Tensor]) -> None:
    """PyTorch's multi-tensor form."""
    torch._foreach_lerp_(averages, params, 1 - DECAY)


@torch.no_grad()
def lerp_loop(averages: list[Tensor], params: list[Tensor]) -> None:
    """The loop that everybody writes."""
    for average, param in zip(averages, params, strict=True):
        average.lerp_(param, 1 - DECAY)


def function(lerp: Callable[[list[Tensor], list[Tensor]], None]) -> Callable[[Work], Provider]:
    """A provider that moves copies of the parameters by a function."""

    def make(work: Work) -> Provider:
        averages = [p.detach().clone() for p in work.params]
        return provider(averages, lambda: lerp(averages, work.params))

    return make


def compiled(work: Work) -> Provider:
    """The multi-tensor form, compiled."""
    return function(compilable(work)(lerp_foreach))(work)


def averaged_model(work: Work) -> Provider:
    """PyTorch's class with its multi-tensor function. Its first update would be a copy."""
    ema = AveragedModel(work.model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    ema.n_averaged.fill_(1)
    return provider(list(ema.module.parameters()), lambda: ema.update_parameters(work.model))


def model_ema_v3(work: Work) -> Provider:
    """Timm's class, with its defaults: multi-tensor, and for bfloat16 stochastic rounding."""
    ema = timm_module("utils/model_ema.py").ModelEmaV3(work.model, decay=DECAY)
    return provider(list(ema.module.parameters()), lambda: ema.update(work.model))


def ours(work: Work) -> Provider:
    """Trainops. The negative `update_after_step` leaves out the copy with which an EMA begins."""
    ema = trainops.EMA(work.model, DECAY, update_after_step=-2)
    return provider(list(ema.module.parameters()), ema.update)


class EmaWork(Work):
    """The parameters are others before each step."""

    makers: ClassVar = {
        "torch loop": function(lerp_loop),
        "torch foreach": function(lerp_foreach),
        "torch compiled": compiled,
        "torch AveragedModel": averaged_model,
        "timm ModelEmaV3": model_ema_v3,
        OURS: ours,
    }

    def prepare(self, step: int) -> None:
        """New parameters."""
        spread(self.tiles[step], self.params)

    def truth(self) -> dict[str, Expected]:
        """Of the tile."""
        average = self.start.double().clone()
        for tile in self.tiles:
            average.lerp_(tile.double(), 1 - DECAY)
        return {"averages": expect(average, self.start.double())}


def cases(options: Options) -> Iterator[Case]:
    """Models, in both dtypes."""
    yield from model_cases("ema", EmaWork, ELEMENTS, 4, options)


def test_ema(measured) -> None:
    """Under pytest-benchmark."""


if __name__ == "__main__":
    sys.exit(main(["--ops", "ema", *sys.argv[1:]]))
