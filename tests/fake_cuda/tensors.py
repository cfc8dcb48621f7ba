"""Tensors on fake devices: PyTorch's operations on them, copies, and what the host does with pinned memory."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
HOST = torch.device("cpu")
# What is asked of a tensor without a look at its elements.
ASKS = {"__get__", "data_ptr", "size", "stride", "numel", "dim", "is_pinned", "view", "detach", "untyped_storage"}
NUMBERS = {"__float__": float, "__int__": int, "__bool__": bool}


class DeviceTensor(torch.Tensor):
    """A tensor on a fake device. ``memory``: a tensor of the CPU where its elements are."""

    @staticmethod
    def __new__(cls, fake, memory, device):
        x = torch.Tensor._make_wrapper_subclass(
            cls, memory.shape, strides=memory.stride(), dtype=memory.dtype, device=device
        )
        x.fake, x.memory = fake, memory
        return x

    def data_ptr(self):
        return self.memory.data_ptr()

    def __deepcopy__(self, memo):
        copy = self.detach().clone()
        memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if hasattr(self, "_is_param") else copy
        return memo[id(self)]

    def __repr__(self, **_):
        return f"{self.memory!r} on {self.device}"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        fake = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, DeviceTensor)).fake
        with torch._C.DisableTorchFunction():
            return operate(fake, function, args, kwargs or {})


class FakeDevices(TorchFunctionMode):
    """While it is active, in this thread, functions of PyTorch know the fake devices."""

    def __init__(self, fake):
        super().__init__()
        self.fake = fake

    def __torch_function__(self, function, types, args=(), kwargs=None):
        fake, kwargs, name = self.fake, kwargs or {}, getattr(function, "__name__", "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = any(isinstance(x, DeviceTensor) for x in tensors)
        if function is torch.Tensor.to:
            options = {key: value for key, value in kwargs.items() if key != "copy"}
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **options)
            if device is not None and device.type == "cuda":
                return to(fake, args[0], fake.current_stream(device).device, dtype, non_blocking)
        # Some would look for the device before they are dispatched.
        if on_device and function is torch.Tensor.copy_:
            return operate(fake, aten.copy_.default, args, kwargs)
        if on_device and name in NUMBERS:
            return NUMBERS[name](args[0].item())
        if not on_device and torch.device(kwargs.get("device") or HOST).type == "cuda":
            return make(fake, name, function(*args, **{**kwargs, "device": HOST}), kwargs["device"])
        if kwargs.get("pin_memory"):
            return fake.allocate(function(*args, **{**kwargs, "pin_memory": False}), HOST)
        if function is torch.Tensor.pin_memory:
            return fake.allocate(args[0], HOST).copy_(args[0])
        if not on_device and name not in ASKS:
            for i, x in enumerate(tensors):
                fake.touch(x, writes=i == 0 and name != "__init__" and name.rstrip("_") + "_" == name)
        return function(*args, **kwargs)


def make(fake, name, value, device):
    """A new tensor on a device."""
    stream = fake.current_stream(device)
    memory = fake.allocate(value, stream.device)
    if name != "empty":
        target, blocks = fake.alias(memory), fake.blocks_of(memory)
        fake.run(stream, name, lambda: ([], blocks), lambda: target.copy_(value))
    if name == "tensor":
        fake.synchronize("a new tensor's content", stream.clock)
    return DeviceTensor(fake, memory, stream.device)


def to(fake, x, device, dtype=None, non_blocking=False, **_):
    """``Tensor.to``."""
    x = x if dtype in (None, x.dtype) else x.to(dtype)
    if x.device == device:
        return x
    memory = x.memory if isinstance(x, DeviceTensor) else x
    if device == HOST:
        target = fake.allocate(memory, HOST) if non_blocking else torch.empty_like(memory)
    else:
        target = DeviceTensor(fake, fake.allocate(memory, device), device)
    return copy(fake, target, x, non_blocking)


def copy(fake, target, source, non_blocking=False):
    """Copy from device to device, or between one and the host, which waits unless its memory is pinned."""
    stream = fake.current_stream(target.device if source.device == HOST else source.device)
    host = next((x for x in (target, source) if x.device == HOST), None)
    waits = host is not None and not (non_blocking and fake.blocks_of(host))
    if waits:
        fake.refuse_in_capture("a copy that the host waits for")
    other = fake.current_stream(target.device) if host is None else stream
    stream.wait_stream(other)
    reads, writes, into, value = (
        fake.blocks_of(source),
        fake.blocks_of(target),
        fake.alias(target),
        fake.alias(source),
    )
    fake.run(stream, "copy", lambda: (reads, writes), lambda: into.copy_(value))
    other.wait_stream(stream)
    if waits:
        fake.synchronize("a copy", stream.clock)
    return target


def operate(fake, function, args, kwargs):
    """An operation of PyTorch, some of whose tensors lie on a device."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    first = next(x for x in tensors if isinstance(x, DeviceTensor))
    device = torch.device(kwargs.get("device") or first.device)
    if function is aten._local_scalar_dense.default:
        fake.synchronize("item()", fake.current_stream(device).clock)
        return function(first.memory)
    if function is aten.copy_.default and tensors[0].device != tensors[1].device:
        return copy(fake, *tensors, kwargs.get("non_blocking", len(args) > 2 and args[2]))
    if function is aten._to_copy.default and device != first.device:
        return to(fake, first, **{"device": device, **kwargs})
    kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "layout")}
    schema, name, stream = function._schema, function.overloadpacket.__name__, fake.current_stream(device)
    if not schema.is_mutable and any(x.alias_info for x in schema.returns):  # a view
        return DeviceTensor(fake, function(first.memory, *args[1:], **kwargs), device)
    reads = fake.blocks_of(*tensors)
    args, kwargs = tree_map(fake.alias, (args, kwargs))
    if schema.is_mutable:
        is_written = [x.alias_info is not None and x.alias_info.is_write for x in schema.arguments]
        written = [x for mark, x in zip(is_written, args, strict=False) if mark]
        writes = fake.blocks_of(*(x for x in tree_leaves(written) if isinstance(x, torch.Tensor)))
        fake.run(stream, name, lambda: (reads, writes), lambda: function(*args, **kwargs))
        return tensors[0] if schema.returns else None
    memories = tree_map(lambda x: fake.allocate(x, device), function(*args, **kwargs))
    targets = [fake.alias(x) for x in tree_leaves(memories)]
    writes = fake.blocks_of(*targets)

    def compute():
        for target, value in zip(targets, tree_leaves(function(*args, **kwargs)), strict=True):
            target.copy_(value)

    fake.run(stream, name, lambda: (reads, writes), compute)
    return tree_map(lambda x: DeviceTensor(fake, x, device), memories)
