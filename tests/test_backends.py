"""The one dispatch rule, and what happens where a backend is missing or broken."""

import importlib.machinery
import json
import pkgutil
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import trainops
from trainops import _extensions, core
from trainops import adapters as dispatch
from trainops.adapters import check, cpu, foreach, select
from trainops.adapters import pytorch as reference

needs_cpu = pytest.mark.skipif(not cpu.probe().available, reason=f"backend cpu: {cpu.probe().reason}")


def with_grads(device="cpu"):
    params = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def adamw_step(x, backend):
    params = with_grads(x.device)
    trainops.AdamW(params, backend=backend).step()


def ema_update(x, backend):
    model = nn.Linear(3, 3, device=x.device)
    trainops.EMA(model, backend=backend).update()


# Every public way to a kernel, called with a tensor that says on which device.
OPS = {
    "AdamW": adamw_step,
    "EMA": ema_update,
    "ema_update_": lambda x, backend: trainops.ema_update_([x.clone()], [x], 0.5, backend=backend),
    "get_total_norm": lambda x, backend: trainops.get_total_norm([x], backend=backend),
    "clip_grad_norm_": lambda x, backend: trainops.clip_grad_norm_(with_grads(x.device), 1.0, backend=backend),
    "clip_grads_with_norm_": lambda x, backend: trainops.clip_grads_with_norm_(
        with_grads(x.device), 1.0, torch.tensor(5.0, device=x.device), backend=backend
    ),
    "clip_grad_value_": lambda x, backend: trainops.clip_grad_value_(with_grads(x.device), 0.5, backend=backend),
    "drop_path": lambda x, backend: trainops.drop_path(x, 0.5, True, backend=backend),
    "drop_path_add": lambda x, backend: trainops.drop_path_add(x, x, 0.5, True, backend=backend),
}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@pytest.fixture(autouse=True)
def _no_choice_is_remembered(monkeypatch):
    monkeypatch.delenv("TRAINOPS_BACKEND", raising=False)
    dispatch._select.cache_clear()
    yield
    dispatch._select.cache_clear()


@pytest.fixture
def without_cpu(monkeypatch):
    """A machine on which the ``cpu`` backend is missing."""
    probe = dispatch._probe
    missing = trainops.Backend(available=False, reason="the dog ate it")
    monkeypatch.setattr(dispatch, "_probe", lambda name: missing if name == "cpu" else probe(name))


def test_the_function_and_the_package_have_different_names():
    import trainops.adapters as package

    assert isinstance(package, types.ModuleType)
    assert trainops.backends is package.backends
    assert isinstance(trainops.backends, types.FunctionType)
    # No module can take the function's place when it is imported: there is none of that name.
    assert "backends" not in {module.name for module in pkgutil.iter_modules(trainops.__path__)}


def test_backends_describes_every_backend():
    found = trainops.backends()
    assert {"reference", "cpu"} <= found.keys()
    assert found["reference"].available
    for backend in found.values():
        assert isinstance(backend, trainops.Backend)
        assert isinstance(backend.available, bool)
        assert bool(backend.reason) != backend.available
        assert backend.details or not backend.available


@needs_cpu
@pytest.mark.parametrize(
    ("argument", "variable", "device_type", "expected"),
    [
        (None, None, "cpu", cpu),
        (None, "", "cpu", cpu),
        (None, None, "meta", reference),  # which computes nothing
        (None, None, "mps", foreach),
        (None, None, "xpu:1", foreach),
        ("foreach", "cpu", "cpu", foreach),
        (None, "reference", "cpu", reference),
        (None, "cpu", "cpu", cpu),
        ("reference", None, "cpu", reference),
        ("reference", "cpu", "cpu", reference),
        ("reference", "cpu", "meta", reference),
        ("reference", "nonsense", "cpu", reference),
        ("cpu", "reference", "cpu", cpu),
    ],
)
def test_argument_then_variable_then_device(monkeypatch, argument, variable, device_type, expected):
    if variable is not None:
        monkeypatch.setenv("TRAINOPS_BACKEND", variable)
    assert select(argument, device_type) is expected


