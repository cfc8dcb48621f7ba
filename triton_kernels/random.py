"""Random bits for rounding, the same as those of ``csrc/math/random.h``, which says what they depend on."""

import triton
import triton.language as tl

from ._common import ORIGIN


@triton.jit
def scramble(x):
    """``mix`` without its last line, which leaves the upper half as it is."""
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    return x * tl.full((), 0x846CA68B, tl.uint32)


@triton.jit
def mix(x):
    """A bijection of 32 bits."""
    x = scramble(x)
    return x ^ (x >> 16)


@triton.jit
def random_bits(key, index):
    """16 bits for each element. ``index``: of the elements, uint32."""
    return scramble(key ^ index) >> 16


@triton.jit
def random_of(words, place: tl.constexpr, seed):
    """What the random bits of an average depend on: a key, and the index of its first element.

    ``words``: of its row. ``place``: the word that has its place. ``seed``: a pointer to the word of its seed.
    """
    key = mix(tl.load(seed).to(tl.uint32) ^ tl.load(words + place).to(tl.uint32))
    return key, tl.load(words + ORIGIN).to(tl.uint32)


@triton.jit
def random_of_param(words, place: tl.constexpr, seed, step):
    """The same of a parameter, at its own step count, a float64."""
    key, origin = random_of(words, place, seed)
    return mix(key ^ step.to(tl.int64).to(tl.uint32)), origin
