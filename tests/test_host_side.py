"""The host side of the GPU backends on fake devices: order, lifetimes, captures, and no wait for a device."""

import pytest
import torch
from fake_cuda.backends import fake_devices
from targets import SHIM, TARGETS
from torch import nn

import trainops
from trainops.adapters import cuda

BACKENDS = [name for name in ("cuda", "triton") if any(target.backend == name for target in TARGETS)]
SHAPES = [(5, 7), (), (1025,), (9000,)]
pytestmark = pytest.mark.skipif(SHIM is None, reason="the CUDA kernels are not compiled for the CPU")


@pytest.fixture
def fake(monkeypatch):
    with fake_devices(monkeypatch, cuda._cuda) as devices:
        yield devices
        assert devices.faults == []


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


class Training:
    """A model on a fake device, and its twin on the CPU, with the same gradients."""

    def __init__(self, fake, backend, device=0, **options):
        options = {"lr": 0.1, "max_grad_norm": 1.0, "skip_nonfinite": True} | options
        self.fake = fake
        values = [torch.randn(shape) for shape in SHAPES]
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
            twin.grad = torch.randn(twin.shape)
            p.grad.copy_(self.fake.on(twin.grad, p.device))

    def step(self, step=None):
        self.set_grads()
        (step or self.optimizer.step)()
        self.twin.step()

    def check(self):
        torch.cuda.synchronize()
        averages = [list(ema.module.parameters()) for ema in self.emas]
        for ours, theirs in ((self.params, self.twins), averages):
            for x, y in zip(ours, theirs, strict=True):
                torch.testing.assert_close(x.memory, y.data)


def test_steps_need_no_wait(fake, backend):
    training = Training(fake, backend)
    for _ in range(3):
        training.step()
    assert fake.synchronizations == []
    training.check()


def test_usual_capture(fake, backend):
    training = Training(fake, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            training.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training.optimizer.step()
    fake.synchronizations.clear()
    for _ in range(3):
        training.step(graph.replay)
    assert fake.synchronizations == []
    training.check()


def test_two_devices_and_two_streams(fake, backend):
    """Each has words of its own, and nothing waits for the other."""
    trainings = [Training(fake, backend, device) for device in (0, 1)]
    streams = [torch.cuda.Stream(device) for device in (0, 1)]
    for stream in streams:
        stream.wait_stream(torch.cuda.default_stream(stream.device))
    for _ in range(2):
        for training, stream in zip(trainings, streams, strict=True):
            with torch.cuda.stream(stream):
                training.step()
    assert fake.synchronizations == []
    for training in trainings:
        training.check()


def test_a_device_that_is_not_current(fake, backend):
    training = Training(fake, backend, device=1)
    for _ in range(2):
        training.step()
    assert torch.cuda.current_device() == 0
    assert fake.synchronizations == []
    training.check()


def test_equal_words_on_two_streams(fake, backend):
    """The same tensors: the second stream waits for the first, whose words it must not take all the same."""
    training, side = Training(fake, backend), torch.cuda.Stream()
    training.step()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training.step()
    torch.cuda.current_stream().wait_stream(side)
    training.step()
    training.check()


def test_two_threads(fake, backend):
    trainings = [Training(fake, backend) for _ in range(2)]

    def train(training):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            for _ in range(3):
                training.step()

    threads = [fake.in_thread(lambda training=training: train(training)) for training in trainings]
    for thread in threads:
        thread.join()
    for training in trainings:
        training.check()
