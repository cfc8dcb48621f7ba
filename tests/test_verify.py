"""`python -m trainops verify`: it passes what is right, and notices what is not."""

import math
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from targets import INTERPRETER, SHIM, TARGETS, thorough

import trainops
from trainops import __main__, core, reference_codes, verify
from trainops.adapters import cpu
from trainops.optimizer import FusedOptimizer
from trainops.verify import DTYPES, checks_of
from trainops.verify.compare import Compared, Place, problem_with, rounded
from trainops.verify.step import MASTERS

CPU = torch.device("cpu")
OPS = [(op, dtype) for dtype in DTYPES for op in checks_of(Place("cpu", CPU, dtype))]


@thorough(lambda target, dtype, **_: target in INTERPRETER and dtype in (torch.float64, torch.float16))
@pytest.mark.parametrize("target", TARGETS, ids="-".join)
@pytest.mark.parametrize(("op", "dtype"), OPS, ids=str)
def test_every_op_passes(target, dtype, op):
    found = verify.run(op, Place(target.backend, torch.device(target.device), dtype))
    assert found.problem == ""
    assert 0 <= found.worst <= 1


def wrong(monkeypatch, name, change):
    """Let a kernel of the CPU be called with other arguments, or have another result."""
    kernels = {key: getattr(cpu._cpu, key) for key in dir(cpu._cpu) if not key.startswith("__")}
    right = kernels[name]
    kernels[name] = lambda *args, **named: change(right, args, named)
    monkeypatch.setattr(cpu, "_cpu", SimpleNamespace(**kernels))


def with_argument(**changes):
    return lambda right, args, named: right(*args, **{k: changes.get(k, lambda x: x)(x) for k, x in named.items()})


def with_result(change):
    return lambda right, args, named: change(right(*args, **named))


SKIPPED = {"clipping and skipping in the step", "8-bit state"}
STEPS = {"AdamW and average", "Adam and SGD", "a guard against spikes", *SKIPPED}
FAULTS = {
    "eps": (
        "update",
        with_argument(settings=lambda all_: [[*s[:3], s[3] * 1.01, *s[4:]] for s in all_]),
        STEPS - {"8-bit state"},
    ),
    "beta2": ("update", with_argument(settings=lambda all_: [[*s[:2], s[2] - 1e-4, *s[3:]] for s in all_]), STEPS),
    "no_decay": ("update", with_argument(settings=lambda all_: [[*s[:4], 0.0, *s[5:]] for s in all_]), STEPS),
    "decay_of_average": (
        "update",
        with_argument(ema_decays=lambda x: [x[0] + 1e-4, *x[1:]]),
        {*STEPS, "several averages and buffers"},
    ),
    "no_skip": ("update", with_argument(skip_nonfinite=lambda _: False), SKIPPED),
    "scale": ("update", with_argument(grad_scale=lambda scale: 1.0), {"clipping and skipping in the step"}),
    "clip": ("update", with_argument(max_norm=lambda x: x and x * 1.001), {"clipping and skipping in the step"}),
    "norm": ("reduce", with_result(lambda total: total * (1 + 1e-6)), {"norms and clipping"}),
    "guard": ("update", with_argument(guard=lambda _: 0), {"a guard against spikes"}),
    "statistic": ("reduce", with_argument(statistic=lambda x: {"moments": "l2_norm"}.get(x, x)), {"statistics"}),
    "exponents": ("count_exponents", lambda right, args, named: None, {"statistics"}),
    "coefficient": ("scale", with_argument(coefficient=lambda x: x * (1 + 1e-5)), {"norms and clipping"}),
    "bound": ("clamp", with_argument(bound=lambda bound: bound * (1 + 1e-5)), {"norms and clipping"}),
    "average": ("ema", with_argument(decay=lambda decay: decay + 1e-4), {"EMA.update"}),
    "no_drop_path": ("drop_path", lambda right, args, named: None, {"DropPath"}),
    "no_derivative": ("drop_path_backward", lambda right, args, named: None, {"DropPath"}),
}


