"""What tests of the host side share: a model on a fake device beside its twin on the CPU."""

import pytest
import torch
from fake_cuda.backends import BACKENDS, fake_devices
from targets import SHIM
from torch import nn

import trainops

SHAPES = [(5, 7), (), (1025,), (9000,)]
needs_shim = pytest.mark.skipif(SHIM is None, reason="the CUDA kernels are not compiled for the CPU")


@pytest.fixture
def fake(monkeypatch):
    with fake_devices(monkeypatch) as devices:
        yield devices
        assert not devices.faults, devices.faults


@pytest.fixture(params=BACKENDS)
def gpu_backend(request):
    return request.param


class Training:
    """A model on a fake device, and its twin on the CPU, with the same gradients."""

    def __init__(self, fake, backend, device=0, dtype=torch.float32, **options):
        options = {"lr": 0.1, "max_grad_norm": 1.0, "skip_nonfinite": True} | options
        self.fake = fake
        values = [torch.randn(shape).to(dtype) for shape in SHAPES]
        self.params, self.twins = ([nn.Parameter(make(x)) for x in values] for make in (self.on(device), torch.clone))
        self.models = [nn.ParameterList(params) for params in (self.params, self.twins)]
        self.emas = [
            trainops.EMA(model, 0.9, backend=name) for model, name in zip(self.models, (backend, "cpu"), strict=True)
        ]
        self.optimizer, self.twin = (
            trainops.AdamW(model.parameters(), ema=ema, backend=name, **options)
            for model, ema, name in zip(self.models, self.emas, (backend, "cpu"), strict=True)
        )
        for p in self.params:
            p.grad = torch.zeros_like(p)

    def on(self, device):
        return lambda x: self.fake.on(x, device)

    def set_grads(self):
        """New values in the same gradients."""
        for p, twin in zip(self.params, self.twins, strict=True):
            twin.grad = torch.randn(twin.shape).to(twin.dtype)
            p.grad.copy_(self.fake.on(twin.grad, p.device))

    def step(self, step=None):
        self.set_grads()
        (step or self.optimizer.step)()
        self.twin.step()

    def warm_up(self, stream):
        """Some steps on another stream, as PyTorch's documentation has it."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, stream=None):
        """A graph of a step."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.optimizer.step()
        return graph

    def check(self):
        """Both have the same parameters, state and averages."""
        torch.cuda.synchronize()
        ours, theirs = (
            [*params, *ema.module.parameters(), *(x for p in params for x in optimizer.state[p].values())]
            for params, ema, optimizer in zip(
                (self.params, self.twins), self.emas, (self.optimizer, self.twin), strict=True
            )
        )
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(getattr(x, "memory", x), y.data)
