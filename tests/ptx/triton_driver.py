"""A driver with which Triton compiles its kernels for a GPU and launches them here, on CPU tensors.

To be used in a process of its own, with ``TRITON_INTERPRET=0``: a process has one driver, and an interpreter or none.
"""

import struct
from collections import defaultdict
from contextlib import contextmanager

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

from trainops.adapters import _device
from trainops.adapters import triton as backend
from trainops.adapters.interface import Backend

from . import Machine, build

CODES = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
CODES |= {"fp32": "f", "fp64": "d"}


class Driver:
    """What Triton asks of a driver."""

    def __init__(self, architecture):
        self.architecture = architecture
        self.utils = self

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, _):
        return {"max_shared_mem": 166912, "multiprocessor_count": 4, "warpSize": 32}


def launcher(machine, compiled, run):
    """What launches a kernel, in place of a GPU's."""
    library = build.kernels(compiled.asm["ptx"])
    types = list(compiled.src.signature.values())
    metadata = compiled.metadata

    def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
        assert (y, z) == (1, 1)
        arguments = [
            value if kind[0] == "*" else struct.pack(f"<{CODES[kind]}", value)
            for kind, value in zip(types, args, strict=True)
            if kind != "constexpr"
        ]
        library.add()  # kernels of several types have one name
        threads = 32 * metadata.num_warps
        run(compiled, lambda: machine.run(compiled.name, x, threads, *arguments, shared_bytes=metadata.shared))

    return launch


class Launches:
    """What was launched: kernels as Triton compiled them."""

    def __init__(self):
        self.kernels = {}  # by hash
        self.unnoticed = {}  # barriers without which all went well, by hash

    def __call__(self, compiled, launch):
        launch()
        self.kernels[compiled.hash] = compiled


class WithoutBarriers(Launches):
    """Runs each kernel once more without each of its barriers; `unnoticed` keeps those that make no difference.

    A difference is a fault, a race above all, or another content of memory. What a barrier is for depends on the
    launch: those without which one goes well are taken out of some more.
    """

    LAUNCHES = 12

    def __init__(self, machine):
        super().__init__()
        self.machine = machine
        self.count = defaultdict(int)
        self.is_on = True

    def __call__(self, compiled, launch):
        if not self.is_on:
            super().__call__(compiled, launch)
            return
        if compiled.hash not in self.unnoticed:
            self.unnoticed[compiled.hash] = list(self.machine.synchronizations(compiled.name))
        self.count[compiled.hash] += 1
        if not self.unnoticed[compiled.hash] or self.count[compiled.hash] > self.LAUNCHES:
            super().__call__(compiled, launch)
            return
        before = self.machine.contents()
        super().__call__(compiled, launch)
        after = self.machine.contents()
        self.unnoticed[compiled.hash] = [
            site for site in self.unnoticed[compiled.hash] if not self.is_noticed(site, launch, before, after)
        ]
        self.machine.put_back(after)

    def is_noticed(self, site, launch, before, after):
        self.machine.put_back(before)
        try:
            with self.machine.without(site):
                launch()
        except RuntimeError:
            return True
        return self.machine.contents() != after


@contextmanager
def through_ptx(architecture=80, launches=None):
    """The Triton backend takes CPU tensors, and its kernels run as PTX. Gives the machine and the launches."""
    machine = Machine()
    launches = Launches() if launches is None else launches(machine)
    triton.knobs.cache.dir = str(build.ROOT / build.FOLDER / "triton")  # what has not changed is not compiled again
    triton.runtime.driver.set_active(Driver(architecture))

    def init_handles(self):
        self._run = self._run or launcher(machine, self, launches)

    CompiledKernel._init_handles = init_handles
    backend.refusal = lambda device: "" if device.type == "cpu" else "it takes CPU tensors"
    backend.probe = lambda: Backend(available=True, details="PTX on the CPU")
    upload = _device.uploaded
    _device.uploaded = backend.uploaded = lambda words, device: upload(words, device).clone()
    with machine.memory():
        yield machine, launches