@each_op
@pytest.mark.parametrize("by_variable", [False, True], ids=["argument", "variable"])
def test_unknown_name(monkeypatch, op, by_variable):
    if by_variable:
        monkeypatch.setenv("TRAINOPS_BACKEND", "fpga")
    with pytest.raises(ValueError, match=r"'fpga'.*reference.*cpu"):
        op(torch.ones(4, 3), None if by_variable else "fpga")


@each_op
@pytest.mark.parametrize("by_variable", [False, True], ids=["argument", "variable"])
@pytest.mark.usefixtures("without_cpu")
def test_unavailable_backend_that_was_asked_for(monkeypatch, op, by_variable):
    if by_variable:
        monkeypatch.setenv("TRAINOPS_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match=r"'cpu'.*the dog ate it.*reference"):
        op(torch.ones(4, 3), None if by_variable else "cpu")


@pytest.mark.usefixtures("without_cpu")
def test_unavailable_backend_that_was_not_asked_for():
    assert select(None, "cpu") is foreach
    check(None)


@needs_cpu
@each_op
@pytest.mark.parametrize("by_variable", [False, True], ids=["argument", "variable"])
def test_backend_of_another_device(monkeypatch, op, by_variable):
    if by_variable:
        monkeypatch.setenv("TRAINOPS_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match=r"'cpu'.*'meta'"):
        op(torch.ones(4, 3, device="meta"), None if by_variable else "cpu")


@each_op
def test_a_backend_that_was_asked_for_is_used(monkeypatch, op):
    used = []
    for name in ("ema_", "update", "reduce", "scale_", "clamp_", "drop_path"):
        kernel = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *args, kernel=kernel: used.append(kernel) or kernel(*args))
    op(torch.ones(4, 3), "reference")
    assert used


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "not built"),
        ({}, "not built"),
        ({"cuda": {"built_with": "nvcc"}}, "not built"),
        ({"cpu": {"reason": "the build failed: no compiler"}}, "the build failed: no compiler"),
    ],
    ids=["no_record", "empty_record", "other_backends", "failed_build"],
)
def test_an_extension_that_was_not_built_is_silently_absent(monkeypatch, tmp_path, record, reason):
    point_at_build(monkeypatch, tmp_path, record)
    extension, why = _extensions.load("_cpu", "cpu")
    assert extension is None
    assert reason in why


def test_an_extension_that_was_built_but_does_not_load_warns(monkeypatch, tmp_path):
    point_at_build(monkeypatch, tmp_path, {"cpu": {"built_with": "gcc"}})
    with pytest.warns(RuntimeWarning, match=r"without its cpu module.*does not load"):
        extension, why = _extensions.load("_cpu", "cpu")
    assert extension is None
    assert "does not load" in why


def point_at_build(monkeypatch, folder, record):
    """Let ``trainops._cpu`` be missing, and its build be recorded so."""
    monkeypatch.setitem(sys.modules, "trainops._cpu", None)
    monkeypatch.setattr(_extensions, "__file__", str(folder / "_extensions.py"))
    if record is not None:
        (folder / "_build.json").write_text(json.dumps(record))


