"""What a step tells kernels on a device, whichever backend they are of."""

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._interface import AdamWGroup, StepControl


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device current, where launches go and captures are looked for."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def there(x: Tensor | None, device: torch.device, dtype: torch.dtype | None = None) -> Tensor | None:
    """``x`` on the device, in that dtype if one is given."""
    return None if x is None else x.to(device, dtype or x.dtype)


def hand_back(counter: Tensor | None, control: StepControl) -> None:
    """Tells the step's count of skipped steps what ``counter`` is now, where that is a copy on another device."""
    if counter is not None and counter is not control.skipped_steps and control.skipped_steps is not None:
        control.skipped_steps.copy_(counter)


def settings_words(
    groups: Sequence[AdamWGroup], control: StepControl, ema_decay: float, device: torch.device
) -> bytes:
    """What does not change from row to row, in 64-bit words.

    Two for the step: ``max_norm`` and the average's decay; then eight for each group: its learning rate, or the
    address of a float32, or of a float64, that holds it; beta1, beta2, eps, weight decay, and whether it maximizes.
    """
    words = struct.pack("2d", 0.0 if control.max_norm is None else control.max_norm, ema_decay)
    for group in groups:
        lr = _learning_rate(group.lr, device)
        floats = group.beta1, group.beta2, group.eps, group.weight_decay
        words += struct.pack("d2q4dq", *lr, *floats, group.maximize)
    return words


def _learning_rate(lr: float | Tensor, device: torch.device) -> tuple[float, int, int]:
    """Its value, or its address on the device, where it stays: that of a float32, or of a float64."""
    if not isinstance(lr, Tensor) or lr.device != device or lr.dtype not in (torch.float32, torch.float64):
        return float(lr), 0, 0
    return (0.0, lr.data_ptr(), 0) if lr.dtype == torch.float32 else (0.0, 0, lr.data_ptr())
