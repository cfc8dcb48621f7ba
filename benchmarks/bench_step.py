"""The whole tail of a step: clip by norm, AdamW, EMA.

    python -m benchmarks.bench_step [--device cuda] [--backend triton] [--models ViT-Ti ViT-B] [--rounds 15]
                                    [--calls 1] [--threads 2] [--json FILE] [--plot FILE]

Every provider first takes steps from the same start, and all must agree with the same steps in float64; no time is
shown for a wrong result. Then all are timed in interleaved rounds, host and device together, with ``a.add_(b)`` (on a
GPU ``a.copy_(b)``) over as many elements beside them for the bandwidth that the memory gives, and trainops twice, to
show the noise.
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import trainops
from trainops.backends import NAMES, serving

from .models import MODELS, Shapes
from .runner import Timing, interleave

DEFAULT_MODELS = [name for name in MODELS if name != "ViT-L"]  # which is for GPUs
LR, MAX_NORM, DECAY = 1e-3, 1.0, 0.999
ROUNDS = {10**6: 60, 10**7: 60, 10**9: 15}  # up to so many parameters: so many rounds

# Bytes per float32 parameter. Norm: read grad. AdamW: read grad, read and write param and two moments. EMA: read
# and write the average (the parameter is in registers).
STEP_BYTES = 4 + 28 + 8

# What shows the bandwidth of the memory, and its bytes per float32 element.
LIMITS = {"cpu": ("a.add_(b)", 12), "cuda": ("a.copy_(b)", 8)}


class Model(torch.nn.Module):
    """Parameters with gradients, the same for every provider."""

    def __init__(self, shapes: Shapes, device: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(device, dtype)) for shape in shapes
        )
        for weight in self.weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(device, dtype)


Maker = Callable[[Model], tuple[Callable[[], object], list[Tensor]]]


class Provider:
    """One way to take a step: the model, its average, and the call."""

    def __init__(self, shapes: Shapes, device: str, make: Maker) -> None:
        self.model = Model(shapes, device)
        self.step, self.averages = make(self.model)

    def result(self) -> list[Tensor]:
        """Parameters and averages."""
        return [*self.model.weights, *self.averages]


def torch_step(**options: bool) -> Maker:
    """PyTorch's best composition: multi-tensor clip, AdamW with ``options``, multi-tensor lerp."""

    def make(model: Model) -> tuple[Callable[[], object], list[Tensor]]:
        params = list(model.weights)
        optimizer = torch.optim.AdamW(params, lr=LR, **options)
        averages = [p.detach().clone() for p in params]

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, params, 1 - DECAY)

        return step, averages

    return make


def trainops_step(model: Model) -> tuple[Callable[[], object], list[Tensor]]:
    """The same in one call. The negative `update_after_step` leaves out the copy with which an EMA begins."""
    ema = trainops.EMA(model, DECAY, update_after_step=-2)
    optimizer = trainops.AdamW(model.parameters(), lr=LR, max_grad_norm=MAX_NORM, ema=ema)
    return optimizer.step, list(ema.module.parameters())


PROVIDERS: dict[str, Maker] = {
    "torch foreach": torch_step(foreach=True),
    "torch fused": torch_step(fused=True),
    "trainops": trainops_step,
    "trainops again": trainops_step,
}


def verify(providers: dict[str, Provider], shapes: Shapes, steps: int = 3) -> None:
    """Every provider's parameters and averages after some steps, against float64; AssertionError if one is off."""
    device = next(iter(providers.values())).model.weights[0].device.type
    true = Model(shapes, device, torch.float64)
    optimizer = torch.optim.AdamW(true.parameters(), lr=LR)
    averages = [p.detach().clone() for p in true.weights]
    for _ in range(steps):
        torch.nn.utils.clip_grad_norm_(true.parameters(), MAX_NORM)
        optimizer.step()
        for average, weight in zip(averages, true.weights, strict=True):
            average.lerp_(weight.detach(), 1 - DECAY)
        for provider in providers.values():
            provider.step()
    for name, provider in providers.items():
        for ours, exact in zip(provider.result(), [*true.weights, *averages], strict=True):
            error = (ours.double() - exact).abs().max() / exact.abs().max()
            assert error < 4 * torch.finfo(ours.dtype).eps, f"{name} is off by {error:.1e}"


