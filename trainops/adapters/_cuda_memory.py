"""Where launches of the CUDA kernels go, and the scratch memory that they share."""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from ..uploads import Recent


class Queue(NamedTuple):
    """A device and its current stream."""

    device: torch.device
    stream: int

    @property
    def captures(self) -> bool:
        """Whether the stream is recorded into a CUDA graph."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def queue_of(device: torch.device) -> Queue:
    """The device with its current stream."""
    return Queue(device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


class Scratch(NamedTuple):
    """Memory that kernels share."""

    counter_words: Tensor  # of chunks, of blocks and of each row; zeros, and kernels reset them
    numbers: Tensor  # the norm, and partial results

    @property
    def counters(self) -> int:
        """The address of the counters."""
        return self.counter_words.data_ptr()

    @property
    def norm(self) -> int:
        """The address of the norm."""
        return self.numbers.data_ptr()

    @property
    def partials(self) -> int:
        """The address of the partial results."""
        return self.numbers.data_ptr() + 8


# Scratch memory per stream and host thread.
scratches: Recent[Scratch] = Recent(32)


def scratch_for(queue: Queue, counters: int, numbers: int) -> Scratch:
    """Memory for so many counters and numbers. The next launch on this stream has the same."""
    if queue.captures:  # of the graph's own memory, which each replay fills anew
        return _new_scratch(queue.device, counters, numbers)
    key = queue, threading.get_ident()
    scratch = scratches.recall(key)
    has = (0, 0) if scratch is None else (len(scratch.counter_words), len(scratch.numbers))
    if scratch is None or has[0] < counters or has[1] < numbers:
        grown = (max(old, 2 * new) for old, new in zip(has, (counters, numbers), strict=True))
        scratch = scratches.remember(key, _new_scratch(queue.device, *grown))
    return scratch


def _new_scratch(device: torch.device, counters: int, numbers: int) -> Scratch:
    return Scratch(
        torch.zeros(counters, dtype=torch.int32, device=device),
        torch.empty(numbers, dtype=torch.float64, device=device),
    )
