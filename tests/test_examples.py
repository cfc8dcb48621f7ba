"""The examples: what they say to arguments that make no sense. `make demo` runs one of them."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

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
        ("train_low_precision", ["--steps", "0"], "--steps, --seeds and --jobs must be at least 1"),
        ("train_low_precision", ["--seeds", "0"], "--steps, --seeds and --jobs must be at least 1"),
        ("train_low_precision", ["--jobs", "-1"], "--steps, --seeds and --jobs must be at least 1"),
        ("train_fsdp2", ["--steps", "0"], "--steps must be at least 1"),
        ("train_fsdp2", [], "start it by torchrun --nproc-per-node 2 examples/train_fsdp2.py"),
        ("train_bf16", ["--steps", "0"], "--steps must be at least 1"),
        ("find_exploding_layer", ["--steps", "2"], "--steps must be at least 3"),
        ("train_bf16", ["--device", "meta"], "--device meta: "),
    ],
)
def test_bad_arguments(monkeypatch, capsys, example, arguments, message):
    for needed in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(needed)
    monkeypatch.setattr(sys, "argv", [example, *arguments])
    monkeypatch.syspath_prepend(EXAMPLES)  # as where Python runs a script
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


def test_ways_to_train_in_low_precision_are_compared(monkeypatch, capsys, tmp_path):
    for needed in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(needed)
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("train_low_precision")
    monkeypatch.setitem(example.WAYS, "of the future", {"master": "thirds"})
    monkeypatch.setitem(example.WAYS, "of the far future", {"qubits": 2})
    threads, picture = torch.get_num_threads(), tmp_path / "made" / "picture.png"
    try:
        example.main(["--steps", "16", "--seeds", "1", "--jobs", "1", "--output", str(picture)])
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "left out: of the future. master must be" in said
    assert "left out: of the far future. AdamW has no qubits" in said
    assert picture.stat().st_size > 10_000
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line]
    assert len(rows) == 2 * sum(not example.why_not(way) for way in example.WAYS)
    worse = {(i, row[0]): float(row[2].split()[0]) for i, row in enumerate(rows)}
    for (_, way), loss in worse.items():
        if way in ("float32", "split"):
            assert abs(loss) < 0.01
        if way == "plain bfloat16":
            assert loss > 0.005


def test_the_suggested_learning_rates_train_and_others_do_not(monkeypatch, capsys, tmp_path):
    for needed in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(needed)
    monkeypatch.setattr(sys, "argv", ["find_lr", "--output", str(tmp_path / "lr.png")])
    runpy.run_path(str(EXAMPLES / "find_lr.py"), run_name="__main__")
    accuracies = [float(x) for x in re.findall(r"([\d.]+) %", capsys.readouterr().out)]
    assert len(accuracies) == 4
    assert min(accuracies[1:3]) > 85.0 > 50.0 > max(accuracies[0], accuracies[3])
    assert (tmp_path / "lr.png").stat().st_size > 10000


def test_the_layer_that_explodes_is_found_by_name_and_step(monkeypatch, capsys, tmp_path):
    for needed in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(needed)
    monkeypatch.setattr(sys, "argv", ["find_exploding_layer", "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "find_exploding_layer.py"), run_name="__main__")
    said = re.findall(r"step (\d+): (\S+): the (\w+) explode", capsys.readouterr().out)
    assert said[0] == ("22", "blocks.7.narrow", "weights")
    assert {name for _, name, what in said if what == "gradient"} >= {"stem", "blocks.3.widen", "blocks.7.widen"}
    assert all((tmp_path / name).stat().st_size > 10000 for name in ("norms.png", "distributions.png"))