def measure(shapes: Shapes, device: str, rounds: int | None, calls: int | None) -> dict[str, Timing]:
    """Verify, then time."""
    providers = {name: Provider(shapes, device, make) for name, make in PROVIDERS.items()}
    verify(providers, shapes)
    numel = sum(p.numel() for p in next(iter(providers.values())).model.weights)
    a, b = (torch.randn(numel, device=device) for _ in range(2))
    steps: dict[str, Callable[[], object]] = {name: provider.step for name, provider in providers.items()}
    steps[LIMITS[device][0]] = lambda: a.add_(b) if device == "cpu" else a.copy_(b)
    rounds = rounds or next(n for limit, n in ROUNDS.items() if numel <= limit)
    synchronize = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    return interleave(steps, rounds, calls or (10 if numel < 10**6 else 1), synchronize=synchronize)


def report(results: dict[str, dict[str, Timing]], device: str, console: Console) -> None:
    """A table: milliseconds, ratios to trainops, and the share of the memory's bandwidth."""
    limit, limit_bytes = LIMITS[device]
    table = Table(title="clip + AdamW + EMA, float32: milliseconds per step, median (p20 to p80)")
    for column in ("model", "parameters", *PROVIDERS, "PyTorch's best / trainops", "GB/s", f"of {limit}"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model, timings in results.items():
        numel = sum(torch.Size(shape).numel() for shape in MODELS[model])
        ours, best = timings["trainops"].median, min(timings[name].median for name in PROVIDERS if "torch" in name)
        bandwidth, possible = STEP_BYTES * numel / ours, limit_bytes * numel / timings[limit].median
        table.add_row(
            model,
            f"{numel / 1e6:.1f} M",
            *(
                f"{1e3 * t.median:.2f} ({1e3 * t.p20:.2f} to {1e3 * t.p80:.2f})"
                for t in map(timings.get, PROVIDERS)
                if t
            ),
            f"{best / ours:.2f}",
            f"{bandwidth / 1e9:.1f}",
            f"{bandwidth / possible:.2f}",
        )
    console.print(table)


def plot(results: dict[str, dict[str, Timing]], path: Path, title: str) -> None:
    """Bars: how many times as long as trainops' each of PyTorch's compositions takes, per model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.6 * len(results)), layout="constrained")
    for i, timings in enumerate(results.values()):
        for name, offset, colour in (("torch foreach", -0.17, "#b8b8b8"), ("torch fused", 0.17, "#777777")):
            ratio = timings[name].median / timings["trainops"].median
            bar = axes.barh(i + offset, ratio, 0.32, color=colour, label=name if i == 0 else None)
            axes.bar_label(bar, [f"{ratio:.2f}x"], padding=3, fontsize=9)
    axes.axvline(1.0, color="#d1495b", linewidth=2, label="trainops")
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set_xlabel("time of clip + AdamW + EMA, relative to trainops")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def environment(device: str) -> dict[str, object]:
    """What the figures depend on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    cpu = next(
        (line.split(":", 1)[1].strip() for line in cpu_lines() if line.startswith("model name")), platform.processor()
    )
    backend = serving(device)
    return {
        "device": cpu if device == "cpu" else torch.cuda.get_device_name(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "trainops": trainops.__version__,
        "commit": commit.stdout.strip(),
        "backend": f"{backend}: {trainops.backends()[backend].details}",
    }


def cpu_lines() -> list[str]:
    """What Linux says of the processor."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    """Measure, print, and save what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=DEFAULT_MODELS, metavar="NAME", help=", ".join(MODELS)
    )
    parser.add_argument("--device", choices=LIMITS, default="cpu")
    parser.add_argument("--backend", choices=NAMES, help="default: what trainops chooses")
    parser.add_argument("--rounds", type=int, help="default: by size of the model")
    parser.add_argument(
        "--calls", type=int, help="calls in a row per round; default: 10 under a million parameters, else 1"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where to save the figures")
    parser.add_argument("--plot", type=Path, help="where to save a picture of the ratios")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU")
    torch.set_num_threads(args.threads)
    if args.backend:
        os.environ["TRAINOPS_BACKEND"] = args.backend
    found = environment(args.device)
    console = Console(width=200)
    console.print("  ".join(f"{key}: {value}" for key, value in found.items()))
    results = {model: measure(MODELS[model], args.device, args.rounds, args.calls) for model in args.models}
    report(results, args.device, console)
    if args.plot:
        plot(results, args.plot, "float32, {device}, {threads} threads, torch {torch}".format(**found))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {model: {name: t._asdict() for name, t in timings.items()} for model, timings in results.items()}
        args.json.write_text(json.dumps({"environment": found, "seconds": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
