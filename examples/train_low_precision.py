"""Train a small GPT and a small vision transformer in low precision, six ways, and draw their losses.

    python examples/train_low_precision.py [--steps 400] [--seeds 5] [--jobs 2] [--output outputs/low_precision.png]

The text is the documentation of Python's keywords and types, which comes with Python (`help("if")`); the images are
scikit-learn's digits. Nothing is downloaded. Runs with the same seed start from the same weights and see the same
batches: what differs is `WAYS`. All but float32 also compute forward and backward in bfloat16. Ways that this build
of trainops does not have are named and left out.
"""

import argparse
import inspect
import os
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from train_digits import NOISE, Block, DropPathAdd, ViT, param_groups, schedule

import trainops

WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "split": {"master": "split", "state_dtype": torch.float32},
    "split, bfloat16 moments": {"master": "split", "state_dtype": torch.bfloat16},
    "split, 8-bit moments": {"master": "split", "state_dtype": "int8"},
    "stochastic rounding": {"stochastic_rounding": True},
    "plain bfloat16": {},
}
COLOURS = dict(zip(WAYS, ("#1d3557", "#2a9d8f", "#7fb2dd", "#7a5ea8", "#e0952f", "#c8374a"), strict=True))
LR, MAX_GRAD_NORM = 2e-3, 1.0
CONTEXT, SMOOTHED = 64, 20  # characters that the GPT sees; steps that a point of a curve is the mean of


class GPT(nn.Module):
    """Predicts the next character of a text."""

    def __init__(self, characters: int, dim: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, CONTEXT, dim))
        self.blocks = nn.Sequential(*(CausalBlock(dim, DropPathAdd(0.0)) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, characters)

    def forward(self, text: Tensor) -> Tensor:
        """Characters [batch, context] to logits [batch, context, characters]."""
        return self.head(self.norm(self.blocks(self.embed(text) + self.position)))


class CausalBlock(Block):
    """A block that looks back alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] to the same."""
        y = self.norm1(x)
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        x = x + self.attention(y, y, y, need_weights=False, attn_mask=mask, is_causal=True)[0]
        return x + self.mlp(self.norm2(x))


class Task(NamedTuple):
    """A model, what it is trained with at each step, and what it is tested with."""

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]


def gpt() -> Task:
    """The last tenth of the text is for the test."""
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[character] for character in text])
    cut = len(codes) * 9 // 10

    def pieces(starts: Iterable[int]) -> tuple[Tensor, Tensor]:
        windows = torch.stack([codes[i : i + CONTEXT + 1] for i in starts])
        return windows[:, :-1], windows[:, 1:]

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return pieces(torch.randint(cut - CONTEXT, (16,), generator=generator).tolist())

    test = pieces(torch.linspace(cut, len(codes) - CONTEXT - 1, 256).long().tolist())
    return Task(lambda: GPT(len(alphabet)), batch, test)


def vit() -> Task:
    """The model and the noisy images of `train_digits.py`. Every fourth image is for the test."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    of_test = torch.arange(len(labels)) % 4 == 0
    train_images, train_labels = images[~of_test], labels[~of_test]

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(train_labels), (64,), generator=generator)
        return train_images[chosen] + NOISE * torch.randn(64, 1, 8, 8, generator=generator), train_labels[chosen]

    return Task(lambda: ViT(DropPathAdd), batch, (images[of_test], labels[of_test]))


TASKS = {"GPT on Python's documentation": gpt, "ViT on digits": vit}


class Result(NamedTuple):
    """The loss of each step, and that of the test."""

    losses: list[float]
    test: float


def why_not(way: str) -> str:
    """Why this build of trainops does not have a way; empty if it has."""
    settings = WAYS[way]
    if unknown := settings.keys() - inspect.signature(trainops.AdamW).parameters.keys():
        return f"AdamW has no {', '.join(unknown)}"
    try:
        trainops.AdamW([nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))], **settings)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def train(task_name: str, way: str, seed: int, steps: int) -> Result:
    """One run, on one core."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task = TASKS[task_name]()
    model = task.model()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    dtype = torch.float32 if way == "float32" else torch.bfloat16
    optimizer = trainops.AdamW(param_groups(model.to(dtype)), LR, max_grad_norm=MAX_GRAD_NORM, **WAYS[way])
    if "master" in WAYS[way]:
        optimizer.load_float32_state_dict(model, weights)
    scheduler, generator = schedule(optimizer, steps), torch.Generator().manual_seed(seed)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs.to(dtype) if inputs.is_floating_point() else inputs)
        return nn.functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten())

    losses = []
    for step in range(steps):
        batch = task.batch(generator)
        torch.manual_seed(1_000_003 * seed + step)  # the same DropPath masks for all ways
        loss = loss_of(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        return Result(losses, loss_of(*task.test).item())


def smooth(runs: list[Result]) -> list[float]:
    """The mean loss of all runs, in a window of steps."""
    means = [statistics.fmean(losses) for losses in zip(*(run.losses for run in runs), strict=True)]
    return [statistics.fmean(means[max(0, i - SMOOTHED + 1) : i + 1]) for i in range(len(means))]


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):+.4f} ± {statistics.pstdev(values):.4f}"


