"""All that a machine with a GPU can tell, in ten minutes and one folder to commit.

    make gpu [BUDGET=seconds]
    python -m benchmarks.gpu_bundle [--budget SECONDS] [--output DIR]

Builds, verifies, tests, looks with compute-sanitizer and measures, in order of worth. Each stage may take its share
of the time that is left; what one leaves over, the next ones have. A stage that fails or runs out of time is
recorded, and the next one runs. Exits with 1 where one of them failed, or where there is no GPU.

`benchmarks/results/<card>/` then has `bundle.json` and `bundle.md` (the card, versions, the commit, each stage with
the end of its output), and a folder for each benchmark, with launches and bandwidth. What the folder held before is
deleted. All of the output is in `outputs/gpu/`.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .report import markdown_table

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "outputs" / "gpu"
PASSED, FAILED, CUT, LATE, ABSENT = "passed", "FAILED", "cut short", "OUT OF TIME", "not here"
LINES = 60  # of a stage's output that are kept in the report
GRACE = 5.0  # seconds to end in, for a stage that is told to
RESERVE = 15.0  # seconds of the budget for that, and for the reports


class Stage(NamedTuple):
    """A command, and which share of the time it may take. Its words may name {python}, {output} and {seconds}.

    ``is_sample``: what it did until its limit is worth keeping, and no failure.
    """

    name: str
    shows: str
    share: int
    command: tuple[str, ...]
    environment: dict[str, str] = {}  # noqa: RUF012 (nobody writes to it)
    is_sample: bool = False


def bench(name: str, shows: str, share: int, *options: str) -> Stage:
    """A quick run of the benchmarks, into a folder of its own."""
    command = ("{python}", "-m", "benchmarks", "run", "--quick", "--device", "cuda", *options)
    return Stage(name, shows, share, (*command, "--output", "{output}"), is_sample=True)


def sanitizer(tool: str, share: int, backend: str = "cuda") -> Stage:
    """`verify` under compute-sanitizer. PyTorch's allocator would hide accesses between tensors from memcheck."""
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    command += ("{python}", "-m", "trainops", "verify", "--device", "cuda", "--backend", backend)
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    return Stage(f"{tool} {backend}", f"{backend}'s kernels under {tool}", share, command, environment)


# The GPU's cases, but no kernels that are run on the CPU, nor builds.
CASES = "cuda and not cpu and not ptx and not build and not inspect"
PROCESSES = ("-n", "4") if importlib.util.find_spec("xdist") else ()
TESTS = ("{python}", "-m", "pytest", "-q", *PROCESSES, "-k", CASES, "--seconds", "{seconds}")
MODELS = ("--models", "1,000 small tensors", "ResNet-50", "GPT-2")

# In order of worth. The shares are seconds of ten minutes.
STAGES = (
    Stage("build", "the kernels compile", 130, ("make", "build", "PYTHON={python}")),
    Stage("verify", "every op of every backend is as specified", 50, ("{python}", "-m", "trainops", "verify")),
    bench("step", "clip, AdamW and the average in one step", 90, "--ops", "step", *MODELS),
    Stage("tests", "a sample of the tests on the GPU", 110, TESTS, is_sample=True),
    sanitizer("memcheck", 50),
    sanitizer("racecheck", 40),
    sanitizer("synccheck", 20),
    bench("ops", "every op by itself", 50, "--ops", "adamw", "clip_grad_norm", "ema", "drop_path", *MODELS),
    bench("step_triton", "the step with Triton's kernels", 30, "--ops", "step", "--backend", "triton", *MODELS),
    sanitizer("memcheck", 30, "triton"),
)


def run_stage(stage: Stage, limit: float, output: Path) -> dict[str, Any]:
    """Run one for at most so many seconds; what became of it."""
    words = {"python": sys.executable, "output": str(output), "seconds": f"{0.8 * limit:.0f}"}
    command = [word.format(**words) for word in stage.command]
    found: dict[str, Any] = {"name": stage.name, "shows": stage.shows, "limit": round(limit), "seconds": 0.0}
    found["command"] = " ".join(stage.command)
    if shutil.which(command[0]) is None:
        return found | {"status": ABSENT, "output": [f"there is no {command[0]} on PATH"]}
    log = LOGS / f"{stage.name.replace(' ', '_')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | stage.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = PASSED if process.wait(limit) == 0 else FAILED
        except subprocess.TimeoutExpired:
            status = CUT if stage.is_sample else LATE
        finally:
            end(process)
    lines = [
        re.sub(r"(?<![\w/:.])/\S+/", ".../", line.rstrip()) for line in log.read_text(errors="replace").splitlines()
    ]
    seconds = round(time.monotonic() - began, 1)
    return found | {"status": status, "seconds": seconds, "code": process.returncode, "output": lines[-LINES:]}


