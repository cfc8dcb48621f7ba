"""The host side of the GPU backends on fake devices: the order on streams, and no wait for a device."""

import threading
import time

import pytest
import torch
from host_fixtures import Training, needs_shim
from targets import SHIM, over, thorough
from torch import nn

import trainops
from trainops import uploads
from trainops.adapters import _cuda_memory, _device, cuda, select, triton
from trainops.uploads import Recent

pytestmark = needs_shim


def test_steps_need_no_wait(fake, gpu_backend):
    training = Training(fake, gpu_backend)
    for _ in range(3):
        training.step()
    assert fake.synchronizations == []
    training.check()


def test_two_devices_and_two_streams(fake, gpu_backend):
    """Each has words of its own, and nothing waits for the other."""
    trainings = [Training(fake, gpu_backend, device) for device in (0, 1)]
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


def test_a_device_that_is_not_current(fake, gpu_backend):
    training = Training(fake, gpu_backend, device=1)
    for _ in range(2):
        training.step()
    assert torch.cuda.current_device() == 0
    assert fake.synchronizations == []
    training.check()


def test_equal_words_on_two_streams(fake, gpu_backend):
    """The same tensors: the second stream waits for the first, whose words it must not take all the same."""
    training, side = Training(fake, gpu_backend), torch.cuda.Stream()
    training.step()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training.step()
    torch.cuda.current_stream().wait_stream(side)
    training.step()
    training.check()


def test_two_threads(fake, gpu_backend):
    trainings = [Training(fake, gpu_backend) for _ in range(2)]

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


# Numbers on a device


def on_device(fake, value, dtype=torch.float32, device=0):
    return fake.on(torch.tensor(value, dtype=dtype), device)


SETTINGS = {
    "lr": lambda fake: {"lr": on_device(fake, 0.125)},
    "lr_bfloat16": lambda fake: {"lr": on_device(fake, 0.125, torch.bfloat16)},
    "lr_elsewhere": lambda fake: {"lr": on_device(fake, 0.125, torch.float64, 1)},
    "betas": lambda fake: {"betas": (on_device(fake, 0.5), on_device(fake, 0.75, torch.bfloat16))},
    "max_grad_norm": lambda fake: {"max_grad_norm": on_device(fake, 0.5)},
    "max_grad_norm_one_element": lambda fake: {"max_grad_norm": on_device(fake, [0.5], torch.float16)},
    "max_grad_norm_elsewhere": lambda fake: {"max_grad_norm": on_device(fake, 0.5, device=1)},
}


SAMPLE = [SETTINGS[name] for name in ("lr_bfloat16", "betas", "max_grad_norm")]  # for Triton's slow interpreter


def plain(x):
    """The same setting as numbers."""
    return tuple(map(plain, x)) if isinstance(x, tuple) else x.memory.item() if hasattr(x, "memory") else x


@thorough(lambda gpu_backend, settings: gpu_backend == "triton" and settings not in SAMPLE)
@over("settings", SETTINGS)
def test_numbers_on_a_device_need_no_wait(fake, gpu_backend, settings):
    settings = {"capturable": True, **settings(fake)}
    training = Training(fake, gpu_backend, **{name: plain(x) for name, x in settings.items()})
    for group in training.optimizer.param_groups:
        group |= {name: x for name, x in settings.items() if name in group}
    if "max_grad_norm" in settings:
        training.optimizer.max_grad_norm = settings["max_grad_norm"]
    for _ in range(3):
        training.step()
    assert fake.synchronizations == []
    training.check()


def test_a_limit_on_a_device_is_the_other_devices_too(fake, gpu_backend):
    """Parameters on two devices have one norm, and one limit."""
    params = [nn.Parameter(fake.on(torch.full((3,), 2.0), device)) for device in (0, 1)]
    for p in params:
        p.grad = torch.ones_like(p)
    limit = on_device(fake, 0.5, device=1)
    optimizer = trainops.AdamW(params, lr=0.1, max_grad_norm=limit, backend=gpu_backend)
    optimizer.step()
    assert fake.synchronizations == []
    exp_avg = [optimizer.state[p]["exp_avg"].memory for p in params]
    torch.testing.assert_close(torch.stack(exp_avg), torch.full((2, 3), 0.1 * 0.5 / 6**0.5))


# Averages


class Normed(nn.Module):
    """Layers with buffers: averages, which are averaged, and counts, which are copied."""

    def __init__(self, layers):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(layers))
        self.register_buffer("mask", torch.tensor([True, False]))


def moved(fake, model, device=0):
    """A model on a fake device."""
    for module in model.modules():
        for name, x in module._parameters.items():
            module._parameters[name] = nn.Parameter(fake.on(x, device))
        for name, x in module._buffers.items():
            module._buffers[name] = fake.on(x, device)
    return model


def change(model, step):
    """Buffers as after a step: counts have all their bits."""
    with torch.no_grad():
        for i, norm in enumerate(model.norms):
            norm.running_mean.fill_(i + step)
            norm.num_batches_tracked.fill_(-(2**62) + i + step if step % 2 else i)
        model.mask.fill_(step % 2)


