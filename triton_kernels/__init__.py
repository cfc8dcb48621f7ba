"""The Triton kernels, installed as ``trainops.triton_kernels`` and imported when one of them is first wanted."""

from . import _common, drop_path, ema, reduce, transform, update

__all__ = ["_common", "drop_path", "ema", "reduce", "transform", "update"]
