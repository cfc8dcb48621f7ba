"""A driver with which Triton compiles its kernels for a GPU and launches them here, on CPU tensors.

To be used in a process of its own, with ``TRITON_INTERPRET=0``: a process has one driver, and an interpreter or none.
"""

import struct
from contextlib import contextmanager

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

from trainops import device_table
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


def launcher(machine, compiled, launched):
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
        launched.append(compiled.name)
        machine.run(compiled.name, x, 32 * metadata.num_warps, *arguments, shared_bytes=metadata.shared)

    return launch


@contextmanager
def through_ptx(architecture=80):
    """The Triton backend takes CPU tensors, and its kernels run as PTX. Gives the machine and the launches' names."""
    machine, launched = Machine(), []
    triton.runtime.driver.set_active(Driver(architecture))

    def init_handles(self):
        self._run = self._run or launcher(machine, self, launched)

    CompiledKernel._init_handles = init_handles
    backend.serves = lambda device_type: device_type == "cpu"
    backend.probe = lambda: Backend(available=True, details="PTX on the CPU")
    upload = device_table.uploaded
    device_table.uploaded = backend.uploaded = lambda words, device: upload(words, device).clone()
    with machine.memory():
        yield machine, launched
