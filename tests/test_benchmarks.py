"""The benchmark suite: its data, its honesty, and that reports need nothing but saved results."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from rich.console import Console

import trainops
from benchmarks import (
    bench_adamw,
    bench_clip_grad_norm,
    bench_drop_path,
    bench_ema,
    bench_step,
    bench_training,
    compare,
    peers,
    report,
    work,
)
from benchmarks.__main__ import BACKENDS, parse
from benchmarks.conftest import pytest_configure
from benchmarks.device import Cpu, Sample
from benchmarks.models import MODELS, numel
from benchmarks.runner import Case, NotHere, Options, Provider, measure, message, relative
from benchmarks.saved import fastest, noise, ratio, share, verdict
from benchmarks.saved import relative as relative_of
from trainops.backends import NAMES

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
    for found in (ratio(case), noise(case), share(case)):
        assert 0 < found.low <= found.median <= found.high


@pytest.mark.parametrize(
    ("count", "low", "high"), [(1, 0, 0), (5, 0, 4), (6, 0, 5), (9, 1, 7), (15, 3, 11), (101, 40, 60)]
)
def test_intervals_are_those_of_the_sign_test(count, low, high):
    """Of nine values, say, the second smallest and the second largest: 2 (1 + 9) / 2^9 = 0.04 lies outside."""
    found = relative([2.0 * i for i in range(count)], [2.0] * count)
    assert found == {"median": (count - 1) / 2, "low": low, "high": high}


@pytest.mark.parametrize(
    ("low", "high", "own", "word"),
    [
        (1.1, 1.3, (0.95, 1.05), "ahead"),
        (0.9, 1.1, (0.95, 1.05), "level"),
        (0.7, 0.9, (0.95, 1.05), "behind"),
        (1.1, 1.3, (0.8, 1.05), "level"),  # trainops is as far from itself
        (0.7, 0.9, (0.95, 1.5), "level"),
        (2.0, 2.2, (0.7, 0.9), "ahead"),
    ],
)
def test_ahead_or_behind_needs_confidence(results, low, high, own, word):
    case = json.loads(json.dumps(results["cases"][0]))
    case["providers"]["right"]["relative"] = {"median": (low + high) / 2, "low": low, "high": high}
    case["providers"]["trainops again"]["relative"] = {"median": 1.0, "low": own[0], "high": own[1]}
    assert verdict(case) == word


def test_a_case_that_does_not_fit_is_skipped_with_a_line(results):
    case = results["cases"][1]
    assert "providers" not in case
    assert "skipped: needs" in report.progress_line(case)
    assert case["skipped"] in report.markdown(results, {})


def test_report_and_compare_from_json_alone(results, tmp_path):
    assert "a CPU, 2 threads" in render(lambda console: console.print(report.summary(results)))
    render(lambda console: report.save(results, tmp_path, console))
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
    paths = list((Path(report.__file__).parent / "results").rglob("results.json"))
    assert paths
    for path in paths:
        render(lambda console, path=path: report.save(report.load(path), tmp_path, console))
        assert (tmp_path / "report.md").read_text() == (path.parent / "report.md").read_text()


def test_readme_has_the_saved_figures():
    """Of the whole step."""
    root = Path(report.__file__).parent
    cases = report.load(root / "results/cpu/results.json")["cases"]
    found = {
        (case["name"], case["dtype"]): case for case in cases if (case["op"], case["group"]) == ("step", "models")
    }
    readme = (root.parent / "README.md").read_text()
    for name in {name for name, _ in found}:
        x, narrow = ratio(found[name, "float32"]), ratio(found[name, "bfloat16"])
        assert f"| {name} |" in readme
        assert f"| **{x.median:.2f}** ({x.low:.2f} to {x.high:.2f}) | {narrow.median:.2f} |" in readme, name


def test_command_line(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    assert "compare A.json B.json" in capsys.readouterr().out
    assert parse(["--ops", "ema", "--quick"]).command == "run"
    assert parse(["report", "results.json"]).command == "report"
    assert tuple(BACKENDS) == NAMES  # which it knows without importing them


SMALL = [(3, 5), (7,), (), (1,), (1100,)]
TORCH_AND_OURS = {"torch loop", "torch foreach", "torch fused", "torch fused, grad_scale", "trainops"}


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize(
    "bench", [bench_step.StepWork, bench_adamw.AdamWork, bench_clip_grad_norm.ClipWork, bench_ema.EmaWork]
)
def test_providers_agree_with_float64(bench, dtype):
    made = bench(SMALL, Options(), dtype)
    for name in TORCH_AND_OURS & set(bench.makers):
        assert made.admit(name)[1] <= 0.5, name  # so that larger models have room


def step_of(clip=1.0, decay=work.DECAY, every=1, **settings):
    """A whole step of PyTorch's, with something wrong."""

    def make(made):
        optimizer = torch.optim.AdamW(made.params, **{**peers.SETTINGS, **settings})
        averages = [p.detach().clone() for p in made.params]
        calls = []

        def step():
            calls.append(None)
            if len(calls) % every:
                return
            torch.nn.utils.clip_grad_norm_(made.params, clip * made.max_norm)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, made.params, 1 - decay)

        return bench_step.provider(made, optimizer, averages, step)

    return make


