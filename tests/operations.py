"""Modes that see PyTorch's operations, and calls of its functions."""

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Notes what is done."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__.rstrip("_"))
        return function(*args, **(kwargs or {}))


class FunctionCalls(TorchFunctionMode):
    """Notes which functions are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__.rstrip("_"))
        return function(*args, **(kwargs or {}))
