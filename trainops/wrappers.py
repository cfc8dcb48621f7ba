"""What lies inside the wrappers that frameworks put around optimizers and models."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Accelerate, HF Trainer, Lightning and Fabric.

    Accelerate's wrapper keeps what it is given to itself: after ``trainer.optimizer.ema = ema`` no step moves the
    average. Write ``ema.attach(trainer.optimizer)`` or ``unwrap(trainer.optimizer).ema = ema``.

    Args:
        optimizer: an optimizer, wrapped or not.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer) or hasattr(
        inner, "optimizer"
    ):
        optimizer = inner
    return optimizer


def find_average_holder(wrapper: Any) -> Any:
    """The optimizer of trainops in whatever has one: a wrapper, a Trainer, a scheduler. None where there is none."""
    seen: set[int] = set()
    inner = unwrap(wrapper)
    while inner is not None and id(inner) not in seen:
        if isinstance(inner, torch.optim.Optimizer) and isinstance(getattr(type(inner), "ema", None), property):
            return inner
        seen.add(id(inner))
        names = ("optimizer", "_optimizer", "optim")
        inner = unwrap(next((x for name in names if (x := getattr(inner, name, None)) is not None), None))
    return None


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """A model, and what is inside the wrappers of ``torch.compile``, DDP and the like, from the outside in."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        yield inner
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)


def innermost(model: nn.Module) -> nn.Module:
    """A model without the wrappers of ``torch.compile``, DDP and DataParallel around it."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def is_same_model(a: nn.Module, b: nn.Module) -> bool:
    """Whether one model is the other, or in a wrapper of it."""
    if a is b:
        return True
    inside = set(map(id, layers_of(a)))
    return any(id(layer) in inside for layer in layers_of(b))
