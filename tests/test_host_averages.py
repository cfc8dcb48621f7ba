"""Averages on the host of models on a GPU: copied beside the step, moved by a thread of their own."""

import copy
import os
import pickle
import time

import pytest
import torch
from host_fixtures import needs_shim
from targets import over
from torch import nn

import trainops
from trainops import background, copies

pytestmark = needs_shim

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn]
DTYPES += [torch.int64, torch.bool]


@pytest.fixture(autouse=True)
def conversion_makes_tensors_of_their_class(monkeypatch):
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)


class Net(nn.Module):
    """Weights of two dtypes on a device, and buffers, one of which lies on the host."""

    def __init__(self, fake, device=0):
        super().__init__()
        values = [torch.arange(6.0).view(2, 3), torch.ones(()), torch.ones(5, dtype=torch.bfloat16), torch.ones(0, 3)]
        self.weights = nn.ParameterList(nn.Parameter(fake.on(x, device)) for x in values)
        self.register_buffer("mean", fake.on(torch.zeros(3), device))
        self.register_buffer("count", fake.on(torch.tensor(0), device))
        self.register_buffer("scale", fake.on(torch.ones(4).to(torch.float8_e4m3fn), device))
        self.register_buffer("on_host", torch.zeros(2))


@torch.no_grad()
def train(model):
    """Changes in place what an update has just read."""
    for x in [*model.weights, model.mean, model.count]:
        x.add_(1)
    model.on_host.add_(1)


def values(module):
    return {name: getattr(x, "memory", x).clone() for name, x in module.state_dict().items()}


def expected_after(history, decay):
    """Averages of what a model was at its updates, the first of which copies."""
    found = history[0]
    for state in history[1:]:
        for name, x in state.items():
            if x.dtype.itemsize > 1 and x.is_floating_point():
                trainops.ema_update_([found[name]], [x], decay, backend="reference")
            else:
                found[name].copy_(x)
    return found


def assert_is(module, expected):
    got = module.state_dict()
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert got[name].device.type == "cpu", name
        assert torch.equal(got[name].float(), x.float()), name


def test_an_update_reads_what_the_model_was(fake):
    """It is still on its way when the model is trained on. Nobody waits, and the device needs no memory any more."""
    model, history = Net(fake), []
    ema = trainops.EMA(model, 0.5, device="cpu")
    fake.worker.allowed.clear()
    history.append(values(model))
    fake.synchronizations.clear()
    ema.update()
    train(model)
    assert fake.synchronizations == []
    assert ema.step == 1
    fake.worker.allowed.set()
    for _ in range(3):
        history.append(values(model))
        ema.update()
        train(model)
    assert_is(ema.module, expected_after(history, 0.5))


def test_one_copy_of_each_dtype(fake):
    model = Net(fake)
    ema = trainops.EMA(model, 0.5, device="cpu")
    ema.update()
    fake.operations.clear()
    ema.update()
    ema.synchronize()
    assert fake.operations.count("copy") == 4  # float32, bfloat16, int64, float8
    assert fake.operations.count("cat") == 4
    assert len(fake.operations) == 8


@pytest.mark.parametrize("every", [1, 3])
def test_only_every_nth_update_copies(fake, every):
    model = Net(fake)
    ema = trainops.EMA(model, 0.5, device="cpu", update_every=every, update_after_step=-1)
    history = [values(model)]
    for step in range(1, 7):
        train(model)
        fake.operations.clear()
        ema.update()
        assert ("cat" in fake.operations) is (step % every == 0)
        if step % every == 0:
            history.append(values(model))
    assert_is(ema.module, expected_after(history, 0.5))


def test_a_device_that_is_not_current(fake):
    model = Net(fake, device=1)
    ema = trainops.EMA(model, 0.5, device="cpu")
    history = []
    for _ in range(2):
        history.append(values(model))
        ema.update()
        train(model)
    assert torch.cuda.current_device() == 0
    assert_is(ema.module, expected_after(history, 0.5))


def test_models_on_two_devices_and_another_stream(fake):
    model = nn.ModuleList([Net(fake, 0), Net(fake, 1)])
    ema = trainops.EMA(model, 0.5, device="cpu")
    streams = [torch.cuda.Stream(device) for device in (0, 1)]
    history = []
    for _ in range(2):
        history.append(values(model))
        for stream in streams:
            stream.wait_stream(torch.cuda.default_stream(stream.device))
        with torch.cuda.stream(streams[0]), torch.cuda.stream(streams[1]):
            ema.update()
        for stream in streams:
            torch.cuda.default_stream(stream.device).wait_stream(stream)
        for part in model:
            train(part)
    assert_is(ema.module, expected_after(history, 0.5))