@pytest.mark.parametrize(("name", "change", "ops"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_wrong_is_noticed(monkeypatch, name, change, ops, dtype):
    wrong(monkeypatch, name, change)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        place = Place("cpu", CPU, dtype)
        assert {op for op in checks_of(place) if verify.run(op, place).problem} == ops & checks_of(place).keys()


@pytest.mark.parametrize("dtype", MASTERS, ids=str)
def test_a_master_that_stays_is_noticed(monkeypatch, dtype):
    masters = []
    init_state = FusedOptimizer.init_state

    def noted(optimizer):
        init_state(optimizer)
        masters.extend(own["master"] for own in optimizer.state.values())

    def keep(right, args, named):
        before = [x.clone() for x in masters]
        result = right(*args, **named)
        for x, old in zip(masters, before, strict=True):
            x.copy_(old)
        return result

    monkeypatch.setattr(FusedOptimizer, "init_state", noted)
    wrong(monkeypatch, "update", keep)
    found = verify.run("a step with masters", Place("cpu", CPU, dtype))
    assert found.problem.startswith("weight ")


@pytest.mark.parametrize("op", ["8-bit state", "stochastic rounding"])
def test_other_random_bits_are_noticed(monkeypatch, op):
    wrong(monkeypatch, "update", with_argument(seeds=lambda _: core.seeds(1, [2, 3, 4, 5])))
    found = verify.run(op, Place("cpu", CPU, torch.bfloat16))
    assert " instead of " in found.problem


@pytest.mark.parametrize("wrong", [{"octaves": 14}, {"is_signed": False}], ids=str)
def test_other_codes_are_noticed(monkeypatch, wrong):
    right = reference_codes.SIGNED
    monkeypatch.setitem(reference_codes.CODE_OF, "exp_avg", right._replace(**wrong))
    assert verify.run("8-bit state", Place("cpu", CPU, torch.float32)).problem


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_truncation_is_noticed(dtype):
    exact = torch.rand(1000, dtype=torch.float64) + 1
    nearest = exact.to(dtype)
    truncated = torch.where(nearest.double() > exact, nearest.nextafter(torch.zeros((), dtype=dtype)), nearest)
    assert problem_with(rounded("x", nearest, exact)) <= (1.0, "")
    assert problem_with(rounded("x", truncated, exact))[0] > 1


def test_infinities_and_shapes_are_noticed():
    exact, bad = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, math.nan, 1.0])
    assert problem_with(rounded("x", bad, exact)) == (
        math.inf,
        "x: element 1 is nan instead of 1 (1 of 3 are off)",
    )
    assert problem_with(Compared("x", bad, bad, None)) == (0.0, "")
    assert problem_with(rounded("x", bad[:2], exact))[1] == "x: the shape is (2,), not (3,)"


def test_an_error_is_a_finding(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel image")

    wrong(monkeypatch, "clamp", fail)
    found = verify.run("norms and clipping", Place("cpu", CPU, torch.float32))
    assert found.problem == "RuntimeError: no kernel image"


def test_the_report_of_what_is_wrong(monkeypatch, capsys):
    wrong(monkeypatch, *FAULTS["average"][:2])
    assert __main__.main(["verify", "--backend", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("WRONG") == 1 + len(DTYPES)
    assert f"trainops {trainops.__version__}, torch {torch.__version__}" in shown
    assert "cpu on cpu, torch.float32, EMA.update: average" in shown


def test_what_cannot_be_verified(capsys):
    for arguments, message in (
        (["--backend", "cpu", "--device", "cuda"], "there is no backend to verify ('cpu' and 'cuda')"),
        (["--device", "nothing"], "nothing"),
    ):
        assert __main__.main(["verify", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_each_backend_here_has_its_rows(monkeypatch, capsys):
    """By the list that dispatch has: one that is added later is verified without a word here."""
    monkeypatch.setattr(verify, "run", lambda op, place: verify.Finding(op, place, 0.5))
    assert verify.verify("cpu")
    rows = [line.split(" on cpu: ") for line in capsys.readouterr().out.splitlines() if " on cpu: " in line]
    here = [name for name, found in trainops.backends().items() if found.available and (name != "cuda" or SHIM)]
    assert [name for name, _ in rows] == [name for name in here for _ in dict(OPS)]
    assert Counter(cell for _, rest in rows for cell in rest.split()[-4:]) == {
        "0.50": len(here) * len(OPS),
        "-": len(here) * (4 * len(dict(OPS)) - len(OPS)),
    }


def test_a_device_without_float64(monkeypatch, capsys):
    monkeypatch.setattr(verify, "scalar_dtype", lambda _: torch.float32)
    assert verify.verify("cpu", "cpu")
    *_, row, _, _ = capsys.readouterr().out.splitlines()
    assert row.split()[-3] == "-"


def test_the_command():
    command = [sys.executable, "-m", "trainops", "verify", "--backend", "cpu", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nall as specified\n")
    assert done.stderr == ""
