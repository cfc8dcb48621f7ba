"""What the experiments share: reports, claims, arguments, pictures, and a loop that trains.

An experiment is a module with a function ``run`` that returns a `Report`. Its parameters are numbers with defaults;
they become the script's options. The module's docstring is what the page says beside the picture: a title, how to
run it, and what it shows.
"""

import argparse
import inspect
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

OUTPUT = Path("outputs/tricks")
BLUE, GREEN, ORANGE, RED, VIOLET, SKY = "#1d3557", "#2a9d8f", "#d9822b", "#c8374a", "#7a5ea8", "#6aa5d8"
INK, FAINT = "#1f2933", "#9aa5b1"
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 120,
}


class Claim(NamedTuple):
    """A sentence with its numbers, and whether what was measured bears it."""

    text: str
    holds: bool


class Report(NamedTuple):
    """What an experiment found."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    figure: Figure
    claims: Sequence[Claim]


def above(text: str, values: Sequence[float], least: float, unit: str = "") -> Claim:
    """Claims that ``values``, one of each seed, are above ``least``.

    It holds where a sign test is significant at 5%: chance alone would have as many of them above in less than one of
    twenty experiments. Of five seeds all have to agree, of ten nine.
    """
    n, wins = len(values), sum(value > least for value in values)
    chance = sum(comb(n, k) for k in range(wins, n + 1)) / 2**n
    median = f"{statistics.median(values):.3g}{unit} in the median"
    return Claim(f"{text}: {median}, above {least:g}{unit} in {wins} of {n} seeds", chance < 0.05)


def larger(text: str, these: Sequence[float], others: Sequence[float], by: float = 0.0, unit: str = "") -> Claim:
    """Claims that ``these`` exceed ``others`` by more than ``by``, seed by seed."""
    return above(text, [a - b for a, b in zip(these, others, strict=True)], by, unit)


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """The median of the seeds, and the lowest and the highest one."""
    low, middle, high = (format(f(values), form) for f in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def network(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between each two."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def split(x: Tensor, y: Tensor, test_size: float | int, seed: int) -> list[Tensor]:
    """Samples and labels to train with, then to test with."""
    x, test_x, y, test_y = train_test_split(x, y, test_size=test_size, random_state=seed, stratify=y)
    return [x, y, test_x, test_y]


read_digits = cache(load_digits)  # from its file


def digits(train: int, seed: int) -> list[Tensor]:
    """scikit-learn's 1797 images of 8 x 8 pixels, as rows, and labels: ``train`` of them, then the others."""
    data = read_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    return split(x, y, len(x) - train, seed)


def batches(x: Tensor, y: Tensor, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random samples, ``steps`` times."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (size,), generator=generator)
        yield x[chosen], y[chosen]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[tuple[Tensor, Tensor]],
    criterion: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> list[float]:
    """The loop that everybody writes; returns the loss of every step."""
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of the samples that are classified correctly, in evaluation mode."""
    return 100 * (model.eval()(x).argmax(dim=1) == y).double().mean().item()


def panels(count: int, height: float = 3.8, width: float = 4.8) -> tuple[Figure, list[Axes]]:
    """A figure of some axes in a row."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def label_lines(axes: Axes, gap: float = 0.07) -> None:
    """Names of the lines at their right ends, in their colours, moved apart where they would overlap."""
    axes.get_ylim()  # fits the limits to the lines, which is put off until somebody asks
    to_axes = axes.transData + axes.transAxes.inverted()
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    places = {line: min(1.0, max(0.0, float(to_axes.transform(line.get_xydata()[-1])[1]))) for line in lines}
    lines.sort(key=places.get)
    for _ in range(100):
        for low, high in pairwise(lines):
            overlap = max(0.0, places[low] + gap - places[high])
            places[low], places[high] = places[low] - overlap / 2, places[high] + overlap / 2
    for line in lines:
        text, y = line.get_label(), places[line]
        axes.text(1.02, y, text, transform=axes.transAxes, va="center", fontsize=9, color=line.get_color())


def title_of(text: str) -> str:
    """The first line of a module's text."""
    return text.strip().partition("\n")[0].removesuffix(".")


def perform(run: Callable[..., Report], picture: Path, **options: int) -> Report:
    """Run an experiment on one thread and save its picture."""
    torch.set_num_threads(1)  # the networks are too small to gain from more
    with mpl.rc_context(STYLE):
        report = run(**options)
        picture.parent.mkdir(parents=True, exist_ok=True)
        report.figure.savefig(picture)
    return report


def main(run: Callable[..., Report], text: str) -> None:
    """The command line of an experiment. The exit status is 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(description=title_of(text))
    settings = {name: parameter.default for name, parameter in inspect.signature(run).parameters.items()}
    for name, default in settings.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--output", type=Path, default=OUTPUT / f"{Path(inspect.getfile(run)).stem}.png")
    options = vars(parser.parse_args())
    picture = options.pop("output")
    for name, value in options.items():
        if value < 1:
            parser.error(f"--{name} must be at least 1")
    report = perform(run, picture, **options)
    table = Table(*report.header, title=title_of(text))
    for row in report.rows:
        table.add_row(*row)
    Console().print(table)
    for claim in report.claims:
        print("holds:" if claim.holds else "DOES NOT HOLD:", claim.text)
    print(f"saved {picture}")
    raise SystemExit(not all(claim.holds for claim in report.claims))
