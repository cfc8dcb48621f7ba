"""`pytest benchmarks/`: a few cases of each op, every provider verified before pytest-benchmark times it."""

from typing import Any

import pytest
import torch

from .runner import NotHere, Options, Provider

MODELS = ["1,000 small tensors", "ViT-Ti"]


def pytest_configure(config: pytest.Config) -> None:
    """Say what is missing, before anything fails for the lack of it. Warnings of other projects are theirs."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("pytest benchmarks/ needs pytest-benchmark: pip install pytest-benchmark")
    config.addinivalue_line("filterwarnings", "ignore")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark for each case and provider, from the module's `cases`."""
    if "admitted" not in metafunc.fixturenames:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = metafunc.module.cases
    options = Options(device, MODELS, ["float32"], quick=True)
    found = list(cases(options)) or list(cases(options._replace(models=None)))
    pairs = [(case, name) for case in found for name in case.names]
    ids = [f"{case.name}-{name}" for case, name in pairs]
    metafunc.parametrize("admitted", pairs, ids=ids, indirect=True)


@pytest.fixture
def admitted(request: pytest.FixtureRequest, benchmark: Any) -> Provider:
    """A provider that was verified; skipped where it is not here, failed where it is wrong."""
    case, name = request.param
    benchmark.group = f"{case.op}: {case.name}, {case.dtype}"
    try:
        provider, error = case.open().admit(name)
    except NotHere as reason:
        pytest.skip(str(reason))
    assert error <= 1.0, f"{name} is wrong: its error is {error:.2g} times what is allowed"
    return provider
