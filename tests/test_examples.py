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
