"""Executes the compiled code of GPU kernels (PTX) on the CPU.

It finds what a GPU would not tell: races, accesses outside of tensors, barriers that not all threads reach.
"""

import ctypes
import struct
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch

from . import build

SYNCHRONIZES = ("bar", "membar", "fence")


class Site(NamedTuple):
    """A barrier or fence of a kernel."""

    kernel: str
    index: int
    opcode: str
    where: str


def clone_of_storage(storage):
    """As ``UntypedStorage.clone``, which deep copies of tensors use, but from the allocator that one can choose."""
    return torch.empty(storage.nbytes(), dtype=torch.uint8).untyped_storage().copy_(storage)


class Machine:
    """What tests may see and choose."""

    def __init__(self):
        self.library = build.machine()
        for name in ("ptx_kernel", "ptx_site", "ptx_run", "ptx_launches"):
            getattr(self.library, name).restype = ctypes.c_char_p if name != "ptx_kernel" else ctypes.c_void_p
        self.library.ptx_allocation.restype = self.library.ptx_accesses.restype = ctypes.c_uint64

    def kernel(self, name):
        found = self.library.ptx_kernel(name.encode())
        if found is None:
            raise KeyError(name)
        return ctypes.c_void_p(found)

    def run(self, name, blocks, threads, *arguments, shared_bytes=0):
        """Launch a kernel with tensors, or numbers as `struct` packs them. A fault is a RuntimeError.

        Parameters that are left out at the end are zeros.
        """
        kernel = self.kernel(name)
        packed = bytearray()
        for index, argument in enumerate(arguments):
            content = struct.pack("<Q", argument.data_ptr()) if hasattr(argument, "data_ptr") else argument
            offset = self.library.ptx_parameter(kernel, index, 0)
            assert len(content) == self.library.ptx_parameter(kernel, index, 1)
            packed[len(packed) :] = bytes(offset - len(packed)) + content
        fault = self.library.ptx_run(kernel, blocks, threads, bytes(packed) + bytes(64), shared_bytes)
        if fault is not None:
            raise RuntimeError(fault.decode())

    @contextmanager
    def schedule(self, resident=1, seed=0, races=False, missing_blocks=0):
        """Run so many blocks at a time; interrupt threads where a seed says; leave the last ones out."""
        self.library.ptx_schedule(resident, seed, races, missing_blocks)
        try:
            yield
        finally:
            self.library.ptx_schedule(1, 0, False, 0)

    @contextmanager
    def memory(self):
        """Make tensors on the machine's current device: it knows their ends."""
        self.library.ptx_allocate_here(1)
        try:
            with mock.patch.object(torch.UntypedStorage, "clone", clone_of_storage):
                yield
        finally:
            self.library.ptx_allocate_here(0)

    def contents(self):
        """What the tensors hold that `memory` made, by address."""
        found, size = {}, ctypes.c_uint64()
        while address := self.library.ptx_allocation(len(found), ctypes.byref(size)):
            found[address] = ctypes.string_at(address, size.value)
        return found

    def put_back(self, contents):
        """Let the tensors hold what they did."""
        for address, content in contents.items():
            ctypes.memmove(address, content, len(content))

    @contextmanager
    def device(self, index):
        """Make one of the two devices the current one of this thread."""
        self.library.ptx_set_device(index)
        try:
            yield
        finally:
            self.library.ptx_set_device(0)

    def synchronizations(self, name):
        """The barriers and fences of a kernel."""
        kernel, index = self.kernel(name), 0
        while (site := self._site(kernel, name, index)) is not None:
            if site.opcode.startswith(SYNCHRONIZES):
                yield site
            index += 1

    def _site(self, kernel, name, index):
        """The instruction of this number, or None past the last one."""
        where, opcode = (self.library.ptx_site(kernel, index, which) for which in (0, 1))
        return None if opcode is None else Site(name, index, opcode.decode(), where.decode())

    @contextmanager
    def without(self, site):
        """Run a kernel as if this barrier or fence were not there. Another kernel of its name is a LookupError."""
        kernel = self.kernel(site.kernel)
        if site != (found := self._site(kernel, site.kernel, site.index)):
            raise LookupError(f"{site} is of another kernel of this name: this one has {found} there")
        self.library.ptx_remove(kernel, site.index, 1)
        try:
            yield
        finally:
            self.library.ptx_remove(kernel, site.index, 0)

    def launches(self):
        """Device and name of the kernels that were launched since it was last asked."""
        found = self.library.ptx_launches().decode().split()
        return [(int(device), name) for device, _, name in (launch.partition(":") for launch in found)]

    def accesses(self):
        """How many accesses to global memory there were since it was last asked, by their bytes."""
        return {size: self.library.ptx_accesses(size) for size in (1, 2, 4, 8, 16)}

    @contextmanager
    def without_image(self, device):
        """As if the kernels were compiled for other GPUs than this one of the two devices."""
        self.library.ptx_without_image(device)
        try:
            yield
        finally:
            self.library.ptx_without_image(-1)

    def fail(self, launch):
        """Let the n-th launch from now on fail."""
        self.library.ptx_fail(launch)