def follow(fake, backend, layers=2, device=None, skipped=()):
    """A model's average on a device after steps of its optimizer, beside that of a twin on the CPU."""
    averages = []
    for make, name in ((lambda model: moved(fake, model), backend), (lambda model: model, "cpu")):
        model = make(Normed(layers))
        ema = trainops.EMA(model, 0.5, device=device if name == backend else None)
        optimizer = trainops.AdamW(model.parameters(), lr=0.1, skip_nonfinite=True, ema=ema, backend=name)
        for step in range(4):
            change(model, step)
            for p in model.parameters():
                p.grad = torch.full_like(p, torch.nan if step in skipped else 1.0)
            fake.operations.clear()
            fake.synchronizations.clear() if name == backend else None
            optimizer.step()
        averages.append(ema.module)
    return averages


def assert_equal(ours, theirs):
    torch.cuda.synchronize()
    theirs = theirs.state_dict()
    for name, x in ours.state_dict().items():
        torch.testing.assert_close(getattr(x, "memory", x), theirs[name])  # integers are equal


@thorough(lambda gpu_backend, device, skipped, **_: gpu_backend == "triton" and (device, skipped) != ("cpu", (3,)))
@pytest.mark.parametrize("skipped", [(), (1,), (3,)])
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "cpu"])
def test_averages_need_no_wait(fake, gpu_backend, device, skipped, monkeypatch):
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    ours, theirs = follow(fake, gpu_backend, device=device, skipped=skipped)
    assert fake.synchronizations == []
    assert_equal(ours, theirs)


# Faults of the host side


class Forgetful(Recent):
    """Leaves the stream out of its keys."""

    def recall(self, key):
        return super().recall(self.without_stream(key))

    def remember(self, key, value):
        return super().remember(self.without_stream(key), value)

    def without_stream(self, key):
        return key[:2] if len(key) == 3 else (key[0].device, key[1])


def on_two_streams(fake, gpu_backend):
    """Two models of the same shapes, each on a stream of its own."""
    trainings = [Training(fake, gpu_backend) for _ in range(2)]
    for training in trainings:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            training.step()
    return trainings


def with_a_narrow_learning_rate(fake, gpu_backend):
    training = Training(fake, gpu_backend)
    training.optimizer.param_groups[0]["lr"] = on_device(fake, 0.1, torch.bfloat16)
    training.step()
    return training


def uploads_are_shared(monkeypatch):
    monkeypatch.setattr(uploads, "_uploads", Forgetful(128))


def scratch_is_shared(monkeypatch):
    monkeypatch.setattr(_cuda_memory, "scratches", Forgetful(32))


def settings_are_freed_before_the_launch(monkeypatch):
    for module in (cuda, triton):
        settings = module.step_settings
        monkeypatch.setattr(module, "step_settings", lambda *args, its=settings: (its(*args)[0], []))


FAULTS = {
    "uploads": (on_two_streams, uploads_are_shared, "reads memory that another stream may be using"),
    "scratch": (on_two_streams, scratch_is_shared, "writes memory that another stream may be using"),
    "settings": (with_a_narrow_learning_rate, settings_are_freed_before_the_launch, "memory that was freed"),
}


@over("fault", FAULTS)
def test_a_fault_is_noticed(fake, gpu_backend, fault, monkeypatch):
    scenario, plant, text = fault
    trained = scenario(fake, gpu_backend)
    torch.cuda.synchronize()
    assert fake.faults == []
    plant(monkeypatch)
    trained = scenario(fake, gpu_backend), trained
    torch.cuda.synchronize()
    is_there = (gpu_backend, plant) != ("triton", scratch_is_shared)
    assert any(text in found for found in fake.faults) is is_there
    fake.faults.clear()


def test_a_wait_is_noticed(fake, gpu_backend, monkeypatch):
    monkeypatch.setattr(_device, "_setting", lambda x, device: float(x))
    training = Training(fake, gpu_backend)
    training.optimizer.max_grad_norm = on_device(fake, 1.0)
    training.step()
    assert fake.synchronizations == ["item()"]


# The interpreter lock


LAUNCHES = {
    "update": lambda x: trainops.AdamW([x], backend="cuda").step(),
    "reduce": lambda x: trainops.AdamW([x], max_grad_norm=1.0, backend="cuda").step(),
    "scale": lambda x: trainops.clip_grads_with_norm_([x], 1.0, torch.tensor(2.0), backend="cuda"),
    "clamp": lambda x: trainops.clip_grad_value_([x], 0.5, backend="cuda"),
    "ema": lambda x: trainops.ema_update_([torch.zeros(3)], [x.detach()], 0.5, backend="cuda"),
    "drop_path": lambda x: trainops.drop_path(x.detach(), 0.5, True, backend="cuda"),
    "drop_path_backward": lambda x: select("cuda", "cpu").drop_path_backward(x[None], x[None], x[None, :1], x),
}


@over("launch", LAUNCHES)
def test_others_run_while_a_launch_waits(launch):
    """As where the queue of a device is full."""
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    done = []

    def work():
        with torch.no_grad():
            done.append(launch(param))

    thread = threading.Thread(target=work)
    with SHIM.held():
        thread.start()
        while not SHIM.waiting():
            time.sleep(1e-3)
        assert not done
    thread.join()
    assert done