def worse(runs: dict[str, list[Result]], way: str) -> list[float]:
    """Of each seed: the test loss minus that of float32."""
    return [run.test - float32.test for run, float32 in zip(runs[way], runs["float32"], strict=True)]


def draw(results: dict[str, dict[str, list[Result]]], path: Path) -> None:
    """Above, training losses, the mean of all seeds; below, test losses of each seed, relative to float32."""
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    for (name, runs), above, below in zip(results.items(), *figure.subplots(2, 2, height_ratios=(2, 1)), strict=True):
        draw_task(name, runs, above, below)
    figure.savefig(path, dpi=150)


def draw_task(name: str, runs: dict[str, list[Result]], above: Axes, below: Axes) -> None:
    """A column of the picture."""
    for i, way in enumerate(runs):
        look = {"color": COLOURS[way]}
        above.plot(smooth(runs[way]), label=way, linewidth=3 if way == "float32" else 1.3, **look)
        differences = worse(runs, way)
        below.plot(differences, [i] * len(differences), "o", markersize=5, alpha=0.6, **look)
        below.plot(statistics.fmean(differences), i, "|", markersize=18, markeredgewidth=2.5, **look)
    above.set(
        title=name, xlabel="step", ylabel=f"training loss, mean of {SMOOTHED} steps and all seeds", yscale="log"
    )
    for which in (above.yaxis.set_major_formatter, above.yaxis.set_minor_formatter):
        which(LogFormatter(minor_thresholds=(2, 0.5)))
    above.legend(frameon=False)
    below.set_yticks(range(len(runs)), list(runs))
    below.invert_yaxis()
    below.locator_params(axis="x", nbins=6)
    below.axvline(0, color="#9aa5b1", linewidth=1, zorder=0)
    below.set(xlabel="test loss minus that of float32, each seed and the mean")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str] | None = None) -> None:
    """Train everything, show a table, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time; default: all cores")
    parser.add_argument("--output", type=Path, default=Path("outputs/low_precision.png"))
    options = parser.parse_args(arguments)
    if min(options.steps, options.seeds, options.jobs) < 1:
        parser.error("--steps, --seeds and --jobs must be at least 1")
    reasons = {way: why_not(way) for way in WAYS}
    for way, reason in reasons.items():
        if reason:
            print(f"left out: {way}. {reason}")
    ways = [way for way, reason in reasons.items() if not reason]
    jobs = list(product(TASKS, ways, range(options.seeds), [options.steps]))
    with ProcessPoolExecutor(options.jobs) as pool:
        run = map if options.jobs == 1 else pool.map
        found = list(track(run(train, *zip(*jobs, strict=True)), "training", len(jobs)))
    results: dict[str, dict[str, list[Result]]] = {name: {way: [] for way in ways} for name in TASKS}
    for (name, way, *_), result in zip(jobs, found, strict=True):
        results[name][way].append(result)
    for name, runs in results.items():
        table = Table("weights", "test loss", "minus that of float32", "training loss, last steps", title=name)
        for way, its in runs.items():
            last = statistics.fmean(statistics.fmean(run.losses[-SMOOTHED:]) for run in its)
            test = statistics.fmean(run.test for run in its)
            table.add_row(way, f"{test:.4f}", spread(worse(runs, way)), f"{last:.4f}")
        Console(width=110).print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(results, options.output)
    print(f"saved {options.output}")


if __name__ == "__main__":
    main()
