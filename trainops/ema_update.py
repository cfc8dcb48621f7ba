"""Exponential moving averages of lists of tensors."""

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import reference
from .adapters import NEAREST, AverageRounding, Places, check, select
from .background import Later
from .copies import HostCopies, copy_all, fetch, is_copied_beside
from .ema_policy import AveragePolicy
from .model_pairs import Pairs, Replaced, check_pair
from .plain import all_plain
from .storage import kind
from .tables import all_local, as_real, origin


@torch.no_grad()
def ema_update_(
    ema_tensors: Iterable[Tensor], tensors: Iterable[Tensor], decay: float, *, backend: str | None = None
) -> None:
    """Move every tensor of ``ema_tensors`` towards its counterpart, in place.

    Equivalent to::

        torch._foreach_lerp_(ema_tensors, tensors, 1 - decay)

    but the two lists may differ in dtype (a float32 average of bfloat16 weights), and the arithmetic is in the
    average's precision, float32 at least.

    Args:
        ema_tensors: the averages.
        tensors: what is averaged, of the same shapes and on the same devices; DTensors with the same placements.
        decay: how much of the average stays, in [0, 1].
        backend: see :func:`trainops.backends`; by default it follows the device.

    Raises:
        TypeError: ``decay`` is no number.
        ValueError: ``decay`` is out of range, or two tensors differ in shape, device or placement, or are not
            floating-point. Nothing has been changed.
    """
    check(backend)
    check_unit_interval("decay", decay)
    averages, tensors = list(ema_tensors), list(tensors)
    if len(averages) != len(tensors):
        raise ValueError(f"{len(averages)} averages for {len(tensors)} tensors")
    for i, (average, tensor) in enumerate(zip(averages, tensors, strict=True)):
        check_pair(f"tensor {i}", average, tensor)
        if kind(average) == "other":
            raise ValueError(f"tensor {i} is {tensor.dtype}; averages are of floating-point numbers")
        if average.device != tensor.device:
            raise ValueError(f"tensor {i} is on {tensor.device}, but its average on {average.device}")
    update_averages(all_local(averages), all_local(tensors), decay, None, backend)


def get_ema_multi_avg_fn(decay: float = 0.999) -> Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]:
    """The averaging function for :class:`torch.optim.swa_utils.AveragedModel`.

    Equivalent to::

        torch.optim.swa_utils.get_ema_multi_avg_fn(decay)

    Args:
        decay: how much of the average stays at each update, in [0, 1].

    Raises:
        TypeError: ``decay`` is no number.
        ValueError: ``decay`` is out of range.
    """
    check_unit_interval("decay", decay)

    @torch.no_grad()
    def ema_update(ema_params: Sequence[Tensor], params: Sequence[Tensor], _: Any) -> None:
        if ema_params and kind(ema_params[0]) != "other":
            ema_update_(ema_params, params, decay)
        else:
            for average, param in zip(ema_params, params, strict=True):
                average.copy_(average * decay + param * (1 - decay))

    return ema_update


def update_pairs(
    matched: Pairs,
    sources: list[Tensor],
    decay: float,
    skip: Tensor | None,
    backend: str | None,
    seed: int | None = None,
) -> Later | None:
    """Move averages towards their ``sources``, and copy the others, unless ``skip`` is true.

    Averages on the host of tensors on GPUs are moved later, by a thread of its own. ``seed``: the word of that of
    averages that are rounded stochastically.
    """
    rounding = NEAREST
    if seed is not None:
        places = zip(matched.averages, matched.average_places, strict=True)
        rounding = AverageRounding(seed, [Places(place, origin=origin(x)) for x, place in places])
    averages, sources = all_local(matched.averages), all_local(sources)
    targets = all_local([pair.average for pair in matched.copied])
    copied = all_local([pair.source for pair in matched.copied])
    is_elsewhere = any(target.device != source.device for target, source in zip(targets, copied, strict=True))
    if is_elsewhere or (averages and averages[0].device != sources[0].device):
        wanted, devices = [*sources, *copied], [x.device for x in (*averages, *targets)]
        if skip is not None:
            wanted, devices = [*wanted, skip], [*devices, devices[0]]
        if is_copied_beside(wanted, devices):
            copies = HostCopies(wanted)

            @torch.no_grad()
            def move() -> None:
                fetched = copies.wait()
                skipped = None if skip is None else fetched.pop()
                _move(averages, targets, fetched, decay, skipped, backend, rounding)

            return Later(move)
        fetched = fetch(wanted, devices)
        skip = None if skip is None else fetched.pop()
        _move(averages, targets, fetched, decay, skip, backend, rounding)
        return None
    _move(averages, targets, [*sources, *copied], decay, skip, backend, rounding)
    return None


