"""Dropout, batch norm and both on a network that overfits.

    python examples/tricks/regularisers.py [--seeds 5] [--steps 200]

A 64-128-128-10 network learns 300 digits, and is tested with the 1497 others; once with right labels and once where
40% of those that it learns are random. Batch norm makes the network learn faster, and generalise better where the
labels are right. It does not keep it from learning wrong labels by heart: there it is as bad as none. Dropout (0.5)
does keep it from that, but is no help with right labels. Which of the two helps against overfitting depends on the
data. Both together are between the two.
"""

import statistics
from itertools import product

import torch
from experiment import (
    BLUE,
    FAINT,
    GREEN,
    ORANGE,
    Report,
    accuracy,
    batches,
    digits,
    larger,
    main,
    panels,
    spread,
    train,
)
from torch import nn

import trainops

WAYS = {"neither": (False, 0.0), "dropout": (False, 0.5), "batch norm": (True, 0.0), "both": (True, 0.5)}
COLOURS = dict(zip(WAYS, (FAINT, ORANGE, BLUE, GREEN), strict=True))
NOISES = {"right labels": 0.0, "40% random": 0.4}
EARLY = 50  # steps


def network(norm: bool, drop: float) -> nn.Sequential:
    """Two hidden layers."""
    model = nn.Sequential()
    for inputs in (64, 128):
        model.append(nn.Linear(inputs, 128))
        if norm:
            model.append(nn.BatchNorm1d(128))
        model.extend((nn.ReLU(), nn.Dropout(drop)))
    return model.append(nn.Linear(128, 10))


def fit(noise: str, way: str, steps: int, seed: int) -> tuple[float, float, float]:
    """Accuracy in training (with the labels that were learned) and in the test; the mean of the first losses."""
    x, y, test_x, test_y = digits(300, seed)
    torch.manual_seed(seed)
    y = torch.where(torch.rand(y.shape) < NOISES[noise], torch.randint(10, y.shape), y)
    model = network(*WAYS[way])
    losses = train(model, trainops.Adam(model.parameters(), 3e-3), batches(x, y, 64, steps, seed))
    return accuracy(model, x, y), accuracy(model, test_x, test_y), statistics.fmean(losses[:EARLY])


def run(seeds: int = 5, steps: int = 200) -> Report:
    """Train all."""
    found = {
        (noise, way): list(zip(*(fit(noise, way, steps, seed) for seed in range(seeds)), strict=True))
        for noise, way in product(NOISES, WAYS)
    }
    figure, axes = panels(2, height=3.2, width=5.4)
    for panel, noise in zip(axes, NOISES, strict=True):
        for i, way in enumerate(WAYS):
            training, test, _ = found[noise, way]
            panel.plot(test, [i] * seeds, "o", color=COLOURS[way], alpha=0.5, markersize=5)
            panel.plot(statistics.median(test), i, "|", color=COLOURS[way], markersize=22, markeredgewidth=3)
            panel.plot(statistics.median(training), i, "x", color=COLOURS[way], markersize=7)
        panel.set_yticks(range(len(WAYS)), list(WAYS))
        panel.invert_yaxis()
        panel.set(title=noise.capitalize(), xlabel="accuracy, %: test, seeds (o) and median (|); training (x)")

    rows = [
        (noise, way, *(spread(column) for column in columns[:2]), spread(columns[2], ".2f"))
        for (noise, way), columns in found.items()
    ]
    right, wrong = ({way: found[noise, way][1] for way in WAYS} for noise in NOISES)
    learned = {way: found["40% random", way][0] for way in WAYS}
    early = {way: found["right labels", way][2] for way in WAYS}
    points = {"by": 1, "unit": " points"}
    claims = [
        larger(
            "right labels: batch norm is better than neither", right["batch norm"], right["neither"], unit=" points"
        ),
        larger("the first losses: neither has larger ones than batch norm", early["neither"], early["batch norm"]),
        larger("random labels: dropout is better than neither", wrong["dropout"], wrong["neither"], **points),
        larger("random labels: dropout is better than batch norm", wrong["dropout"], wrong["batch norm"], **points),
        larger("random labels: both are better than batch norm", wrong["both"], wrong["batch norm"], **points),
        larger(
            "of the random labels, batch norm learns more than dropout",
            learned["batch norm"],
            learned["dropout"],
            **points,
        ),
    ]
    header = ("labels", "", "training accuracy, %", "test accuracy, %", f"loss, first {EARLY} steps")
    return Report(header, rows, figure, claims)


if __name__ == "__main__":
    main(run, __doc__)
