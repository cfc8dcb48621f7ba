"""Whether there is a Triton backend, and why not."""

import os
import subprocess
import sys

import pytest
import torch

import trainops
from trainops.adapters import _triton, triton


def test_other_devices_are_not_served():
    other = "meta"
    assert "takes" in triton.refusal(torch.device(other))
    p = torch.nn.Parameter(torch.ones(3, device=other))
    p.grad = torch.ones(3, device=other)
    with pytest.raises(RuntimeError, match="'triton' does not take tensors on 'meta'"):
        trainops.AdamW([p], backend="triton").step()


WITHOUT_A_GPU = """
import sys
import torch
loaded = "triton" in sys.modules
import trainops
found = trainops.backends()["triton"]
assert not found.available
assert found.reason == "PyTorch finds no GPU", found
try:
    trainops.AdamW([torch.nn.Parameter(torch.ones(3))], backend="triton")
except RuntimeError as error:
    assert "backend 'triton' is not available: PyTorch finds no GPU" in str(error), error
else:
    raise AssertionError
trainops.clip_grad_norm_([torch.ones(3)], 1.0)
assert loaded or "triton" not in sys.modules
assert "trainops.adapters.triton" in sys.modules
assert "trainops.triton_kernels" not in sys.modules
"""


def test_without_a_gpu_the_backend_is_missing_and_triton_is_not_imported():
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    environment = {name: x for name, x in os.environ.items() if name not in ("TRITON_INTERPRET", "TRAINOPS_BACKEND")}
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_A_GPU], check=True, env=environment | hidden)


@pytest.fixture
def probe():
    """The question asked anew."""
    return triton.probe.__wrapped__


def test_without_triton_the_backend_is_missing(monkeypatch, probe):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert probe() == trainops.backends()["triton"].__class__(available=False, reason="Triton is not installed")


def test_a_broken_triton_is_no_secret(monkeypatch, probe):
    def broken():
        raise ImportError("libtriton.so: cannot open")

    monkeypatch.setattr(_triton, "kernels", broken)
    with pytest.warns(RuntimeWarning, match="without its triton backend: .*does not work: libtriton.so"):
        found = probe()
    assert (found.available, found.reason) == (
        False,
        "Triton is installed but does not work: libtriton.so: cannot open",
    )


@pytest.mark.parametrize("value", ["1", "true", "ON", "yes", "y", "0", "", "false", None])
def test_the_interpreter_is_chosen_as_triton_chooses_it(monkeypatch, value):
    from triton import knobs

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert _triton.interpreted() == knobs.runtime.interpret
