"""The benchmark suite: its data, its honesty, and that reports need nothing but saved results."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from rich.console import Console

from benchmarks import bench_clip_grad_norm, bench_drop_path, bench_ema, bench_step, compare, report, work
from benchmarks.__main__ import parse
from benchmarks.conftest import pytest_configure
from benchmarks.device import Cpu
from benchmarks.models import MODELS, numel
from benchmarks.runner import Case, NotHere, Options, Provider, measure
from benchmarks.saved import noise, ratio, share

COUNTS = {
    "1,000 small tensors": (1000, 544_000),
    "ViT-Ti": (152, 5_717_416),
    "ViT-S": (152, 22_050_664),
    "ViT-B": (152, 86_567_656),
    "ViT-L": (296, 304_326_632),
    "ResNet-50": (161, 25_557_032),
    "DDPM UNet": (328, 35_746_307),
    "GPT-2": (148, 124_439_808),
    "GPT-2 XL": (580, 1_557_611_200),
    "TinyLlama 1.1B": (201, 1_100_048_384),
}


class Bench:
    """Providers that are what their names say."""

    def __init__(self):
        self.calls = dict.fromkeys(("right", "trainops", "wrong", "nan"), 0)

    def admit(self, name):
        if name == "absent":
            raise NotHere("absent is not installed")
        if name == "broken":
            raise RuntimeError("it broke\nat great length")

        def step():
            self.calls[name] += 1

        errors = {"wrong": 3.0, "nan": float("nan")}
        return Provider({"step": step}), errors.get(name, 0.5)


def small_case(bench, **options):
    names = ["right", "wrong", "nan", "absent", "broken", "trainops"]
    return Case("step", "small", names, lambda: bench, bytes=1200, numel=30, tensors=1, **options)


def render(printed):
    console = Console(width=200, record=True, file=io.StringIO())
    printed(console)
    return console.export_text()


@pytest.fixture(scope="module")
def results():
    """Of the small case, as they are saved, and of one that does not fit."""
    bench = Bench()
    cases = [
        measure(small_case(bench), Cpu(), 0.01, (3, 5)),
        measure(small_case(bench, need=2**70), Cpu(), 1, (3, 5)),
    ]
    environment = {"device": "a CPU", "type": "cpu", "threads": 2, "torch": "2", "trainops": "0", "commit": "abc"}
    saved = {"environment": environment | {"quick": True}, "cases": cases}
    assert bench.calls["wrong"] == bench.calls["nan"] == 0  # not timed
    assert bench.calls["right"] > 3
    return json.loads(json.dumps(saved))


@pytest.mark.parametrize("name", MODELS)
def test_known_parameter_counts(name):
    assert (len(MODELS[name]), numel(MODELS[name])) == COUNTS[name]


def test_wrong_providers_are_not_timed(results):
    found = results["cases"][0]["providers"]
    assert {name: provider["status"] for name, provider in found.items()} == {
        "right": "ok",
        "wrong": "wrong",
        "nan": "wrong",
        "absent": "not here",
        "broken": "failed",
        "trainops": "ok",
        "trainops again": "ok",
    }
    assert {name for name, provider in found.items() if "seconds" in provider} == {
        "right",
        "trainops",
        "trainops again",
    }
    text = report.progress_line(results["cases"][0])
    assert "wrong wrong: its error is 3 times what is allowed" in text
    assert "broken failed: RuntimeError: it broke" in text
    assert "absent is not installed" in report.markdown(results, {})


def test_statistics(results):
    case = results["cases"][0]
    seconds = case["providers"]["trainops"]["seconds"]
    assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
    assert case["providers"]["trainops"]["rounds"] in range(3, 6)
    assert case["limit"]["name"] == "a.add_(b)"
    assert ratio(case) == case["providers"]["right"]["seconds"]["median"] / seconds["median"]
    assert noise(case) is not None
    assert share(case) > 0


def test_a_case_that_does_not_fit_is_skipped_with_a_line(results):
    case = results["cases"][1]
    assert "providers" not in case
    assert "skipped: needs" in report.progress_line(case)
    assert case["skipped"] in report.markdown(results, {})


def test_report_and_compare_from_json_alone(results, tmp_path):
    text = render(lambda console: report.save(results, tmp_path, console))
    assert "a CPU, 2 threads" in text
    assert (tmp_path / "report.md").read_text().startswith("# Benchmarks")
    assert (tmp_path / "speedup.png").stat().st_size > 10_000
    slower = json.loads(json.dumps(results))
    for value in ("median", "p20", "p80"):
        slower["cases"][0]["providers"]["trainops"]["seconds"][value] *= 10
    slower["cases"][0]["op"], slower["cases"][1:] = "step", []
    text = render(lambda console: compare.show(results, slower, console))
    assert "+900.0%" in text


def test_saved_reports_can_be_made_again(tmp_path):
    """Of what is in the repository."""
    for path in (Path(report.__file__).parent / "results").rglob("results.json"):
        render(lambda console, path=path: report.save(report.load(path), tmp_path, console))
        assert (tmp_path / "report.md").read_text() == (path.parent / "report.md").read_text()


def test_command_line(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    assert "compare A.json B.json" in capsys.readouterr().out
    assert parse(["--ops", "ema", "--quick"]).command == "run"
    assert parse(["report", "results.json"]).command == "report"


SMALL = [(3, 5), (7,), (), (1,), (1100,)]
TORCH_AND_OURS = {"torch loop", "torch foreach", "torch fused", "torch fused, grad_scale", "trainops"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bench", [bench_step.StepWork, bench_clip_grad_norm.ClipWork, bench_ema.EmaWork])
def test_providers_agree_with_float64(bench, dtype):
    made = bench(SMALL, Options(), getattr(torch, dtype))
    for name in TORCH_AND_OURS & set(bench.makers):
        assert made.admit(name)[1] <= 1.0, name


def test_a_wrong_provider_is_found_and_shared_tensors_are_one():
    class Wrong(bench_step.StepWork):
        makers: ClassVar = {
            **bench_step.StepWork.makers,
            "no decay": bench_step.composed(lambda w: torch.optim.AdamW(w.params, lr=work.LR, weight_decay=0.0)),
        }

    made = Wrong(SMALL, Options(), torch.float32)
    assert made.admit("no decay")[1] > 1.0
    right, error = made.admit("torch fused")
    assert error <= 1.0
    again, error = made.admit("trainops")
    assert error <= 1.0
    for ours, theirs in zip(right.owned(), again.owned(), strict=True):
        assert [x.data_ptr() for x in ours] == [x.data_ptr() for x in theirs]


@pytest.mark.parametrize("layer_scale", [False, True])
def test_drop_path_agrees_with_float64(layer_scale):
    bench = bench_drop_path.AddBench((8, 3, 5), layer_scale, torch.float32, Options())
    for name in (bench.timm, "trainops"):
        assert bench.admit(name)[1] <= 1.0
    with pytest.raises(NotHere, match="compiled"):
        bench.admit("compiled")


def test_pytest_says_what_it_needs():
    config = SimpleNamespace(pluginmanager=SimpleNamespace(hasplugin=lambda name: False))
    with pytest.raises(pytest.UsageError, match="pip install pytest-benchmark"):
        pytest_configure(config)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("# text", "cannot be read"), ("{}", "no results")]
)
def test_files_that_hold_no_results(tmp_path, content, message):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        report.load(path)
