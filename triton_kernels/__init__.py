"""The Triton kernels, installed as ``trainops.triton_kernels`` and imported when one of them is first wanted."""

from . import _common, adamw, clip_grad_norm, drop_path, ema

__all__ = ["_common", "adamw", "clip_grad_norm", "drop_path", "ema"]
