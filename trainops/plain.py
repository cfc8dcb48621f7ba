"""Whether kernels may be used: the one rule, which asks the tensors and whoever looks on.

Kernels work on memory, and nobody sees them do so. They may serve tensors that are memory and nothing else, while
nobody wants to see operations. The rest is done in PyTorch's operations.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_function_stack_at,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._device import DeviceContext

# Subclasses give operations another meaning; these do not.
PLAIN = frozenset((Tensor, torch.nn.Parameter))


def all_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether none is of a subclass that gives operations another meaning."""
    return PLAIN.issuperset(map(type, tensors))


def all_in_memory(tensors: Iterable[Tensor]) -> bool:
    """Whether the elements of all lie in memory of this rank: plain tensors, and DTensors whose shards are plain."""
    return all(type(x) in PLAIN or type(getattr(x, "_local_tensor", None)) in PLAIN for x in tensors)


def is_transformed() -> bool:
    """Whether others than autograd look at what is done: then it is done in PyTorch's operations.

    Compilers fuse them with what stands around them; tracers record them; function transforms, forward-mode
    derivatives and modes (counters, FakeTensorMode, make_fx; any TorchFunctionMode) take them apart.
    """
    return (
        is_compiling()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack() > 0
        or (_len_torch_function_stack() > 0 and _has_function_modes())
        or forward_ad._current_level >= 0
    )


def _has_function_modes() -> bool:
    """Whether there is a TorchFunctionMode beside PyTorch's own for the default device, which makes no difference."""
    modes = map(_get_function_stack_at, range(_len_torch_function_stack()))
    return any(type(mode) is not DeviceContext for mode in modes)
