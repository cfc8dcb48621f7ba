"""Words in a device's memory, found by their content.

Uploaded words are never written again. Every step makes its table anew from the current addresses of the tensors, and
looks its words up or uploads them, so nothing stale can be used. A CUDA graph copies its words from pinned memory at
each replay. That memory is the graph's own, and goes when the graph goes (``graphs.py``).
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .graphs import drop_unused, keep

V = TypeVar("V")


class Recent(OrderedDict[Any, V]):
    """The entries that were used last, up to a number of them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def recall(self, key: Hashable) -> V | None:
        """The entry, if it is still there."""
        try:
            self.move_to_end(key)
            return self[key]
        except KeyError:  # another thread may just have dropped it
            return None

    def remember(self, key: Hashable, value: V) -> V:
        """Keep an entry in place of the one that was used longest ago."""
        self[key] = value
        while len(self) > self.size:
            self.popitem(last=False)
        return value


# The last words of each size.
_last_words: Recent[bytes] = Recent(32)


def known(words: bytes) -> bytes:
    """Returns the last equal bytes object, whose hash is already computed, or else ``words``."""
    last = _last_words.recall(len(words))
    return last if last == words else _last_words.remember(len(words), words)


# Uploaded words, by their content, the device and the stream of the copy.
_uploads: Recent[Tensor] = Recent(128)

# Pinned buffers by size, since a capture cannot allocate them.
_spares: Recent[list[Tensor]] = Recent(32)
_SPARES = 4  # of each size
_prepared = False  # whether the user captures, whatever the stream


def uploaded(words: bytes, device: torch.device) -> Tensor:
    """64-bit words in the device's memory, without waiting for it. The caller must not write to them.

    Use them on the current stream, from where they are copied.
    """
    if device.type == "cpu":
        return torch.frombuffer(bytearray(words), dtype=torch.int64)
    stream = torch.cuda.current_stream(device).cuda_stream
    if torch.cuda.is_current_stream_capturing():
        return _upload_in_capture(words, device, stream)
    drop_unused()
    if _prepared or stream != 0:  # as in the warm-up of a capture: not the default stream
        _prepare(len(words))
    key = (words, device, stream)
    found = _uploads.recall(key)
    if found is not None:
        return found
    host = torch.frombuffer(bytearray(words), dtype=torch.int64).pin_memory()
    return _uploads.remember(key, host.to(device, non_blocking=True))


def prepare_capture() -> None:
    """Have pinned memory ready for captures: now for words as were uploaded lately, and then whatever the stream.

    Raises:
        RuntimeError: in a capture.
    """
    global _prepared
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("prepare_capture() comes before the capture of a CUDA graph, not within it")
    _prepared = True
    for size in {*_spares, *(8 * x.numel() for x in _uploads.values())}:
        _prepare(size)


def _prepare(size: int) -> None:
    spares = _spares.recall(size)
    if spares is None:
        spares = _spares.remember(size, [])
    while len(spares) < _SPARES:
        spares.append(torch.empty(size // 8, dtype=torch.int64, pin_memory=True))


def _upload_in_capture(words: bytes, device: torch.device, stream: int) -> Tensor:
    """Records the copy in the graph: the words are in place only when it is replayed.

    What was uploaded before is of no use, since nothing orders that before a replay, and it may be dropped meanwhile.
    """
    try:
        host = (_spares.recall(len(words)) or []).pop()
    except IndexError:
        raise RuntimeError(
            "there is no pinned memory ready for this table. Before a capture, take a step on tensors of these sizes "
            "outside of a CUDA graph, on a stream of its own or after optimizer.prepare_capture(); capture at most "
            f"{_SPARES} steps at a time"
        ) from None
    host.copy_(torch.frombuffer(bytearray(words), dtype=torch.int64))
    keep(host, stream)
    return host.to(device, non_blocking=True)
