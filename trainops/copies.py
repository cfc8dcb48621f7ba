"""Copies of many tensors: from other devices with one wait, and of bits that a skipped step keeps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .plain import all_plain, is_transformed
from .reference import write

# Integers that have the bits of an element.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
