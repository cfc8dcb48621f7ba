"""`make gpu`, with stand-ins for its stages: its budget, what it records, and what it says where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_bundle
from benchmarks.__main__ import parse
from benchmarks.gpu_bundle import ABSENT, CUT, FAILED, LATE, PASSED, STAGES, Stage
from trainops.__main__ import main as trainops_main

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def logs(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_bundle, "LOGS", tmp_path / "logs")
    return tmp_path / "logs"


def python(name, code, share=1, **options):
    return Stage(name, f"shows {name}", share, ("{python}", "-c", code), **options)


def bundle(monkeypatch, tmp_path, *stages):
    """Run it as if there were a GPU; the exit code, the folder and the JSON."""
    monkeypatch.setattr(gpu_bundle, "card", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu_bundle, "environment", lambda: {"device": "NVIDIA H100 80GB HBM3", "commit": "abc1234"})
    code = gpu_bundle.main(["--budget", "300", "--output", str(tmp_path)], stages)
    folder = tmp_path / "nvidia-h100-80gb-hbm3"
    return code, folder, json.loads((folder / "bundle.json").read_text())


def test_a_failing_stage_is_recorded_and_the_next_one_runs(monkeypatch, tmp_path):
    fails = python("verify", "import sys; print('a number is WRONG'); sys.exit(1)")
    code, folder, found = bundle(monkeypatch, tmp_path, python("build", "print('built')"), fails, python("step", ""))
    assert code == 1
    assert [(x["name"], x["status"]) for x in found["stages"]] == [
        ("build", PASSED),
        ("verify", FAILED),
        ("step", PASSED),
    ]
    assert found["stages"][1]["output"] == ["a number is WRONG"]
    assert found["environment"]["commit"] == "abc1234"
    text = (folder / "bundle.md").read_text()
    for words in ("# NVIDIA H100 80GB HBM3", "| verify | shows verify | FAILED |", "a number is WRONG", "abc1234"):
        assert words in text


def test_what_is_missing_or_cut_short_is_no_failure(monkeypatch, tmp_path):
    missing = Stage("memcheck", "no such program", 1, ("a-program-that-nobody-has",))
    code, folder, found = bundle(monkeypatch, tmp_path, missing, python("build", ""))
    assert code == 0
    assert [x["status"] for x in found["stages"]] == [ABSENT, PASSED]
    assert "there is no a-program-that-nobody-has on PATH" in (folder / "bundle.md").read_text()


@pytest.mark.parametrize(("is_sample", "status"), [(True, CUT), (False, LATE)])
def test_a_stage_ends_at_its_limit_with_all_that_it_started(tmp_path, is_sample, status):
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '1000']); print(p.pid, flush=True); p.wait()"
    found = gpu_bundle.run_stage(python("tests", code, is_sample=is_sample), 3.0, tmp_path)
    assert found["status"] == status
    (child,) = map(int, found["output"])
    assert not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes()


class Clock:
    """Time that passes as stages say."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


def test_stages_share_the_time_that_is_left(monkeypatch, tmp_path):
    clock, limits = Clock(), []
    took = {"quick": 0.1, "slow": 1.0, "late": 1.0}  # of its limit

    def run_stage(stage, limit, output):
        limits.append(limit)
        clock.now += took[stage.name] * limit
        return {
            "name": stage.name,
            "shows": "",
            "status": PASSED,
            "seconds": 0,
            "limit": 0,
            "command": "",
            "output": [],
        }

    monkeypatch.setattr(gpu_bundle, "time", clock)
    monkeypatch.setattr(gpu_bundle, "run_stage", run_stage)
    stages = [Stage(name, "", share, ()) for name, share in (("quick", 2), ("slow", 1), ("late", 1))]
    gpu_bundle.run_all(tuple(stages), 100.0 + gpu_bundle.RESERVE, tmp_path, lambda _: None)
    assert limits == pytest.approx([50, 47.5, 47.5])
    assert clock.now == pytest.approx(200)


def test_results_that_were_there_are_replaced(monkeypatch, tmp_path):
    old = tmp_path / "nvidia-h100-80gb-hbm3" / "step"
    old.mkdir(parents=True)
    (old / "report.md").write_text("of another day")
    write = "import pathlib; p = pathlib.Path('{output}'); p.mkdir(); (p / 'report.md').write_text('today')"
    _, folder, _ = bundle(monkeypatch, tmp_path, Stage("ops", "", 1, ("{python}", "-c", write)))
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.md")) == [
        "bundle.md",
        "ops/report.md",
    ]
    assert "[ops](ops/report.md)" in (folder / "bundle.md").read_text()


def test_a_benchmark_that_was_cut_short_has_its_report(monkeypatch, tmp_path):
    saved = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "results.json").read_text())
    saved["cases"] = saved["cases"][:1]
    (tmp_path / "saved.json").write_text(json.dumps(saved))
    write = (
        "import pathlib, shutil; p = pathlib.Path('{output}'); p.mkdir(); shutil.copy('SAVED', p / 'results.json')"
    )
    stage = Stage("step", "", 1, ("{python}", "-c", write.replace("SAVED", str(tmp_path / "saved.json"))))
    _, folder, _ = bundle(monkeypatch, tmp_path, stage)
    assert "1,000 small tensors" in (folder / "step" / "report.md").read_text()


def test_paths_of_the_machine_are_left_out(tmp_path):
    found = gpu_bundle.run_stage(python("build", "print('/home/somebody/trainops/setup.py: an error')"), 60, tmp_path)
    assert found["output"] == [".../setup.py: an error"]


@pytest.mark.skipif(gpu_bundle.card() is not None, reason="there is a GPU")
def test_what_is_said_where_there_is_no_gpu(capsys, tmp_path):
    assert gpu_bundle.main(["--output", str(tmp_path)]) == 1
    assert "there is no GPU: PyTorch finds none, so nothing was run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_stages_can_be_called(monkeypatch):
    """What they call exists, and takes their options."""
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names)
    assert sum(stage.share for stage in STAGES) == 600
    monkeypatch.setattr("trainops.verify.verify", lambda device, backend: True)
    for stage in STAGES:
        words = list(stage.command)
        if "benchmarks" in words:
            assert parse(words[words.index("benchmarks") + 1 :]).command == "run"
        elif "verify" in words:
            assert trainops_main(words[words.index("verify") :]) == 0
        elif words[0] == "make":
            assert f"\n{words[1]}: $(SETUP)\n" in (ROOT / "Makefile").read_text()
        else:
            assert words[:3] == ["{python}", "-m", "pytest"]


@pytest.mark.parametrize(("seconds", "outcome"), [("1e-9", "skipped"), ("600", "passed")])
def test_a_sample_of_the_tests(seconds, outcome):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--seconds", seconds]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [*command, "tests/test_reference.py", "-k", "scalars"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert f" {outcome}" in done.stdout.splitlines()[-1]
    assert {"skipped": "passed", "passed": "skipped"}[outcome] not in done.stdout.splitlines()[-1]
