"""An average and the optimizer that it finds inside the wrappers of frameworks; stand-ins, as these are not here."""

import pytest
import torch
from targets import over
from torch import nn

import trainops


class Swallowing:
    """Accelerate's, DeepSpeed's: what is set stays on the wrapper."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


class Imitating:
    """Lightning's and Fabric's: an instance of the optimizer's class, which reads what it lacks from it."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Imitating", (Imitating, type(optimizer)), {"__init__": lambda self: None})

    @property
    def optimizer(self):
        return self._optimizer

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Sharding:
    """ZeroRedundancyOptimizer's name for it."""

    def __init__(self, optimizer):
        self.optim = optimizer


WRAPPERS = {
    "none": lambda optimizer: optimizer,
    "swallowing": Swallowing,
    "imitating": Imitating,
    "sharding": Sharding,
    "two": lambda optimizer: Swallowing(Imitating(optimizer)),
    "three": lambda optimizer: Sharding(Swallowing(Sharding(optimizer))),
    "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
}


@over("wrap", WRAPPERS)
def test_an_average_finds_the_optimizer_inside(wrap):
    model = nn.Linear(3, 2)
    optimizer, ema = trainops.AdamW(model.parameters()), trainops.EMA(model)
    assert ema.attach(wrap(optimizer)) is optimizer
    assert (optimizer.ema, ema.optimizer) == (ema, optimizer)
    optimizer.step()
    assert ema.step == 1


def test_a_wrapper_that_imitates_its_optimizer_hands_settings_on():
    model = nn.Linear(3, 2)
    optimizer, ema = trainops.AdamW(model.parameters()), trainops.EMA(model)
    wrapper = Imitating(optimizer)
    wrapper.ema = ema
    wrapper.max_grad_norm = 0.5
    assert (optimizer.ema, ema.optimizer, wrapper.ema) == (ema, optimizer, ema)
    assert (optimizer.max_grad_norm, wrapper.max_grad_norm) == (0.5, 0.5)
    wrapper.ema = None
    assert (optimizer.ema, ema.optimizer) == (None, None)


class Endless:
    def __init__(self):
        self.optim = self


@over(
    "other",
    {
        "torch": lambda p: torch.optim.AdamW(p),
        "wrapped": lambda p: Swallowing(torch.optim.SGD(p)),
        "endless": lambda p: Endless(),
        "nothing": lambda p: None,
    },
)
def test_what_has_no_optimizer_of_trainops_is_named(other):
    ema = trainops.EMA(nn.Linear(3, 2))
    inside = other(ema.model.parameters())
    with pytest.raises(TypeError, match=f"no optimizer of trainops in this {type(inside).__name__}: call ema.update"):
        ema.attach(inside)
    assert ema.optimizer is None


def test_an_average_is_not_attached_to_the_optimizer_of_another_model():
    ema, optimizer = trainops.EMA(nn.Linear(3, 2)), trainops.AdamW(nn.Linear(3, 2).parameters())
    with pytest.raises(ValueError, match="ema follows a model that has none of these parameters"):
        ema.attach(optimizer)
    assert (optimizer.ema, ema.optimizer) == (None, None)
