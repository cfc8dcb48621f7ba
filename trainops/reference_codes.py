"""The specification of 8-bit state: what a code means, how blocks are scaled, and how codes are rounded.

32 elements that follow each other in memory are a block. Each has a code of one byte, and the block has a scale of
one byte, ``e``. A tensor of codes holds those of all elements, then the scales. Blocks are counted from the first
element of a parameter, or of a shard: a shard that begins with a block of the whole has its codes.

A code is a small floating-point number: 3 bits of mantissa below 4 bits of exponent and a sign (of first moments), or
below 5 bits of exponent (of second moments, which are not negative). Its value is that of the float32 with the bits
``(code << 20) + ((e - 15) << 23)``; 31 in place of 15 without a sign. Code 0 is zero, the last code is NaN, and the
last but one is infinity. ``e`` is that of the block's largest finite element, which rounds to no more than
``1.625 * 2**(e - 127)``, and at least 40, so that no arithmetic meets subnormal numbers.

The error: a code is off by less than an eighth of the value. Below the smallest code, it is off by less than that:
less than ``2**-14`` of the block's largest element for a first moment, ``2**-30`` for a second one (or, in blocks of
numbers that are as small, less than ``2**-101`` and ``2**-117``).

Codes are rounded to one of the two neighbours, to each with a probability that makes the mean right: nearest codes
would stand still where a step moves a moment by less than half a code. Between zero and the smallest code, a first
moment is rounded so, too; a second moment becomes the smallest code, for a zero there would make an update infinite.

The value of a code has four significant bits, so that bfloat16 has it exactly. Encoded again, by whatever rounding,
it is the same value: the scale can only fall to that of the largest value, which has codes for all others.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .reference_rounding import WORD, Random, mix

BLOCK = 32
CODES = torch.uint8
SMALLEST_SCALE = 40
MANTISSA = 20  # bits of float32's that codes lack
INFINITE = 0x7F800000
ROUND_SCALE = 0x2FFFFF  # added to a largest element of more than 1.625 times a power of two: the next power
NEAREST = 0x80000  # in place of random bits


class Code(NamedTuple):
    """A kind of code: how far it reaches below the largest element of its block, and whether it has a sign."""

    octaves: int
    is_signed: bool

    @property
    def last(self) -> int:
        """The last code: NaN. The one before is infinity."""
        return 127 if self.is_signed else 255


SIGNED, UNSIGNED = Code(15, True), Code(31, False)

# Of each state that may have codes (``csrc/core/schema.h``).
CODE_OF = {"exp_avg": SIGNED, "exp_avg_sq": UNSIGNED, "max_exp_avg_sq": UNSIGNED, "momentum_buffer": SIGNED}


def size_of_codes(numel: int) -> int:
    """The length of the tensor of codes and scales."""
    return numel + -(-numel // BLOCK)


def decode(codes: Tensor, code: Code) -> Tensor:
    """The values of a tensor of codes, as float32; 1-D, in the order of memory."""
    numel = codes.numel() * BLOCK // (BLOCK + 1)
    its, scales = codes[:numel].int(), codes[numel:].int()
    exponent = scales.repeat_interleave(BLOCK)[:numel] - code.octaves
    magnitude = its & code.last
    value = ((magnitude << MANTISSA) + (exponent << 23)).view(torch.float32)
    value = torch.where(magnitude == 0, 0.0, value)
    value = torch.where(magnitude == code.last - 1, torch.inf, value)
    value = torch.where(magnitude == code.last, torch.nan, value)
    return torch.where(its > code.last, -value, value)


def encode(x: Tensor, code: Code, random: Tensor | int = NEAREST) -> Tensor:
    """Codes and scales of float32 numbers, 1-D. ``random``: 20 bits for each; by default, they round to nearest."""
    bits = x.view(torch.int32)
    size = bits & 0x7FFFFFFF
    finite = torch.where(size < INFINITE, size, 0)
    blocks = torch.nn.functional.pad(finite, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    scales = ((blocks.amax(1) + ROUND_SCALE) >> 23).clamp(min=SMALLEST_SCALE)
    first = ((scales - code.octaves) << 23).repeat_interleave(BLOCK)[: x.numel()]  # the bits of code 0
    magnitude = (finite + random - first) >> MANTISSA
    smallest = first + (1 << MANTISSA)
    if code.is_signed:
        threshold = smallest.view(torch.float32) * (torch.as_tensor(random, device=x.device).float() * 2.0**-MANTISSA)
        is_up = size > threshold.view(torch.int32)
    else:
        is_up = size > 0
    magnitude = torch.where(size < smallest, is_up.int(), magnitude)
    magnitude = torch.where(size == INFINITE, code.last - 1, magnitude)
    if code.is_signed:
        magnitude = torch.where(bits < 0, magnitude | 0x80, magnitude)
    magnitude = torch.where(size > INFINITE, code.last, magnitude)
    return torch.cat((magnitude, scales)).to(CODES)


def random_bits_of(random: Random, code: Code) -> Tensor:
    """20 bits for each element, of which 16 are random; the last that is set makes the mean right.

    A hash serves both moments of two elements: its lower half the first moment of the first element and the second
    one of the other, its upper half the others.
    """
    key = random.key.to(random.elements.device) if isinstance(random.key, Tensor) else random.key
    odd = torch.arange(random.elements.numel(), device=random.elements.device) & 1
    words = mix((random.elements - odd) & WORD ^ key)
    return (torch.where(odd.bool() == code.is_signed, words >> 16, words & 0xFFFF) << 4 | 8).int()


def flat_like(layout: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A float32 tensor like ``layout``, with the values of ``x``, and its elements in the order of memory."""
    values = torch.empty_like(layout, dtype=torch.float32)
    if x is not None:
        values.copy_(x)
    return values, values.as_strided((values.numel(),), (1,))


def new_codes(layout: Tensor) -> Tensor:
    """The codes of zeros for the elements of a tensor."""
    return torch.zeros(size_of_codes(layout.numel()), dtype=CODES, device=layout.device)


def decoded(codes: Tensor, code: Code, layout: Tensor) -> Tensor:
    """The values of codes as a float32 tensor like ``layout``, in whose order of memory the codes are."""
    values, flat = flat_like(layout)
    flat.copy_(decode(codes, code))
    return values


def encoded(x: Tensor, code: Code, layout: Tensor, random: Tensor | int = NEAREST) -> Tensor:
    """The codes of a tensor of the shape of ``layout``, in whose order of memory they are."""
    return encode(flat_like(layout, x)[1], code, random)
