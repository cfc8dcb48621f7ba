"""The CUDA backend with its compiled kernels executed by the machine."""

import re
from contextlib import contextmanager

import cuda_shim
import torch

from trainops import core
from trainops.adapters import _cuda_memory, _device, cuda
from trainops.uploads import Recent, uploaded

from . import Machine, build


def api_of_torch():
    """How C++ reads tensors, where this PyTorch has it."""
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def see_tensors(describe, api):
    """Choose how C++ reads tensors."""
    core.reader.configure(api=api, describe=describe, plain_types=(torch.Tensor, torch.nn.Parameter))


class CudaBackend:
    """In place of the backend's module, while it is active."""

    def __init__(self, architecture=80):
        self.machine = Machine()
        path, self.texts, self.libraries = build.cuda_module(architecture)
        self.module = cuda_shim.load(path, "ptx._cuda")

    @contextmanager
    def active(self):
        """Tensors that are made meanwhile, and these alone, lie where the machine can reach them."""
        names = [(cuda, "_cuda"), (_cuda_memory, "scratches"), (cuda, "uploaded"), (_device, "uploaded")]
        before = [(module, name, getattr(module, name)) for module, name in names]
        for library in self.libraries:  # kernels of several architectures have one name
            library.add()
        cuda._cuda, _cuda_memory.scratches = self.module, Recent(32)
        cuda.uploaded = _device.uploaded = lambda words, device: uploaded(words, device).clone()
        try:
            with self.machine.memory():
                yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)

    def kernels(self):
        """The names of all kernels, by the stem of their source."""
        pattern = re.compile(r"\.entry\s+(\w+)")
        return {stem: pattern.findall(text) for stem, text in self.texts.items()}
