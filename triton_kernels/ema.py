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
from .storage import load, real, store

AVERAGE, TENSOR = (tl.constexpr(core.schemas["ema"].places[name]) for name in ("average", "tensor"))


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


@triton.jit(do_not_specialize=["first_chunk"])
def ema(
    rows,
    chunks,
    first_chunk,
    decay,
    skip,
    AVERAGE_TYPE: tl.constexpr,
    TENSOR_TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``decay`` points to a word; a true ``skip`` leaves the averages alone."""
    if skip is not None:
        if tl.load(skip) != 0:
            return
    row, begin = chunk_of(chunks, first_chunk + tl.program_id(0), CHUNK)
    words = rows + row * WORDS
    end = tl.minimum(begin + CHUNK, tl.load(words + NUMEL))
    average_address, tensor_address = tl.load(words + ADDRESSES + AVERAGE), tl.load(words + ADDRESSES + TENSOR)
    body = end_of_body(begin, end, average_address | tensor_address, BLOCK)
    decay_value = real(tl.load(decay))
    for MASKED in tl.static_range(2):
        for offset in range(body if MASKED else begin, end if MASKED else body, BLOCK):
            average = load(average_address, offset, end, AVERAGE_TYPE, WIDE, BLOCK, MASKED)
            tensor = load(tensor_address, offset, end, TENSOR_TYPE, WIDE, BLOCK, MASKED)
            result = moved(average, tensor, decay_value, WIDE)
            store(average_address, offset, end, result, AVERAGE_TYPE, BLOCK, MASKED)
