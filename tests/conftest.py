"""What every test module is run over, and which cases belong to `make test-all`."""

import gc
import hashlib
import importlib.util
import os
import time

import pytest
import torch
from contract import DTYPES
from targets import INTERPRETER, TARGETS
from triton_fixtures import device, divide, launches, small_blocks, tables, uploads  # noqa: F401 (fixtures)

import trainops
from trainops import drop_path_small
from trainops.adapters import _triton

# Shapes that have broken kernels before: scalars, nothing, one element, vector tails, several chunks, many tensors.
SHAPES = {
    "scalar": [()],
    "empty": [(0,), (3, 0, 2)],
    "one": [(1,)],
    "tail": [(127,)],
    "odd": [(1025,)],
    "chunks": [(3, 70001)],
    "mixed": [(), (0,), (1,), (7,), (64, 3), (127,), (33, 31), (1025,), (2, 3, 5, 7), (70001,)],
    "many": [(5,)] * 300,
}

# Files about one backend, which have nothing to do without it; test_targets.py says why it is missing.
OF_BACKENDS = {"cpu": "test_tables.py", "cuda": "test_cuda*.py", "triton": "test_triton_*.py"}
collect_ignore_glob = [
    files for backend, files in OF_BACKENDS.items() if all(target.backend != backend for target in TARGETS)
]

if _triton.interpreted() and trainops.backends()["triton"].available:
    importlib.import_module("interpreter").mend()
    gc.set_threshold(100_000)  # the interpreter makes thousands of small objects a step


# Test processes share the cores: threads of one would wait for those of another. Tests of threads choose a number.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="run every case, as `make test-all` does")
    parser.addoption("--seconds", type=float, help="run a sample: tests of all kinds, until so much time is over")


DEADLINE = pytest.StashKey()


def pytest_configure(config):
    config.stash[DEADLINE] = time.monotonic() + (config.getoption("--seconds") or float("inf"))
    marker = "thorough(when): cases for which when(**params) is true run in `make test-all`"
    config.addinivalue_line("markers", marker)
    if importlib.util.find_spec("hypothesis"):
        importlib.import_module("fuzz").choose("thorough" if config.getoption("--thorough") else "default")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "integrations" in item.path.parts:  # warnings of the frameworks are no faults of ours
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)
            item.add_marker(pytest.mark.filterwarnings("error:::trainops"), append=False)
    if config.getoption("--seconds"):
        items.sort(key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())
    if config.getoption("--thorough"):
        return
    left = [item for item in items if is_thorough(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def pytest_runtest_setup(item):
    if time.monotonic() > item.config.stash[DEADLINE]:
        pytest.skip("the time for a sample is over")


def is_thorough(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return any(mark.args[0](**params) for mark in item.iter_markers("thorough"))


@pytest.fixture(params=TARGETS, ids="-".join)
def target(request):
    """Each backend on each device that it serves here; ``test_targets.py`` says which are missing, and why."""
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(params=SHAPES)
def shapes(request, target):
    if request.param == "many" and target == INTERPRETER:
        return SHAPES["many"][:40]  # the interpreter takes some hundredths of a second for each
    return SHAPES[request.param]


@pytest.fixture
def kernels_for_small_tensors(monkeypatch):
    """DropPath leaves no tensor to PyTorch's operations for being small."""
    monkeypatch.setattr(drop_path_small, "LARGEST", -1)


@pytest.fixture(autouse=True)
def _seed():
    torch.default_generator.manual_seed(0)  # torch.manual_seed asks every accelerator first, for a millisecond
