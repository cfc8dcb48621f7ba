"""A list of parameters as a model, for averages as diffusers' EMAModel has them."""

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def as_model(model: Any) -> nn.Module:
    """A module as it is, or a module of the parameters that an iterable gives.

    Raises:
        TypeError: it is neither.
        ValueError: it gives no parameters.
    """
    if isinstance(model, nn.Module):
        return model
    parameters = list(model) if isinstance(model, Iterable) and not isinstance(model, Tensor | str) else None
    if parameters is None or not all(isinstance(x, Tensor) for x in parameters):
        raise TypeError(f"model must be a torch.nn.Module or an iterable of parameters, got {type(model).__name__}")
    if not parameters:
        raise ValueError("there are no parameters: a generator such as model.parameters() can be read only once")
    return nn.ParameterList(
        x if isinstance(x, nn.Parameter) else nn.Parameter(x, requires_grad=x.requires_grad) for x in parameters
    )


def same_parameters(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same parameters, in the same order."""
    own, others = list(a.parameters()), list(b.parameters())
    return len(own) == len(others) and all(map(operator.is_, own, others))
