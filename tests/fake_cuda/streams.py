"""Streams, events and graphs, which order what is put on them.

Clocks count the operations of each stream: a stream's says how many of every other's are done before what comes next
on it, and the host's how many it knows to be done.
"""

import ctypes
from collections import Counter
from functools import partial


class Event:
    """A point of a stream."""

    def __init__(self, fake):
        self.fake, self.clock, self.graph = fake, Counter(), None

    def record(self, stream=None):
        stream = stream or self.fake.current_stream()
        self.clock, self.graph = stream.clock.copy(), stream.graph

    def wait(self, stream=None):
        (stream or self.fake.current_stream()).wait_event(self)

    def query(self):
        self.fake.refuse_in_capture("to ask an event")
        self.fake.host |= self.clock
        return True

    def synchronize(self):
        self.fake.synchronize("an event", self.clock)


class Stream:
    """A queue of a device."""

    def __init__(self, fake, device, handle):
        self.fake, self.device, self.cuda_stream = fake, device, handle
        self.clock, self.graph = Counter(), None  # the graph that it captures into

    def record_event(self, event=None):
        event = event or Event(self.fake)
        event.record(self)
        return event

    def wait_event(self, event):
        if self.graph is not event.graph:
            raise RuntimeError("CUDA: what a stream captures and what it does not cannot wait for each other")
        self.clock |= event.clock

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        self.fake.synchronize("a stream", self.clock)


class Graph:
    """Captured operations, which a replay puts on a stream. What it allocated stays until it is destroyed."""

    def __init__(self, fake):
        self.fake, self.operations, self.destructors, self.is_alive = fake, [], [], True
        self.handle = next(fake.handles)
        fake.graphs[self.handle] = self

    def capture_begin(self, pool=None, capture_error_mode="global"):
        self.stream = self.fake.current_stream()
        self.stream.graph = self

    def capture_end(self):
        self.stream.graph = None

    def replay(self):
        stream = self.fake.current_stream()
        for operation in self.operations:
            self.fake.perform(stream, *operation)

    def reset(self):
        """Destroy what was captured, and tell those who kept something for it."""
        destructors, self.operations, self.destructors, self.is_alive = self.destructors, [], [], False
        for destroy in destructors:
            destroy()

    def __del__(self):
        self.reset()


class Driver:
    """The calls of NVIDIA's driver by which a graph comes to own an object."""

    def __init__(self, fake):
        self.fake, self.destructors = fake, {}

    def cuStreamGetCaptureInfo_v2(self, stream, status, number, graph, dependencies, count):  # noqa: N802
        graph._obj.value = next(x.graph for x in self.fake.streams.values() if x.cuda_stream == stream.value).handle
        return 0

    def cuUserObjectCreate(self, created, argument, destroy, references, flags):  # noqa: N802
        created._obj.value = next(self.fake.handles)
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(destroy.value)
        self.destructors[created._obj.value] = partial(function, argument.value)
        return 0 if (references, flags) == (1, 1) else 1

    def cuGraphRetainUserObject(self, graph, owned, references, flags):  # noqa: N802
        self.fake.graphs[graph.value].destructors.append(self.destructors.pop(owned.value))
        return 0 if (references, flags) == (1, 1) else 1