WRONG = {
    "no clipping": step_of(clip=1e6),
    "clipping to twice the norm": step_of(clip=2.0),
    "clipping to half the norm": step_of(clip=0.5),
    "no average": step_of(decay=1.0),
    "another decay": step_of(decay=0.8),
    "every other step": step_of(every=2),
    "no weight decay": step_of(weight_decay=0.0),
    "another beta": step_of(betas=(0.5, 0.999)),
}


@DTYPES
@pytest.mark.parametrize("name", WRONG)
def test_wrong_steps_are_found(name, dtype):
    class Wrong(bench_step.StepWork):
        makers: ClassVar = {**bench_step.StepWork.makers, **WRONG, "right": step_of()}

    made = Wrong(SMALL, Options(), dtype)
    assert made.admit("right")[1] <= 0.5
    assert made.admit(name)[1] > 1.2


@DTYPES
def test_wrong_averages_are_found(dtype):
    class Wrong(bench_ema.EmaWork):
        makers: ClassVar = {
            "another decay": bench_ema.function(lambda averages, params: torch._foreach_lerp_(averages, params, 0.3)),
            "nothing": bench_ema.function(lambda averages, params: None),
        }

    made = Wrong(SMALL, Options(), dtype)
    for name in made.makers:
        with torch.no_grad():
            assert made.admit(name)[1] > 1.2


@DTYPES
@pytest.mark.parametrize(
    "settings", [{"weight_decay": 0.0}, {"betas": (0.5, 0.999)}, {"lr": 0.02}, {"maximize": True}]
)
def test_wrong_optimizers_are_found(settings, dtype):
    class Wrong(bench_adamw.AdamWork):
        makers: ClassVar = {
            "wrong": bench_adamw.stepping(lambda w: torch.optim.AdamW(w.params, **{**peers.SETTINGS, **settings}))
        }

    assert Wrong(SMALL, Options(), dtype).admit("wrong")[1] > 1.5


@DTYPES
@pytest.mark.parametrize("factor", [0.0, 0.8, 2.0])
def test_wrong_clipping_is_found(factor, dtype):
    def clip(params, max_norm):
        return torch.nn.utils.clip_grad_norm_(params, factor * max_norm)

    class Wrong(bench_clip_grad_norm.ClipWork):
        makers: ClassVar = {"wrong": bench_clip_grad_norm.clipping(clip)}

    assert Wrong(SMALL, Options(), dtype).admit("wrong")[1] > 1.0


