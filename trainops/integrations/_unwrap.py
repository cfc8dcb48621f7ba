"""The optimizer inside the wrappers of frameworks, and a clear error where a framework is missing."""

import importlib
from types import ModuleType
from typing import Any

from ..optimizer import FusedOptimizer
from ..wrappers import unwrap


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
