"""Copies of many tensors: from other devices, and of bits that a skipped step keeps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .plain import all_plain, is_transformed
from .reference_storage import write

# Integers that have the bits of an element.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# What torch.cat takes on every device.
_NUMBERS = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128))
_NUMBERS |= frozenset((torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))


def fetch(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> list[Tensor]:
    """Each tensor on a device. Copies from a GPU to the host are all on their way before the host waits for them."""
    streams = {}
    fetched = []
    for x, device in zip(tensors, devices, strict=True):
        if x.is_cuda and device.type == "cpu" and x.device not in streams:
            streams[x.device] = torch.cuda.current_stream(x.device)
        fetched.append(x.to(device, non_blocking=x.is_cuda))
    for stream in streams.values():
        stream.synchronize()
    return fetched


class HostCopies:
    """Copies of tensors that are on their way to the host. The tensors may be written at once.

    They are put together in the device's memory, in its current stream's order. Another stream brings that to pinned
    memory. Who waits for it is :meth:`wait`; the device's memory is free then.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._forms = [(x.dtype, x.shape) for x in tensors]
        self._flat: list[tuple[list[int], Tensor, Tensor]] = []  # places of tensors, on the host, on their device
        self._events = []
        parts: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, x in enumerate(tensors):
            parts.setdefault((x.device, x.dtype), []).append(i)
        for (device, _), places in parts.items():
            flat = torch.cat([_flat(tensors[i]) for i in places])
            if device.type == "cpu":
                self._flat.append((places, flat, flat))
                continue
            stream = _side_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self._flat.append((places, flat.to("cpu", non_blocking=True), flat))
            self._events.append(stream.record_event())

    def wait(self) -> list[Tensor]:
        """The copies, when they are there."""
        for event in self._events:
            event.synchronize()
        found: dict[int, Tensor] = {}
        for places, host, _ in self._flat:
            sizes = [self._forms[i][1].numel() for i in places]
            for i, x in zip(places, torch.split(host, sizes), strict=True):
                dtype, shape = self._forms[i]
                found[i] = x.view(dtype).view(shape)
        self._flat.clear()
        return [found[i] for i in range(len(found))]


def is_copied_beside(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> bool:
    """Whether these tensors can go to these devices as :class:`HostCopies`, and some come from a GPU."""
    return (
        all(device.type == "cpu" for device in devices)
        and {"cuda"} <= {x.device.type for x in tensors} <= {"cuda", "cpu"}
        and all_plain(tensors)
        and not is_transformed()
    )


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """A device's stream for copies beside what else it does."""
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _side_streams[device]


def _flat(x: Tensor) -> Tensor:
    """A tensor in one dimension, in a dtype that can be put together."""
    x = x.detach().reshape(-1)
    return x if x.dtype in _NUMBERS else x.resolve_conj().resolve_neg().view(_BITS[x.itemsize])


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor], skip: Tensor | None = None) -> None:
    """Copy every tensor, unless ``skip`` is true: then the targets keep every bit.

    Equivalent to::

        for target, source in zip(targets, sources):
            target.copy_(torch.where(skip, target, source))

    in a few operations for each device and dtype. Sources lie on the devices of their targets.
    """
    if is_transformed() or not (all_plain(targets) and all_plain(sources)):
        for target, source in zip(targets, sources, strict=True):
            write(target, source, skip)
        return
    if skip is not None and skip.device.type == "cpu":
        if skip.item():
            return
        skip = None
    if skip is None:
        torch._foreach_copy_(list(targets), list(sources))
        return
    parts: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        if target.dtype == source.dtype and not target.is_complex():
            parts.setdefault((target.device, _BITS[target.itemsize]), []).append((target, source))
        else:
            write(target, source, skip)
    for (device, bits), pairs in parts.items():
        old, new = ([x.view(bits) for x in column] for column in zip(*pairs, strict=True))
        # Integers wrap around, so that the difference, or none of it, leads exactly to the new bits, or to the old.
        difference = torch._foreach_sub(new, old)
        torch._foreach_mul_(difference, skip.logical_not().to(device, bits))
        torch._foreach_add_(old, difference)
