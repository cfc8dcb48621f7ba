"""The kernels on fake devices: those of ``cuda`` through ``cuda_shim``, those of ``triton`` interpreted.

A kernel is taken to write every tensor that its table or its arguments name, and to read the words alone.
"""

import functools
import sys
import threading
from array import array
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from targets import SHIM, TARGETS

from trainops import adapters, background, copies, core, graphs, plain, uploads
from trainops.adapters import _cuda_memory, _triton, cuda, triton
from trainops.uploads import Recent

from . import DeviceTensor, FakeCuda

BACKENDS = [name for name in ("cuda", "triton") if SHIM and any(target.backend == name for target in TARGETS)]


class Worker:
    """In place of the thread of ``trainops.background``. Its work is done in turn, and not before ``allowed``."""

    def __init__(self, fake):
        self.fake, self.allowed, self.last = fake, threading.Event(), None
        self.allowed.set()

    def submit(self, work):
        future, before = Future(), self.last

        def do():
            if before is not None:
                before.exception()
            self.allowed.wait()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self.last = future
        self.fake.in_thread(do, beside=True)
        return future


class Touched:
    """The blocks that a launch reads and writes, as its words say when it begins."""

    def __init__(self, fake, rows, words, others):
        self.fake, self.rows, self.words, self.others = fake, rows, words, others

    def __call__(self):
        read = list(map(self.fake.block, self.words))
        rows = self.fake.block(self.rows)
        return [rows, *self._named(read)], [*self._named([rows])[1:], *self._find(self.others)]

    def _find(self, addresses):
        return [block for address in addresses if address and (block := self.fake.block(address)) is not None]

    def _named(self, blocks):
        return [found for block in blocks for found in (block, *self._find(block.words()))]


class CudaModule:
    """``trainops._cuda`` for fake devices."""

    DEVICE_TYPE = "cuda"
    LAUNCHES = ("reduce", "scale", "clamp", "ema", "update")

    def __init__(self, fake, module):
        self.fake, self.module = fake, module

    def __getattr__(self, name):
        value = getattr(self.module, name)
        return functools.partial(self.launch, name, value) if name in self.LAUNCHES else value

    def refusal(self, device):
        """The kernels load on every fake device."""
        return ""

    def StagedTable(self, table, *, words, rows, chunks, chunk_count, all_chunks, stream):  # noqa: N802
        """It holds the table and its words, but what it launches does not: a graph holds nothing."""
        tensor = torch.zeros(1, dtype=torch.float64 if table.has_float64 else torch.float32)
        names = [column.name for column in core.schema(table.kind, table.averages).columns]
        columns = {name: [None if name == "master" else tensor] * table.rows for name in names}
        places = []
        if table.is_special:
            columns[names[0]] = [tensor.bfloat16()] * table.rows
            places = [(0, [], 0, True)] * table.rows
        place = {"words": None, "rows": rows, "chunks": chunks, "stream": 0}
        place |= {"chunk_count": chunk_count, "all_chunks": all_chunks}
        staged = self.module.StagedTable(core.table(table.kind, columns, "cpu", places=places), **place)
        on = self.fake.streams[torch.device("cuda", table.device_index), stream]
        return (staged, rows, chunks, on), (table, words)

    def launch(self, name, function, table, **arguments):
        staged, rows, chunks, stream = table[0]
        words = arguments.get("words", b"")
        inline = array("q", words) if isinstance(words, bytes) else ()
        others = [x for key, x in arguments.items() if type(x) is int and key != "words"]
        touched = Touched(self.fake, rows, [chunks] + [words] * isinstance(words, int), [*others, *inline])
        self.fake.run(stream, name, touched, lambda: function(staged, **arguments))


def launch_triton(fake, launch, kernel, programs, *args, **constants):
    """In place of ``_triton.launch``."""
    tensors = [x for x in args if isinstance(x, DeviceTensor)]
    aliases = list(map(fake.alias, args))
    are_words = [x.data_ptr() for x in tensors[1:] if x.dtype == torch.int64 and x.ndim == 1]
    others = [x.data_ptr() for x in tensors[1:] if x.data_ptr() not in are_words]
    touched = Touched(fake, tensors[0].data_ptr(), are_words, others)
    stream = fake.current_stream(tensors[0].device)
    fake.run(stream, kernel.fn.__name__, touched, lambda: launch(kernel, programs, *aliases, **constants))


def forget_uploads(fake, monkeypatch):
    """Nothing was uploaded, prepared or captured before, and the graphs are those of the fake."""
    for name, value in (("_uploads", Recent(128)), ("_spares", Recent(32)), ("_prepared", False)):
        monkeypatch.setattr(uploads, name, value)
    monkeypatch.setattr(graphs, "_kept", {})
    monkeypatch.setattr(graphs, "_driver", lambda: fake.driver)


@contextmanager
def fake_devices(monkeypatch):
    """Two devices on which the backends run."""
    fake = FakeCuda()
    plain_types = frozenset((*plain.PLAIN, DeviceTensor))
    for name, module in list(sys.modules.items()):
        if name.startswith("trainops.") and hasattr(module, "PLAIN"):
            monkeypatch.setattr(module, "PLAIN", plain_types)

    def describe(x):
        if not isinstance(x, DeviceTensor):
            fake.touch(x)
        return core.describe(x)

    monkeypatch.setattr(plain, "_has_function_modes", lambda: False)  # the fake is one, and no onlooker
    monkeypatch.setattr(cuda, "_cuda", CudaModule(fake, cuda._cuda))
    monkeypatch.setattr(_cuda_memory, "scratches", Recent(32))
    forget_uploads(fake, monkeypatch)
    monkeypatch.setattr(triton, "refusal", lambda device: "" if device.type == "cuda" else "it takes CUDA tensors")
    monkeypatch.setattr(_triton, "launch", functools.partial(launch_triton, fake, _triton.launch))
    fake.worker = Worker(fake)
    monkeypatch.setattr(background, "_worker", lambda: fake.worker)
    monkeypatch.setattr(copies, "_side_streams", {})
    adapters._select.cache_clear()
    core.reader.configure(api=None, describe=describe, plain_types=tuple(plain_types))
    try:
        with fake.active(monkeypatch):
            yield fake
    finally:
        adapters._select.cache_clear()
        api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
        core.reader.configure(api=api, describe=core.describe, plain_types=(torch.Tensor, torch.nn.Parameter))
