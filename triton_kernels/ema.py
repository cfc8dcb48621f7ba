"""Exponential moving average.

    ema <- ema + (1 - decay) * (param - ema)

Reads both and writes the average: 12 bytes per float32 element. Arithmetic in the wider of the two types, float32 at
least. Written as torch.lerp writes it. Special cases avoid inf - inf: decay 0 copies, decay 1 keeps, equal values
stay.

Agrees with: torch._foreach_lerp_(ema, params, 1 - decay).
"""

import triton
import triton.language as tl

from trainops import core

from ._common import ADDRESSES, NUMEL, chunk_of, end_of_body
from .random import random_of
from .storage import load, real, store_as_is, store_rounded

# Where a table of averages alone has these.
AVERAGE, TENSOR = (core.schemas["ema"].places[name] for name in ("average", "tensor"))


@triton.jit
def moved(average, param, decay, WIDE: tl.constexpr):
    """The average after one update. ``decay`` is a float64 scalar."""
    weight, complement = (1.0 - decay).to(WIDE), decay.to(WIDE)
    difference = param - average
    near = average + weight * difference
    far = param - complement * difference
    result = tl.where(weight < 0.5, near, far)
    result = tl.where(param == average, average, result)
    result = tl.where(weight == 0, average, result)
    return tl.where(complement == 0, param, result)


@triton.jit
def move(
    address,
    offset,
    end,
    param,
    decay,
    random,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Move one block of an average. ``param`` is of the type ``WIDE``, in which the arithmetic is.

    ``random``: as of :func:`store_rounded`.
    """
    average = load(address, offset, end, DTYPE, WIDE, BLOCK, MASKED)
    store_rounded(address, offset, end, moved(average, param, decay, WIDE), DTYPE, random, BLOCK, MASKED)


@triton.jit(do_not_specialize=["first_chunk"])
def ema(
    rows,
    chunks,
    first_chunk,
    settings,
    skip,
    DECAY: tl.constexpr,
    SEED: tl.constexpr,
    PLACE: tl.constexpr,
    AVERAGE: tl.constexpr,
    TENSOR: tl.constexpr,
    AVERAGE_TYPE: tl.constexpr,
    TENSOR_TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``AVERAGE`` and ``TENSOR`` are columns. ``settings`` points to words: the decay (``DECAY``) and the seed.

    ``SEED`` is None where averages are rounded to nearest; ``PLACE`` is the word of a row that has its place. A true
    ``skip`` leaves the averages alone. Bytes (uint8) are copied.
    """
    if skip is not None:
        if tl.load(skip) != 0:
            return
    row, begin = chunk_of(chunks, first_chunk + tl.program_id(0), CHUNK)
    words = rows + row * WORDS
    end = tl.minimum(begin + CHUNK, tl.load(words + NUMEL))
    average_address, tensor_address = tl.load(words + ADDRESSES + AVERAGE), tl.load(words + ADDRESSES + TENSOR)
    body = end_of_body(begin, end, average_address | tensor_address, BLOCK)
    decay = real(tl.load(settings + DECAY))
    random = None
    if SEED is not None:
        random = random_of(words, PLACE, settings + SEED)
    for MASKED in tl.static_range(2):
        for offset in range(body if MASKED else begin, end if MASKED else body, BLOCK):
            if TENSOR_TYPE == tl.uint8:
                tensor = load(tensor_address, offset, end, TENSOR_TYPE, TENSOR_TYPE, BLOCK, MASKED)
                store_as_is(average_address, offset, end, tensor, BLOCK, MASKED)
            else:
                tensor = load(tensor_address, offset, end, TENSOR_TYPE, WIDE, BLOCK, MASKED)
                move(average_address, offset, end, tensor, decay, random, AVERAGE_TYPE, WIDE, BLOCK, MASKED)
