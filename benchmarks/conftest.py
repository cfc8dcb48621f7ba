"""`pytest benchmarks/`: a few cases of each op, every provider verified before pytest-benchmark times it."""

import time
from typing import Any

import pytest
import torch

from .runner import NotHere, Options, nothing

MODELS = ["1,000 small tensors", "ViT-Ti"]
SECONDS = 0.3  # of timing for each provider


def pytest_configure(config: pytest.Config) -> None:
    """Say what is missing, before anything fails for the lack of it. Warnings of other projects are theirs."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("pytest benchmarks/ needs pytest-benchmark: pip install pytest-benchmark")
    config.addinivalue_line("filterwarnings", "ignore")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark for each case and provider, from the module's `cases`."""
    if "measured" not in metafunc.fixturenames:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = metafunc.module.cases
    options = Options(device, MODELS, ["float32"], quick=True)
    found = list(cases(options)) or list(cases(options._replace(models=None)))
    pairs = [(case, name) for case in found for name in case.names]
    ids = [f"{case.name}-{name}" for case, name in pairs]
    metafunc.parametrize("measured", pairs, ids=ids, indirect=True)


@pytest.fixture
def measured(request: pytest.FixtureRequest, benchmark: Any) -> None:
    """A provider's step, timed with warm caches; skipped where it is not here, failed where it is wrong."""
    case, name = request.param
    benchmark.group = f"{case.op}: {case.name}, {case.dtype}"
    try:
        provider, error = case.open().admit(name)
    except NotHere as reason:
        pytest.skip(str(reason))
    assert error <= 1.0, f"{name} is wrong: its error is {error:.2g} times what is allowed"
    wait = torch.cuda.synchronize if torch.cuda.is_available() else nothing

    def step() -> None:
        provider.step()
        wait()

    def setup() -> None:
        provider.before()
        wait()

    setup()
    start = time.perf_counter()
    step()
    rounds = max(5, min(200, int(SECONDS / (time.perf_counter() - start))))
    benchmark.pedantic(step, setup=setup, rounds=rounds, warmup_rounds=2)