READERS = {
    "module": lambda ema: ema.module.state_dict(),
    "state_dict": lambda ema: ema.state_dict()["module"],
    "deepcopy": lambda ema: copy.deepcopy(ema).module.state_dict(),
    "copy": lambda ema: copy.copy(ema).module.state_dict(),
    "synchronize": lambda ema: ema.synchronize() or ema._module.state_dict(),
    "swap": lambda ema: swapped(ema),
    "copy_to": lambda ema: ema.copy_to() or values(ema.model),
    "copy_to a list": lambda ema: copied_to_list(ema),
    "shadow_params": lambda ema: {"weights.1": ema.shadow_params[1]},
}


def swapped(ema):
    """What the model has inside swap(). It has its own again afterwards."""
    before = values(ema.model)
    with ema.swap():
        found = values(ema.model)
    after = values(ema.model)
    assert all(torch.equal(after[name].float(), x.float()) for name, x in before.items())
    return found


def copied_to_list(ema):
    ema.copy_to(list(ema.model.parameters()))
    return values(ema.model)


@over("read", READERS)
def test_whoever_reads_waits(fake, monkeypatch, read):
    """The work is done when somebody waits for it, and not before."""
    model = Net(fake)
    ema = trainops.EMA(model, 0.5, device="cpu")
    ema.update()
    train(model)
    train(model)
    ema.synchronize()
    fake.worker.allowed.clear()
    finish = background.Later.finish
    monkeypatch.setattr(background.Later, "finish", lambda later: fake.worker.allowed.set() or finish(later))
    ema.update()
    try:
        assert read(ema)["weights.1"].item() == 2.0
    finally:
        fake.worker.allowed.set()


def test_an_update_that_fails_is_told_to_the_next_who_waits(fake, monkeypatch):
    model = Net(fake)
    ema = trainops.EMA(model, 0.5, device="cpu")
    monkeypatch.setattr(copies.HostCopies, "wait", lambda self: 1 / 0)
    ema.update()
    with pytest.raises(ZeroDivisionError):
        ema.synchronize()
    assert ema.module is ema.module


def test_a_capture_is_refused_before_anything_has_changed(fake, gpu_backend):
    model = Net(fake)
    ema = trainops.EMA(model, 0.5, device="cpu")
    optimizer = trainops.AdamW([model.weights[1]], lr=0.1, capturable=True, ema=ema, backend=gpu_backend)
    model.weights[1].grad = torch.ones_like(model.weights[1])
    graph = torch.cuda.CUDAGraph()
    refused = pytest.raises(RuntimeError, match="graph cannot hold the update of an average on the CPU")
    with refused, torch.cuda.graph(graph):
        optimizer.step()
    assert ema.step == 0
    assert not optimizer.state


@over("dtype", {str(dtype): dtype for dtype in DTYPES})
def test_every_bit_is_copied(fake, dtype):
    bits = torch.randint(2 if dtype == torch.bool else 256, (3, 4, dtype.itemsize), dtype=torch.uint8)
    x = bits.view(dtype).squeeze(-1)
    for source in (x, x.t(), x[:, ::2], x[:0], x[0, 0]):
        (got,) = copies.HostCopies([fake.on(source)]).wait()
        assert (got.dtype, got.shape) == (source.dtype, source.shape)
        got, source = (y.flatten().clone(memory_format=torch.contiguous_format) for y in (got, source))
        assert torch.equal(got.view(torch.uint8), source.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.uint16, torch.uint64, torch.float32], ids=str)
def test_what_is_put_together_is_of_numbers_that_every_device_takes(dtype):
    flat = copies._flat(torch.zeros(2, 3).to(dtype))
    assert flat.shape == (6,)
    assert flat.dtype in copies._NUMBERS


def test_masters_are_read_in_full(fake, gpu_backend):
    model = nn.ParameterList([nn.Parameter(fake.on(torch.ones(5, dtype=torch.bfloat16)))])
    ema = trainops.EMA(model, 0.0, device="cpu", dtype=torch.float32)
    optimizer = trainops.AdamW(model.parameters(), lr=1e-4, ema=ema, master="split", backend=gpu_backend)
    for _ in range(2):
        model[0].grad = torch.ones_like(model[0])
        optimizer.step()
    weight = optimizer.float32_weight(model[0])
    torch.cuda.synchronize()
    assert torch.equal(ema.module[0], weight.memory)
    assert (ema.module[0] != 1).all()


# The thread itself.


def test_work_is_done_in_turn_and_waited_for():
    done = []
    works = [background.Later(lambda i=i: done.append(i)) for i in range(5)]
    for work in works:
        work.finish()
    assert done == list(range(5))


def test_a_fork_waits_for_work_and_its_child_has_a_thread_of_its_own():
    done = []
    background.Later(lambda: (time.sleep(0.1), done.append(1)))  # which nobody keeps
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        background.Later(lambda: done.append(2)).finish()
        os.write(write, pickle.dumps(done))
        os._exit(0)
    os.waitpid(child, 0)
    assert pickle.loads(os.read(read, 100)) == [1, 2]
