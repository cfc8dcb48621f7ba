"""The specification of storages: how a number is kept, as a short function for loading and for storing each.

A weight may lie in two tensors, a 16-bit parameter and its master (:func:`join`, :func:`split`).
"""

import torch
from torch import Tensor

from .reference_rounding import Random, rounded_stochastically


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype that arithmetic is done in: float32 for 16 bits, else its own."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def write(target: Tensor, value: Tensor, skip: Tensor | None = None, random: Random | None = None) -> None:
    """Store ``value`` in ``target``, unless ``skip`` is true: then ``target`` keeps every bit.

    With ``random``, a bfloat16 ``target`` is rounded stochastically.
    """
    value = value.to(target.dtype) if random is None else rounded_stochastically(value.float(), random)
    target.copy_(value if skip is None else torch.where(skip.to(target.device), target, value))


def bits(x: Tensor) -> Tensor:
    """The bits of float32 numbers, as int32."""
    return x.view(torch.int32)


def join(param: Tensor, master: Tensor) -> Tensor:
    """The float32 weight of a 16-bit parameter and its master.

    A master is the weight in float32, or the int16 remainder of a bfloat16 parameter: the weight's bits are those of
    the parameter, as float32, plus the remainder. Where the parameter is not the rounded weight, it was written by
    others, and wins.
    """
    wide = param.float()
    if master.dtype == torch.int16:
        weight = (bits(wide) + master).view(torch.float32)
        return torch.where(weight.isnan(), wide, weight)
    if param.dtype == torch.bfloat16:
        return torch.where((bits(master).long() - bits(wide)).abs() <= 0x8000, master, wide)
    return torch.where(master.to(param.dtype) == param, master, wide)


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 weight as bfloat16, rounded to nearest with ties away from zero, and the int16 remainder.

    A NaN is a bfloat16 NaN with remainder 0: its bits would be rounded up to -0.0.
    """
    whole = torch.where(weight.isnan(), 0x7FC00000, bits(weight))
    remainder = ((whole & 0xFFFF) ^ 0x8000) - 0x8000
    upper = (whole + 0x8000) // 0x10000  # no shift: that of a DTensor does nothing, silently
    return upper.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def remainder(weight: Tensor, param: Tensor) -> Tensor:
    """The remainder that brings :func:`join` nearest to a weight, whichever way others have rounded it."""
    return (bits(weight).long() - bits(param.float())).clamp(-0x8000, 0x7FFF).to(torch.int16)


def write_weight(param: Tensor, master: Tensor, weight: Tensor, skip: Tensor | None = None) -> None:
    """Store a float32 weight in a parameter and its master, unless ``skip`` is true."""
    rounded, rest = (weight, weight) if param.dtype == torch.float16 else split(weight)
    write(param, rounded, skip)
    write(master, rest if master.dtype == torch.int16 else weight, skip)