# Run in an interpreter of its own, with folders that each hold a copy of the package.
USE_EVERYTHING = """
import json, sys, warnings
import torch

def report(folder, built):
    for name in [name for name in sys.modules if name.partition(".")[0] == "trainops"]:
        del sys.modules[name]
    sys.path[0] = folder
    for name in {"core", "cpu", "cuda"} - set(built):  # a package that is installed in place may find them elsewhere
        sys.modules[f"trainops._{name}"] = None
    before = set(sys.modules)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import trainops
        imported = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
        warned_on_import = len(caught)
        use(trainops)
    found = {name: (backend.available, backend.reason) for name, backend in trainops.backends().items()}
    warned = [(w.category.__name__, str(w.message)) for w in caught]
    report = {"imported": imported, "found": found, "warned": warned, "warned_on_import": warned_on_import}
    return {"file": trainops.__file__, **report}

def use(trainops):
    def train(optimizer_class, **options):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 5)
        optimizer = optimizer_class(model.parameters(), lr=0.1, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(7, 5)).square().sum().backward()
            optimizer.step()
        return model

    ours, torchs = train(trainops.AdamW, max_grad_norm=1e9, skip_nonfinite=True), train(torch.optim.AdamW)
    for p, q in zip(ours.parameters(), torchs.parameters()):
        torch.testing.assert_close(p, q)
    assert trainops.clip_grad_norm_(ours.parameters(), 1e-3) > 1e-3
    torch.testing.assert_close(trainops.get_total_norm([p.grad for p in ours.parameters()]), torch.tensor(1e-3))
    trainops.clip_grad_value_(ours.parameters(), 1e-5)
    assert max(p.grad.abs().max() for p in ours.parameters()) <= 1e-5
    ema = trainops.EMA(ours, decay=0.5)
    with torch.no_grad():
        ours.bias.add_(1)
    old = ema.module.bias.clone()
    ema.update()
    assert not torch.equal(ema.module.bias, old)
    x = torch.ones(64, 5)
    assert set(trainops.drop_path_add(x, x, 0.5, True).unique().tolist()) == {1.0, 3.0}

print(json.dumps([report(folder, built) for folder, built in json.loads(sys.argv[1])]))
"""

BROKEN = b"not a library"

# The extensions in such a copy, which are said to be built.
EXTENSIONS = {"missing": {}, "broken_core": {"core": BROKEN, "cpu": BROKEN}}
if core.available:
    EXTENSIONS["broken_cpu"] = {"core": Path(core._core.__file__).read_bytes(), "cpu": BROKEN}


def use_everything(folder):
    """What ``USE_EVERYTHING`` reports of our Python files, by the state of the extensions."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    not_built = shutil.ignore_patterns("_build.json", "__pycache__", *(f"*{suffix}" for suffix in suffixes))
    for state, extensions in EXTENSIONS.items():
        package = folder / state / "trainops"
        shutil.copytree(Path(trainops.__file__).parent, package, ignore=not_built)
        for name, extension in extensions.items():
            (package / f"_{name}{suffixes[0]}").write_bytes(extension)
        if extensions:
            (package / "_build.json").write_text(json.dumps({name: {"built_with": "gcc"} for name in extensions}))
    where = json.dumps([(str(folder / state), list(extensions)) for state, extensions in EXTENSIONS.items()])
    command = [sys.executable, "-c", USE_EVERYTHING, where]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(zip(EXTENSIONS, json.loads(done.stdout.splitlines()[-1]), strict=True))
    for state, report in found.items():
        assert Path(report["file"]).resolve().parent == (folder / state / "trainops").resolve()
    return found


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no SIGPIPE on this platform")
def test_the_table_may_be_cut_short():
    command = [sys.executable, "-m", "trainops"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert "BrokenPipe" not in process.stderr.read()
    assert process.returncode == -signal.SIGPIPE


def test_everything_works_without_extensions_and_with_broken_ones_after_a_warning(tmp_path):
    """All in one process, which it takes seconds to start."""
    reports = use_everything(tmp_path)
    available, why = reports["missing"]["found"]["cpu"]
    assert not available
    assert "not built" in why
    assert reports["missing"]["warned"] == []
    assert "triton" not in reports["missing"]["imported"]
    for state in reports.keys() - {"missing"}:
        available, why = reports[state]["found"]["cpu"]
        assert not available
        assert "built but does not load" in why
        [(category, message)] = reports[state]["warned"]
        assert category == "RuntimeWarning"
        assert f"without its {state.removeprefix('broken_')} module" in message
        assert why in message
        # It is loaded before anything can fork: see csrc/cpu/parallel.cpp.
        assert reports[state]["warned_on_import"] == 1
    for state in ("missing", "broken_core"):  # without tables, there are no kernels
        found = reports[state]["found"]
        assert [name for name, (available, _) in found.items() if available] == ["reference", "foreach"]
        assert all(
            found["cpu"][1] in found[name][1] for name in ("cuda", "triton") if "installed" not in found[name][1]
        )