def _move(
    averages: list[Tensor],
    targets: list[Tensor],
    sources: list[Tensor],
    decay: float,
    skip: Tensor | None,
    backend: str | None,
    rounding: AverageRounding,
) -> None:
    """Move averages towards the first of ``sources``, and copy the others to ``targets``."""
    update_averages(averages, sources[: len(averages)], decay, skip, backend, rounding)
    if targets:
        copy_all(targets, sources[len(averages) :], skip)


@torch.no_grad()
def replace_all(replaced: Sequence[Replaced], policy: AveragePolicy, skip: Tensor | None) -> None:
    """Put copies of what cannot be copied in place into their slots. Waits for ``skip``, if it lies on a device."""
    if not replaced or (skip is not None and skip.item()):
        return
    for x in replaced:
        copied = policy.new(x.source)
        for slot in x.slots:
            slot.container[slot.key] = copied


def update_averages(
    averages: Sequence[Tensor],
    sources: Sequence[Tensor],
    decay: float,
    skip: Tensor | None,
    backend: str | None,
    rounding: AverageRounding = NEAREST,
) -> None:
    """Move averages towards sources that may lie on other devices, unless ``skip`` is true."""
    if is_compiling():
        reference.ema_(averages, sources, decay, skip)
        return
    if averages and select(backend, averages[0].device).try_ema_(averages, sources, decay, skip, rounding):
        torch.autograd.graph.increment_version(averages)
        return
    if any(average.shape != source.shape for average, source in zip(averages, sources, strict=True)):
        raise RuntimeError("averages and their sources differ in shape")
    parts: dict[torch.device, tuple[list[Tensor], list[Tensor], list[Places]]] = {}
    places = rounding.places or [Places()] * len(averages)
    for average, source, place in zip(averages, sources, places, strict=True):
        if average.numel() == 0:
            continue
        if average.is_conj():
            resolved = average.resolve_conj()
            update_averages([resolved], [source], decay, skip, backend)
            average.copy_(resolved)
            continue
        part = parts.setdefault(average.device, ([], [], []))
        part[0].append(as_real(average, written=True))
        part[1].append(as_real(source.to(average.device)))
        part[2].append(place)
    torch.autograd.graph.increment_version(averages)
    for device, (device_averages, device_sources, device_places) in parts.items():
        plain = all_plain(device_averages) and all_plain(device_sources)
        kernels = select(backend, device, in_memory=plain)
        its = rounding._replace(places=device_places) if rounding.places else NEAREST
        kernels.ema_(device_averages, device_sources, decay, skip, its)


def check_type(name: str, value: object, kinds: type | tuple[type, ...], what: str) -> None:
    """TypeError where an argument is of another type."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise TypeError(f"{name} must be {what}, got {value!r:.60}")


def check_step(step: object) -> None:
    """Raise where a number of updates is none."""
    check_type("step", step, Integral, "an integer")
    if not cast(int, step) >= 0:
        raise ValueError(f"step must not be negative, got {step}")


def check_unit_interval(name: str, value: float) -> None:
    """Raise where an argument is no number in [0, 1]."""
    check_type(name, value, (Real, torch.SymFloat), "a number")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
