"""The specification of stochastic rounding to bfloat16: random bits, and what they make of a number.

Random bits are a hash of what they depend on, and no state (``csrc/math/random.h``). So they are the same on every
backend, when training resumes, for replicas and for shards of a parameter. 32-bit numbers lie in int64 here.
"""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
OF_CODES = 0x636F6465  # "code"
Word = TypeVar("Word", int, Tensor)


class Random(NamedTuple):
    """What the random bits of a tensor's elements depend on."""

    key: Tensor | int  # 0-dim
    elements: Tensor  # the index of each


def mix(x: Word) -> Word:
    """A bijection of 32 bits (https://github.com/skeeto/hash-prospector, "lowbias32")."""
    x = (x ^ x >> 16) * 0x7FEB352D & WORD
    x = (x ^ x >> 15) * 0x846CA68B & WORD
    return x ^ x >> 16


def seed_word(seed: int, update: int | None = None) -> int:
    """The word of a seed from 0 to 2**63 - 1; of an average's seed, at its update of that number."""
    word = mix(mix(0x9E3779B9 ^ seed & WORD) ^ seed >> 32)
    return word if update is None else mix(word ^ update & WORD)


def random_of(
    x: Tensor, layout: Tensor, seed: int, place: int, origin: int, step: Tensor | None = None
) -> Random | None:
    """What the random bits of ``x`` depend on, where it is rounded stochastically.

    Args:
        x: a parameter or an average.
        layout: a tensor of its shape, whose elements have the order by which they are counted.
        seed: the word of the seed.
        place: the parameter's in ``param_groups``, or the average's in its model; negative: round to nearest.
        origin: of a shard: the index of its first element in the whole parameter.
        step: of a parameter: its own step count; 0-dim.
    """
    if place < 0 or x.dtype != torch.bfloat16:
        return None
    return Random(_key(seed, place, step), indices(layout, origin))


def random_of_codes(numel: int, seed: int, place: int, origin: int, step: Tensor) -> Random:
    """What the random bits of a parameter's 8-bit state depend on, in the order of memory."""
    key: Any = _key(seed, place, step)  # other bits than those of the parameter itself
    return Random(mix(key ^ OF_CODES), torch.arange(origin, origin + numel, device=step.device))


def _key(seed: int, place: int, step: Tensor | None) -> Tensor | int:
    key: int | Tensor = mix(seed ^ place & WORD)
    return key if step is None else mix(step.long() & WORD ^ key)


def indices(x: Tensor, origin: int) -> Tensor:
    """The index of each element in the order of memory, without gaps, counted from ``origin``."""
    index = torch.empty_like(x, dtype=torch.int64)
    numbers = torch.arange(origin, origin + x.numel(), device=x.device)
    index.as_strided((x.numel(),), (1,)).copy_(numbers)
    return index


def random_bits(random: Random) -> Tensor:
    """16 bits for each element."""
    key = random.key.to(random.elements.device) if isinstance(random.key, Tensor) else random.key
    return mix(random.elements & WORD ^ key) >> 16


def rounded_stochastically(x: Tensor, random: Random) -> Tensor:
    """float32 as bfloat16: one of the two neighbours, each with a probability that makes the mean right.

    Adds random bits below the last place and truncates. What bfloat16 has stays as it is, and so do infinities.
    """
    bits = x.view(torch.int32) + random_bits(random).to(torch.int32)
    return (torch.where(x.isnan(), 0x7FC00000, bits) >> 16).to(torch.int16).view(torch.bfloat16)
