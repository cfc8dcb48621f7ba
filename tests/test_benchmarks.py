"""The benchmark suite: its data, its honesty, and that reports need nothing but saved results."""

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks import (
    compare,
    report,
)
from benchmarks.__main__ import BACKENDS, parse
from benchmarks.conftest import pytest_configure
from benchmarks.device import Cpu, Sample
from benchmarks.models import MODELS, numel
from benchmarks.runner import Case, NotHere, Provider, measure, message, relative
from benchmarks.saved import fastest, noise, opponents, ratio, share, verdict
from benchmarks.saved import relative as relative_of
from trainops.adapters import NAMES

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


def test_other_ways_of_ours_are_no_opponents():
    seconds = {"torch fused": 2.0, "trainops": 3.0, "trainops again": 3.1, "trainops float32": 1.0}
    providers = {name: {"seconds": {"median": x}} for name, x in seconds.items()}
    assert opponents({"providers": providers}) == {"torch fused": 2.0}


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


def test_the_documentation_has_the_saved_figures():
    """Of the whole step."""
    root = Path(report.__file__).parent
    cases = report.load(root / "results/cpu/results.json")["cases"]
    found = {
        (case["name"], case["dtype"]): case for case in cases if (case["op"], case["group"]) == ("step", "models")
    }
    page = (root.parent / "docs" / "benchmarks.md").read_text()
    for name in {name for name, _ in found}:
        x, narrow = ratio(found[name, "float32"]), ratio(found[name, "bfloat16"])
        line = re.search(rf"^\| {name} \| [\d.]+ M \|.*$", page, re.MULTILINE)[0]
        wide = rf"\| \**{x.median:.2f}\**[^|]*\({x.low:.2f} to {x.high:.2f}\) \|"
        assert re.search(rf"{wide} \**{narrow.median:.2f}", line), name


def test_command_line(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    assert "compare A.json B.json" in capsys.readouterr().out
    assert parse(["--ops", "ema", "--quick"]).command == "run"
    assert parse(["report", "results.json"]).command == "report"
    assert tuple(BACKENDS) == NAMES  # which it knows without importing them


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