def test_every_timed_call_clips():
    made = bench_clip_grad_norm.ClipWork(SMALL, Options(), torch.bfloat16)
    provider = made.admit("trainops")[0]
    for _ in range(5):
        provider.before()
        before = [grad.clone() for grad in made.grads()]
        provider.step()
        for grad, old in zip(made.grads(), before, strict=True):
            torch.testing.assert_close(grad, work.CLIPPED * old, rtol=0.01, atol=0)


def test_verified_providers_share_tensors():
    made = bench_step.StepWork(SMALL, Options(), torch.float32)
    right, again = (made.admit(name)[0].owned() for name in ("torch fused", "trainops"))
    assert set(right) == set(again) == {"exp_avg", "exp_avg_sq", "averages"}
    for kind, tensors in right.items():
        assert [x.data_ptr() for x in tensors] == [x.data_ptr() for x in again[kind]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_compiled_providers_agree_with_float64():
    options = Options(compiles=True)
    assert bench_ema.EmaWork(SMALL, options, torch.float32).admit("torch compiled")[1] <= 0.5
    assert bench_drop_path.AddBench((16, 3, 5), False, torch.float32, options).admit("timm, compiled")[1] <= 1.0


def test_what_is_not_compiled_is_found(monkeypatch):
    monkeypatch.setattr(work, "counters", {"stats": {"unique_graphs": 0}, "graph_break": {"a reason": 1}})
    with pytest.raises(RuntimeError, match=r"nothing was compiled.*a reason"):
        work.compiled_note("torch compiled")
    assert work.compiled_note("torch foreach") == ""
    monkeypatch.setitem(work.counters["stats"], "unique_graphs", 2)
    assert work.compiled_note("torch compiled") == "2 graphs, 1 break"


@DTYPES
@pytest.mark.parametrize("layer_scale", [False, True])
def test_drop_path_agrees_with_float64(layer_scale, dtype):
    bench = bench_drop_path.AddBench((8, 3, 5), layer_scale, dtype, Options())
    for name in (bench.timm, "trainops"):
        assert bench.admit(name)[1] <= 1.0
    with pytest.raises(NotHere, match="compiled"):
        bench.admit("compiled")
    bench.drop_path = lambda x, drop_prob, training: x * x.new_empty(len(x), 1, 1).bernoulli_(1 - drop_prob)
    assert bench.admit(bench.timm)[1] > 1.0  # nobody divided by the probability


@pytest.mark.parametrize("mode", ["fixed", "bernoulli"])
def test_stochastic_depth_agrees_with_float64(mode, monkeypatch):
    bench = bench_drop_path.BlockBench((8, 3, 16), 0.25, mode, torch.float32, Options())
    for name in (bench_drop_path.timm_drop_path()[0], "trainops"):
        assert bench.admit(name)[1] <= 1.0
    if mode == "fixed":
        monkeypatch.setattr(bench, "ours", lambda: trainops.stochastic_depth(bench.x, bench.branch, 0.9, True))
        with pytest.raises(RuntimeError, match="of 8 samples were kept"):
            bench.admit("trainops")


def test_training_agrees_with_float64(monkeypatch):
    net = bench_training.Net(64, 1, 9, (2, 2))
    bench = bench_training.TrainingBench(net, 2, "cpu")
    for name in bench_training.TAILS:
        assert bench.admit(name)[1] <= 1.0
    fewer = {"trainops": lambda model: bench_training.fastest(model)._replace(averages=list(model.parameters()))}
    monkeypatch.setattr(bench_training, "TAILS", fewer)
    assert bench.admit("trainops")[1] > 1.0


class Script:
    """A device on which every provider takes as long as it says, and which notes what is done in which order."""

    type, limit, limit_bytes = "cpu", "the limit", 12

    def __init__(self):
        self.calls = []

    def limit_step(self, a, b):
        return lambda: 5e-6  # for the 1,200 bytes of the case

    def free_bytes(self):
        return 2**40

    def flush(self):
        self.calls.append("flush")

    def time(self, steps, calls, host):
        seconds = [step() for step in steps]
        self.calls.append(seconds[0])
        return Sample(seconds)

    def extra_bytes(self, step, tensors):
        return 0

    def launches(self, step, tensors):
        raise RuntimeError("nobody may look")


class Scripted:
    """Providers by the microseconds that they take."""

    def __init__(self, device, common=None):
        self.device, self.common = device, common

    def admit(self, name):
        seconds = {"trainops": 4e-6, "fast": 8e-6, "slow": 20e-6}[name]
        steps = {"step": lambda: seconds}
        if self.common:
            steps = {"common": lambda: self.common[name], **steps}
        return Provider(steps, before=lambda: self.device.calls.append("before")), 0.1


def scripted_case(bench, **options):
    return Case("step", "scripted", ["fast", "trainops", "slow"], lambda: bench, numel=100, tensors=1, **options)


def test_method_and_orientation():
    device = Script()
    case = measure(scripted_case(Scripted(device), bytes=1200), device, 0.0, (6, 6))
    assert {name: found.median for name, found in relative_of(case).items()} == pytest.approx({"fast": 2, "slow": 5})
    assert (fastest(case), verdict(case)) == ("fast", "ahead")
    found = ratio(case).median, noise(case).median, share(case).median
    assert found == pytest.approx((2.0, 1.0, 1.25))
    assert case["providers"]["trainops"]["launches"] is None
    timed = [call for call in device.calls if isinstance(call, float)]
    assert len(timed) == 5 * (2 + 6)  # three providers, one of them twice, and the limit
    rounds = [tuple(timed[i : i + 5]) for i in range(0, len(timed), 5)]
    assert len(set(rounds)) > 3  # of other orders
    for i, call in enumerate(device.calls):
        if isinstance(call, float):
            assert device.calls[i - 1] == "flush"
            assert call == 5e-6 or device.calls[i - 2] == "before"


def test_work_in_common_has_the_same_times():
    device = Script()
    common = {"trainops": 1e-6, "fast": 3e-6, "slow": 4e-6}
    case = measure(scripted_case(Scripted(device, common), common=1, cold=False), device, 0.0, (6, 6))
    assert "flush" not in device.calls
    parts = {name: found["parts"] for name, found in case["providers"].items()}
    mean = (1 + 1 + 3 + 4) / 4 * 1e-6
    assert all(part["common"]["median"] == pytest.approx(mean) for part in parts.values())
    assert ratio(case).median == pytest.approx((mean + 8e-6) / (mean + 4e-6))


def test_providers_that_fail_while_they_are_timed_are_left_out():
    class Failing(Scripted):
        failing = ("fast",)

        def admit(self, name):
            provider, error = super().admit(name)
            if name in self.failing:
                provider.before = lambda: [][0]
            return provider, error

    device = Script()
    case = measure(scripted_case(Failing(device)), device, 0.0, (6, 6))
    assert case["providers"]["fast"] == {"status": "failed", "reason": "IndexError: list index out of range"}
    assert fastest(case) == "slow"
    Failing.failing = ("fast", "slow", "trainops")
    case = measure(scripted_case(Failing(device), common=1), device, 0.0, (6, 6))
    assert {found["status"] for found in case["providers"].values()} == {"failed"}


def test_reasons_name_no_places():
    reason = message(OSError("no /home/me/lib/x.so, see https://pytorch.org/docs and a/b"))
    assert reason == "OSError: no .../x.so, see https://pytorch.org/docs and a/b"


def test_reasons_may_have_brackets(results):
    case = json.loads(json.dumps(results["cases"][0]))
    case["providers"]["broken"]["reason"] = "no [/dev/shm/x] and no [bold]"
    text = render(lambda console: console.print(report.progress_line(case)))
    assert "no [/dev/shm/x] and no [bold]" in text


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
