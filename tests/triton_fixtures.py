"""What the tests of the Triton kernels share: devices, small blocks, and records of what is launched and uploaded.

Where there is no GPU, Triton's interpreter runs the kernels; its time goes with the number of operations, so tensors
are small there, and blocks smaller still. ``conftest.py`` imports the fixtures, and leaves ``test_triton_*.py`` out
where no target has the kernels.
"""

from types import SimpleNamespace

import pytest
import torch
from contract import same_bits
from targets import TARGETS
from training import Model

import trainops
from trainops.adapters import _device, _triton, triton

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")
BLOCK, CHUNK = 64, 256  # under the interpreter, unless a test chooses others
NUMEL = CHUNK + BLOCK + 9  # two chunks; in the second, a whole block and a tail
ROLES = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "average")
NORMS = ("l1_norm", "l2_norm", "inf_norm")
WHOLE = {"max_grad_norm": 1.0, "skip_nonfinite": True}

DEVICES = [target.device for target in TARGETS if target.backend == "triton"]


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device that the backend serves here."""
    return torch.device(request.param, torch.cuda.current_device() if request.param == "cuda" else None)


@pytest.fixture
def divide(monkeypatch):
    """Chooses the elements per block and per chunk."""

    def choose(block, chunk):
        monkeypatch.setattr(_triton.kernels()._common, "block_numel", lambda *_: block)
        monkeypatch.setattr(_triton.kernels()._common, "CHUNK", chunk)

    return choose


@pytest.fixture
def small_blocks(divide):
    if triton._device_type() == "cpu":
        divide(BLOCK, CHUNK)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that were launched."""
    names, launch = [], _triton.launch

    def record(kernel, *args, **kwargs):
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(_triton, "launch", record)
    return names


@pytest.fixture
def tables(monkeypatch):
    """The words of every table that came to the device, in bytes."""
    words, upload = SimpleNamespace(rows=[], chunks=[]), _device.uploaded

    def record(content, device):
        (words.rows if len(words.rows) == len(words.chunks) else words.chunks).append(content)
        return upload(content, device)

    monkeypatch.setattr(_device, "uploaded", record)
    return words


def same_object(every):
    """Whether all are the same one: words in memory are found by a hash, which is that of the object."""
    return len(set(map(id, every))) == 1


@pytest.fixture
def uploads(monkeypatch):
    """The settings that were uploaded."""
    words, upload = [], triton.uploaded

    def record(content, device):
        words.append(content)
        return upload(content, device)

    monkeypatch.setattr(triton, "uploaded", record)
    return words


def model_of(sizes, device, dtype=FLOAT32):
    """Random parameters with random gradients; the sizes may be pairs of a shape and a dtype."""
    pairs = [size if size and isinstance(size[-1], torch.dtype) else (size, dtype) for size in sizes]
    model = Model([torch.randn(shape).to(device, kind) for shape, kind in pairs])
    for p, (shape, kind) in zip(model.params, pairs, strict=True):
        p.grad = torch.randn(shape).to(device, kind)
    return model


def twin(model):
    """The same parameters and gradients elsewhere."""
    copy = Model([p.detach().clone() for p in model.params])
    for p, q in zip(copy.params, model.params, strict=True):
        p.grad = q.grad.clone()
    return copy


def adamw(model, **options):
    return trainops.AdamW(model.parameters(), **({"lr": 0.1, "backend": "triton"} | options))


def everything(optimizer):
    """All that a step writes."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [x for p in params for _, x in sorted(optimizer.state[p].items())]
    averages = [] if optimizer.ema is None else list(optimizer.ema.module.params)
    return [x.detach().clone() for x in (*params, *states, *averages)]


def assert_moved(tensors, before):
    """The first of ``tensors`` differ from those ``before``: equal bits say nothing of kernels that do nothing."""
    assert not any(same_bits(x, old) for x, old in zip(tensors, before, strict=False) if x.numel())


def assert_same(ours, others):
    for i, (x, y) in enumerate(zip(ours, others, strict=True)):
        assert same_bits(x, y), i
