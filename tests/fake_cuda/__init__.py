"""CUDA without a GPU: devices, streams, events, pinned memory and graphs, as far as trainops' host side uses them.

Tensors of a fake device lie in the memory of the CPU. What is put on a stream is done at once, and what is captured
is done at each replay, so results are right wherever the host side is. A GPU would do it later, and would not tell
what is wrong. ``faults`` does: two streams use memory in no order; memory is freed, or written by the host, before a
stream has read it; a graph uses memory that was freed.

What CUDA refuses is a RuntimeError: during a capture, to wait for a device and to allocate pinned memory.
``synchronizations`` has the reasons for which the host waited for a device, but for those of threads that work beside
the others (``beside``). ``backends.py`` lets kernels run.
"""

import bisect
import itertools
import threading
import weakref
from collections import Counter
from contextlib import contextmanager

import torch

from .memory import Block, extent, placed
from .streams import Driver, Event, Graph, Stream
from .tensors import HOST, DeviceTensor, FakeDevices, copy

__all__ = ["HOST", "DeviceTensor", "FakeCuda", "copy"]


class FakeCuda:
    """The devices, and the functions of ``torch.cuda`` by their names."""

    def __init__(self, devices=2):
        self.faults, self.synchronizations, self.operations = [], [], []  # the last: names of what streams did
        self.blocks, self.host, self.lock = [], Counter(), threading.RLock()
        self.thread = threading.local()  # the current device, and the current stream of each
        self.handles, self.driver = itertools.count(16), Driver(self)
        self.graphs = weakref.WeakValueDictionary()
        places = [torch.device("cuda", i) for i in range(devices)]
        self.streams = {(device, 0): Stream(self, device, 0) for device in places}  # by their handles, too

    @contextmanager
    def active(self, monkeypatch):
        """Stand in for ``torch.cuda``."""
        for name in ("current_device", "set_device", "current_stream", "set_stream", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("device", "stream", "graph", "default_stream", "is_current_stream_capturing"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(self))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda **_: Graph(self))
        with FakeDevices(self):
            yield self

    def in_thread(self, function, beside=False):
        """Start a host thread that has the devices, too. ``beside``: others do not wait for it."""

        def work():
            self.thread.is_beside = beside
            with FakeDevices(self):
                function()

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    # torch.cuda

    def current_device(self):
        return getattr(self.thread, "device", 0)

    def set_device(self, device):
        self.thread.device = device if isinstance(device, int) else torch.device(device).index

    def default_stream(self, device=None):
        device = self.current_device() if device is None else device
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return self.streams[torch.device("cuda", self.current_device()) if device.index is None else device, 0]

    def current_stream(self, device=None):
        stream = self.default_stream(device)
        return getattr(self.thread, "streams", {}).get(stream.device, stream)

    def set_stream(self, stream):
        self.set_device(stream.device)
        self.thread.streams = {**getattr(self.thread, "streams", {}), stream.device: stream}

    def new_stream(self, device=None, priority=0):
        stream = Stream(self, self.current_stream(device).device, next(self.handles))
        return self.streams.setdefault((stream.device, stream.cuda_stream), stream)

    @contextmanager
    def device(self, device):
        before = self.current_device()
        self.set_device(device)
        try:
            yield
        finally:
            self.set_device(before)

    @contextmanager
    def stream(self, stream):
        before, device = self.current_stream(stream.device), self.current_device()
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(before)
            self.set_device(device)

    @contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        self.synchronize()
        with self.stream(stream or self.new_stream()):
            graph.capture_begin()
            try:
                yield
            finally:
                graph.capture_end()

    def is_current_stream_capturing(self):
        return self.current_stream().graph is not None

    def synchronize(self, reason="the device", clock=None):
        self.refuse_in_capture(f"to wait for {reason}")
        if not getattr(self.thread, "is_beside", False):
            self.synchronizations.append(reason)
        for known in [stream.clock for stream in self.streams.values()] if clock is None else [clock]:
            self.host |= known

    def refuse_in_capture(self, what):
        if any(stream.graph is not None for stream in self.streams.values()):
            raise RuntimeError(f"CUDA: operation not permitted when stream is capturing: {what}")

    # Memory

    def on(self, x, device=0):
        """A copy of a tensor of the CPU on a device, as if it had been there for long."""
        device = torch.device("cuda", device) if isinstance(device, int) else device
        memory = self.allocate(x, device)
        memory.copy_(x.detach())
        return DeviceTensor(self, memory, device)

    def allocate(self, like, device):
        """Memory for such a tensor on a device, or pinned, with any content: a tensor of the CPU."""
        if device == HOST:
            self.refuse_in_capture("to allocate pinned memory")
        block = Block(extent(like) * like.itemsize, device, None if device == HOST else self.current_stream(device))
        memory = block.memory()
        weakref.finalize(memory, self._free, block).atexit = False
        with self.lock:
            bisect.insort(self.blocks, block, key=lambda x: x.begin)
        return placed(memory, like)

    def _free(self, block):
        with self.lock:
            block.is_free = True
            if block.stream is not None and block.graph is None:
                known, pending = block.stream.clock | self.host, block.written | block.read
                if any(known[stream] < when for stream, when in pending.items()):
                    self.faults.append("memory is freed while another stream may use it")

    def block(self, address):
        """The block with that address, if there is one."""
        with self.lock:
            index = bisect.bisect_right(self.blocks, address, key=lambda x: x.begin) - 1
            found = self.blocks[index] if index >= 0 else None
        return found if found is not None and address < found.end else None

    def blocks_of(self, *tensors):
        return [found for x in tensors if (found := self.block(x.data_ptr())) is not None]

    def alias(self, x):
        """The memory of a tensor, for an operation that may be done later; other objects as they are."""
        memory = x.memory if isinstance(x, DeviceTensor) else x
        block = self.block(memory.data_ptr()) if isinstance(memory, torch.Tensor) else None
        return memory if block is None else block.alias(memory)

    # Order

    def touch(self, x, writes=False):
        """The host reads or writes a tensor in pinned memory."""
        for block in self.blocks_of(x):
            if block.device == HOST:
                self._access(block, "the host", self.host, None, writes)

    def run(self, stream, name, touches, action):
        """Put an operation on a stream, or into the graph that it captures.

        ``touches()``: the blocks that it reads, and those that it writes.
        """
        if stream.graph is None:
            self.perform(stream, name, touches, action)
            return
        stream.graph.operations.append((name, touches, action))
        for block in touches()[0]:
            block.read_by.add(stream.graph)

    def perform(self, stream, name, touches, action):
        """Do an operation of a stream."""
        with self.lock:
            stream.clock |= self.host
            stream.clock[stream] += 1
            self.operations.append(name)
            reads, writes = (list(dict.fromkeys(blocks)) for blocks in touches())
            for block in [x for x in reads if x not in writes] + writes:
                if block.device not in (stream.device, HOST) and name != "copy":
                    self.faults.append(f"{name} uses memory of another device")
                self._access(block, name, stream.clock, stream, block in writes)
            with torch._C.DisableTorchFunction():
                action()

    def _access(self, block, name, clock, stream, writes):
        what = f"{name} {'writes' if writes else 'reads'} memory"
        if block.is_gone:
            self.faults.append(f"{what} that was freed")
        earlier = block.written | block.read if writes else block.written
        if any(clock[other] < when for other, when in earlier.items()):
            self.faults.append(f"{what} that another stream may be using")
        if writes and stream is None and any(graph.is_alive for graph in block.read_by):
            self.faults.append(f"{what} that a graph reads")
        if writes:
            block.written, block.read = Counter(), Counter()
        if stream is not None:
            (block.written if writes else block.read)[stream] = clock[stream]
