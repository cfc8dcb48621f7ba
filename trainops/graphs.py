"""Memory that CUDA graphs read again at each replay, kept for as long as they exist.

PyTorch does not say when a graph is destroyed. The driver does: a graph may own a "user object" (CUDA programming
guide, section on CUDA graphs), whose destructor runs with the graph and with everything that was made of it.
"""

import ctypes
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import core

_NO_DESTRUCTOR_SYNC, _MOVE = 1, 1  # CU_USER_OBJECT_NO_DESTRUCTOR_SYNC, CU_GRAPH_USER_OBJECT_MOVE

_kept: dict[int, Tensor] = {}  # by the flag that the graph raises when it is destroyed
_lock = threading.Lock()


def keep(memory: Tensor, stream: int) -> None:
    """Keep a tensor until the graph into which a stream captures is destroyed.

    Where the driver has no user objects (ROCm), it is kept until the process ends.
    """
    flag = core.new_flag()
    with _lock:
        _kept[flag] = memory
    if (driver := _driver()) is not None:
        _give_flag(driver, flag, stream)


def drop_unused() -> None:
    """Drop what was kept for graphs that are no more. Not for captures: freeing pinned memory may record an event."""
    if _kept:
        with _lock:
            for flag in [flag for flag in _kept if core.take_flag(flag)]:
                del _kept[flag]


@cache
def _driver() -> Any:
    """NVIDIA's driver, which PyTorch has loaded; None for others."""
    if torch.version.cuda is None:
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        # With user objects came a second version of the first.
        _ = driver.cuStreamGetCaptureInfo_v2, driver.cuUserObjectCreate, driver.cuGraphRetainUserObject
    except (OSError, AttributeError):
        return None
    return driver


def _give_flag(driver: Any, flag: int, stream: int) -> None:
    """Let a graph raise the flag when it is destroyed. If a call fails, the flag stays down."""
    status, graph, owned = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    by_reference, address = ctypes.byref, ctypes.c_void_p
    if driver.cuStreamGetCaptureInfo_v2(
        address(stream), by_reference(status), None, by_reference(graph), None, None
    ) or driver.cuUserObjectCreate(
        by_reference(owned), address(flag), address(core.RAISE_FLAG), 1, _NO_DESTRUCTOR_SYNC
    ):
        return
    driver.cuGraphRetainUserObject(graph, owned, 1, _MOVE)
