"""Words in a device's memory, found by their content.

Uploaded words are never written again. Every step makes its table anew from the current addresses of the tensors, and
looks its words up or uploads them, so nothing stale can be used.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import TypeVar

import torch
from torch import Tensor

V = TypeVar("V")


class Recent(OrderedDict[Hashable, V]):
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

# Pinned buffers by size, since a capture cannot allocate them. `_captured` keeps alive what graphs read on replay.
_spares: dict[int, list[Tensor]] = {}
_captured: list[Tensor] = []
_SPARES = 4  # of each size


def uploaded(words: bytes, device: torch.device) -> Tensor:
    """64-bit words in the device's memory, without waiting for it. The caller must not write to them."""
    if device.type == "cpu":
        return torch.frombuffer(bytearray(words), dtype=torch.int64)
    key = (words, device, torch.cuda.current_stream(device).cuda_stream)
    found = _uploads.recall(key)
    if torch.cuda.is_current_stream_capturing():
        if found is None:
            return _upload_in_capture(words, device)
        _captured.append(found)
        return found
    spares = _spares.setdefault(len(words), [])
    while len(spares) < _SPARES:
        spares.append(_pinned(len(words) // 8))
    if found is not None:
        return found
    host = torch.frombuffer(bytearray(words), dtype=torch.int64).pin_memory()
    return _uploads.remember(key, host.to(device, non_blocking=True))


def _pinned(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, pin_memory=True)


def _upload_in_capture(words: bytes, device: torch.device) -> Tensor:
    """Records the copy in the graph. The words are in place only when the graph is replayed."""
    spares = _spares.get(len(words))
    if not spares:
        raise RuntimeError(
            "there is no pinned memory ready for this table: take a step on tensors of these sizes outside of a CUDA "
            f"graph before every capture, and capture at most {_SPARES} steps at a time"
        )
    host = spares.pop()
    host.copy_(torch.frombuffer(bytearray(words), dtype=torch.int64))
    _captured.append(host)
    return host.to(device, non_blocking=True)
