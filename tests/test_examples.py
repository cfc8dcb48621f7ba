"""The examples: what they say to arguments that make no sense. `make demo` runs one of them."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("example", "arguments", "message"),
    [
        ("vit_stochastic_depth", ["--drop-prob", "1.5"], "--drop-prob must be in [0, 1]"),
        ("vit_stochastic_depth", ["--drop-prob", "nan"], "--drop-prob must be in [0, 1]"),
        ("vit_stochastic_depth", ["--steps", "0"], "--steps and --depth must be at least 1"),
        ("vit_stochastic_depth", ["--depth", "0"], "--steps and --depth must be at least 1"),
        ("vit_stochastic_depth", ["--dim", "100"], "--dim must be a positive multiple of 64"),
        ("vit_stochastic_depth", ["--dim", "0"], "--dim must be a positive multiple of 64"),
        ("vit_stochastic_depth", ["--device", "gpu"], "--device gpu: "),
        ("train_digits", ["--steps", "0"], "--steps must be at least 1"),
        ("train_digits", ["--device", "meta"], "--device meta: "),
        ("train_bf16", ["--steps", "0"], "--steps must be at least 1"),
        ("train_bf16", ["--device", "meta"], "--device meta: "),
    ],
)
def test_bad_arguments(monkeypatch, capsys, example, arguments, message):
    for needed in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(needed)
    monkeypatch.setattr(sys, "argv", [example, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_split_master_follows_float32_where_bfloat16_stalls(monkeypatch, capsys):
    for needed in ("rich", "sklearn"):
        pytest.importorskip(needed)
    monkeypatch.setattr(sys, "argv", ["train_bf16", "--steps", "60"])
    runpy.run_path(str(EXAMPLES / "train_bf16.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    moved = {row[1]: float(row[7]) for row in rows if len(row) > 7 and row[1] in ("float32", "bfloat16", "split")}
    assert abs(moved["split"] - moved["float32"]) < 0.05 * moved["float32"]
    assert moved["bfloat16"] < 0.7 * moved["float32"]
