"""The optimizer inside the wrappers of frameworks, and a clear error where a framework is missing."""

import importlib
from types import ModuleType
from typing import Any

import torch

from ..optimizer import FusedOptimizer


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Accelerate, HF Trainer, Lightning and Fabric.

    A wrapper keeps what it is given to itself: after ``trainer.optimizer.ema = ema`` no step moves the average. Write
    ``unwrap(trainer.optimizer).ema = ema``.

    Args:
        optimizer: an optimizer, wrapped or not.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer) or hasattr(
        inner, "optimizer"
    ):
        optimizer = inner
    return optimizer


def fused(optimizer: Any) -> FusedOptimizer | None:
    """The optimizer of trainops inside the wrappers, if it is one."""
    inner = unwrap(optimizer)
    return inner if isinstance(inner, FusedOptimizer) else None


def framework(name: str) -> ModuleType:
    """Import a framework, or say how to get it.

    Raises:
        ImportError: it is not there.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f"{name} is not installed: pip install trainops[integrations]") from error