def end(process: "subprocess.Popen[Any]") -> None:
    """End a stage with all that it started: at its limit, when it is done, or when we are stopped ourselves."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def run_all(
    stages: tuple[Stage, ...], budget: float, folder: Path, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run all stages within the budget, and save what is known after each."""
    deadline, found = time.monotonic() + budget - RESERVE, []
    for i, stage in enumerate(stages):
        left = max(0.0, deadline - time.monotonic())
        limit = left * stage.share / sum(later.share for later in stages[i:])
        say(f"{stage.name}: {stage.shows}; at most {limit:.0f} s")
        found.append(run_stage(stage, limit, folder / stage.name))
        say(f"  {found[-1]['status']} after {found[-1]['seconds']} s")
        save(found, {}, budget, folder)
    return found


def asked(code: str) -> Any:
    """What Python answers in JSON, in a process of its own, so that this one needs no GPU; None where it fails."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else None


def card() -> str | None:
    """The GPU's name, if PyTorch finds one."""
    name: str | None = asked(
        "import json, torch; print(json.dumps(torch.cuda.get_device_name() if torch.cuda.is_available() else None))"
    )
    return name


def environment() -> dict[str, Any]:
    """What the results depend on, as the benchmarks say it."""
    found = asked("import json; from benchmarks.device import environment; print(json.dumps(environment('cuda')))")
    return found or {"device": card(), "error": "trainops or the benchmarks cannot be imported"}


def save(found: list[dict[str, Any]], about: dict[str, Any], budget: float, folder: Path) -> None:
    """The JSON and the Markdown of all stages."""
    bundle = {"environment": about, "budget": budget, "stages": found}
    (folder / "bundle.json").write_text(json.dumps(bundle, indent=1) + "\n")
    header = ("stage", "shows", "result", "seconds", "of at most")
    rows = [(x["name"], x["shows"], x["status"], str(x["seconds"]), str(x["limit"])) for x in found]
    reports = sorted(path.parent.name for path in folder.glob("*/report.md"))
    text = [f"# {about.get('device') or folder.name}", "", *markdown_table(header, rows), ""]
    text += [f"Launches and bandwidth: {', '.join(f'[{x}]({x}/report.md)' for x in reports)}.", ""] if reports else []
    text += markdown_table(("of this machine", ""), [(key, str(value)) for key, value in about.items() if value])
    for x in found:
        text += ["", f"## {x['name']}: {x['status']}", "", f"`{x['command']}`", "", "```text", *x["output"], "```"]
    (folder / "bundle.md").write_text("\n".join(text) + "\n")


def finish_reports(folder: Path) -> None:
    """The reports of benchmarks that were cut short: their results are saved after each case."""
    for results in folder.glob("*/results.json"):
        if not results.with_name("report.md").exists():
            subprocess.run(
                [sys.executable, "-m", "benchmarks", "report", str(results)], cwd=ROOT, capture_output=True
            )


def main(arguments: list[str], stages: tuple[Stage, ...] = STAGES) -> int:
    """Run all; 1 if something failed."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_bundle", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for everything; default: %(default)s")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="default: %(default)s")
    args = parser.parse_args(arguments)
    name = card()
    if name is None:
        print("there is no GPU: PyTorch finds none, so nothing was run", file=sys.stderr)
        return 1
    folder = args.output.resolve() / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = run_all(stages, args.budget, folder, print)
    finish_reports(folder)
    save(found, environment(), args.budget, folder)
    bad = [x["name"] for x in found if x["status"] in (FAILED, LATE)]
    print(f"{folder}: " + (f"failed: {', '.join(bad)}" if bad else "nothing failed"))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
