"""Memory of a fake device, and pinned memory."""

import ctypes
import weakref
from collections import Counter

import torch

ALIGNMENT = 512  # bytes, as in PyTorch's allocator


class Block:
    """What one allocation gave. Nothing is ever put where a freed block lay.

    ``stream``: the current one when a device's memory was allocated. ``graph``: what it captured into.
    """

    def __init__(self, size, device, stream=None):
        self.device, self.stream, self.is_free = device, stream, False
        self.graph = weakref.ref(stream.graph) if stream is not None and stream.graph is not None else None
        self.written, self.read = Counter(), Counter()  # when each stream did so last
        self.read_by = weakref.WeakSet()  # graphs
        self._raw, self._size = bytearray(b"\xab") * (size + ALIGNMENT), max(size, 8)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._raw))
        self._offset = -start % ALIGNMENT
        self.begin = start + self._offset
        self.end = self.begin + self._size

    @property
    def is_gone(self):
        """Whether it was freed; what a graph has allocated stays as long as the graph."""
        graph = None if self.graph is None else self.graph()
        return self.is_free and not (graph is not None and graph.is_alive)

    def memory(self):
        """The bytes, as an object that lives as long as the tensors that are made from it."""
        return (ctypes.c_ubyte * self._size).from_buffer(self._raw, self._offset)

    def alias(self, x):
        """A tensor in this memory once more, without a hold on the memory."""
        if x.numel() == 0:
            return x.clone()
        offset = self._offset + x.data_ptr() - self.begin
        flat = torch.frombuffer(self._raw, dtype=x.dtype, offset=offset, count=extent(x))
        return flat.as_strided(x.shape, x.stride())

    def words(self):
        """The content as 64-bit words."""
        return memoryview(self._raw)[self._offset : self._offset + self._size // 8 * 8].cast("q")


def extent(x):
    """How many elements lie between the first and the last one of a tensor."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def placed(memory, like):
    """A tensor as ``like`` is, in other memory."""
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    flat = flat[: flat.numel() // like.itemsize * like.itemsize].view(like.dtype)
    return flat.as_strided(like.shape, like.stride())
