"""What 8-bit state may hold, and wrong ways to store it that checks have to notice."""

import numpy as np
import pytest
import torch
from contract import exact

from trainops import reference_codes
from trainops.adapters import pytorch as kernels
from trainops.reference_codes import BLOCK, CODE_OF, NEAREST, encode

SMALLEST = {True: 2.0**-14, False: 2.0**-30}  # of signed codes, and of others: a share of a block's largest
FLOOR = {True: 2.0**-101, False: 2.0**-117}  # no smallest code is below this half


def flat(x):
    """The elements in the order of memory."""
    x = torch.as_tensor(x)
    return x.as_strided((x.numel(),), (1,)).numpy()


def allowed(values, is_signed):
    """How far a code may be off: less than an eighth of the value's power of two; near zero, the smallest code."""
    size = np.abs(values.reshape(-1))
    blocks = np.pad(size, (0, -size.size % BLOCK)).reshape(-1, BLOCK)
    largest = np.repeat(blocks.max(1), BLOCK)[: size.size] if size.size else size
    smallest = np.maximum(largest * SMALLEST[is_signed], FLOOR[is_signed])
    _, exponent = np.frexp(np.where(size > 0, size, 1))
    unit = np.where(size > 0, np.ldexp(np.longdouble(1), exponent - 1) / 8, 0)
    return np.where(size == 0, 0, np.maximum(unit, np.where(size < smallest, smallest, 0))).reshape(values.shape)


def assert_codes(ours, true, name, what):
    """The values of codes are neighbours of the exact ones, give or take what arithmetic loses before."""
    got, slack = exact(ours), 8 * 2.0**-24 * true.terms
    error = np.abs(got - true.value)
    assert (error <= allowed(true.value, CODE_OF[name].is_signed) + slack).all(), what
    assert (got != 0)[true.value - slack > 0].all() or CODE_OF[name].is_signed, f"{what}: zero"


class WrongCodes:
    """The specification with another encoding, as a context."""

    def __init__(self, wrong):
        self.wrong, self.context = wrong, pytest.MonkeyPatch()

    def __enter__(self):
        def encoded(x, code, layout, random=NEAREST):
            return self.wrong(reference_codes.flat_like(layout, x)[1], code, random)

        self.context.setattr(kernels, "encoded", encoded)

    def __exit__(self, *_):
        self.context.undo()


def to_nearest(x, code, _):
    return encode(x, code)


def truncated(x, code, _):
    return encode(x, code, torch.zeros(x.shape, dtype=torch.int32))


def same_in_each_element(x, code, random):
    return encode(x, code, random[:1].expand(x.shape).contiguous())


def next_code(x, code, random):
    codes = encode(x, code, random)
    codes[: x.numel()] += (codes[: x.numel()] & code.last < code.last - 2).to(torch.uint8)
    return codes


def next_scale(x, code, random):
    codes = encode(x, code, random)
    codes[x.numel() :] += 1
    return codes


def of_neighbours(x, code, random):
    """Scales of the next block."""
    codes = encode(x, code, random)
    codes[x.numel() :] = codes[x.numel() :].roll(1)
    return codes


WRONG = {f.__name__: f for f in (next_code, next_scale, of_neighbours)}  # what a single step shows
BIASED = {f.__name__: f for f in (truncated, to_nearest)}
