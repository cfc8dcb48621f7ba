"""The seeds of stochastic rounding: what optimizers and averages may be given, and where an optimizer keeps it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# The key in the first group of parameters under which an optimizer keeps what is no parameter's state: state dicts,
# torch's class and torch.distributed.checkpoint carry it along.
OWN_STATE = "trainops"


def checked_seed(seed: Any, stochastic_rounding: Any, codes: bool = False) -> int | None:
    """The seed, 0 by default; None without stochastic rounding, of parameters or of 8-bit state (``codes``).

    Raises:
        TypeError: an argument is of another type.
        ValueError: the seed is out of range, or of no use.
    """
    if not isinstance(stochastic_rounding, bool):
        raise TypeError(f"stochastic_rounding must be True or False, got {stochastic_rounding!r:.60}")
    if seed is None:
        return 0 if stochastic_rounding or codes else None
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an integer, got {seed!r:.60}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}")
    if not stochastic_rounding and not codes:
        raise ValueError("seed is of no use without stochastic_rounding")
    return seed


def check_bfloat16(what: str, tensors: Iterable[Tensor], *, some: bool = True) -> None:
    """ValueError where one of these is float16; with ``some``, also where none is bfloat16.

    ``what`` they are, for the error message.
    """
    dtypes = {x.dtype for x in tensors}
    if torch.float16 in dtypes:
        raise ValueError(f"stochastic_rounding is for bfloat16, but one of the {what} is float16")
    if some and dtypes and torch.bfloat16 not in dtypes:
        raise ValueError(f"stochastic_rounding is for bfloat16, but none of the {what} is")


class HasSeed(torch.optim.Optimizer):
    """An optimizer that may round its parameters stochastically."""

    stochastic_rounding: bool

    @property
    def seed(self) -> int | None:
        """The seed of stochastic rounding, also of 8-bit state, which the state dict keeps; None without it."""
        groups = self.__dict__.get("param_groups")
        return groups[0].get(OWN_STATE, {}).get("seed") if groups else None

    def _set_stochastic_rounding(self, seed: int | None, stochastic_rounding: bool, master: str | None) -> None:
        """Keep a seed, if there is one, and round the parameters stochastically or to nearest.

        Raises:
            ValueError: none of the parameters can be rounded so, or not all of the 16-bit ones.
        """
        if stochastic_rounding:
            if master is not None:
                raise ValueError("stochastic_rounding is for parameters without a master: leave out one of the two")
            check_bfloat16("parameters", (p for group in self.param_groups for p in group["params"]))
        if seed is not None:
            self.param_groups[0][OWN_STATE] = {"seed": seed}
        self.stochastic_rounding = stochastic_rounding

    def __setstate__(self, state: dict[str, Any]) -> None:
        if self.__dict__.get("param_groups") and OWN_STATE in self.param_groups[0]:
            group = state["param_groups"][0]  # of a state that may be that of torch's class, and lack it
            group[OWN_STATE] = {**self.param_groups[0][OWN_STATE], **group.get(OWN_STATE, {})}
        super().__setstate__(state)
