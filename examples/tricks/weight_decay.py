"""Overfitting: a network of 100 units with and without an L2 penalty.

    python examples/tricks/weight_decay.py [--seeds 10] [--epochs 400]

A 20-100-1 network learns 800 samples of `make_classification` by heart, and is tested with 200 others. Each epoch is
one step of Adam at 0.01, with the penalty of `trainops.Adam(..., weight_decay=0.04)`: 0.04 * weight is added to the
gradient. An article that shows this saw 100% in training and 81.5% in the test become 88.0% and 87.5%. Ten data sets
bear that out, with a smaller gain: the test gains about 3 points in the median. What the penalty does most is to
close the gap between the two, and to keep the network from being sure of what it gets wrong: the test loss is a
third.
"""

from itertools import repeat

import torch
from experiment import BLUE, ORANGE, Report, larger, main, network, panels, split, spread, train
from sklearn.datasets import make_classification
from torch import Tensor, nn

import trainops

WAYS = {"no penalty": 0.0, "L2 penalty 0.04": 0.04}
COLOURS = dict(zip(WAYS, (ORANGE, BLUE), strict=True))
LR, EVERY = 0.01, 10  # learning rate; epochs between two measurements


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of one output for two classes."""
    return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], labels.float())


@torch.no_grad()
def measure(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy in percent, and loss."""
    outputs = model(x)
    return 100 * ((outputs[:, 0] > 0) == (y > 0)).double().mean().item(), loss_of(outputs, y).item()


def fit(weight_decay: float, epochs: int, seed: int) -> list[tuple[float, ...]]:
    """Accuracy and loss in training, then in the test, every few epochs."""
    data, labels = make_classification(1000, 20, random_state=seed)
    x, y, test_x, test_y = split(torch.tensor(data, dtype=torch.float32), torch.tensor(labels), 200, seed)
    torch.manual_seed(seed)
    model = network(20, 100, 1)
    optimizer = trainops.Adam(model.parameters(), LR, weight_decay=weight_decay)
    found = []
    for start in range(0, epochs, EVERY):
        train(model, optimizer, repeat((x, y), min(EVERY, epochs - start)), loss_of)
        found.append(measure(model, x, y) + measure(model, test_x, test_y))
    return found


def run(seeds: int = 10, epochs: int = 400) -> Report:
    """Train on one data set for each seed."""
    curves = {way: [fit(penalty, epochs, seed) for seed in range(seeds)] for way, penalty in WAYS.items()}
    figure, axes = panels(2)
    for way, its in curves.items():
        medians = torch.tensor(its).quantile(0.5, dim=0)  # [measurements, 4]
        at = [min(epoch, epochs) for epoch in range(EVERY, epochs + EVERY, EVERY)]
        for i, panel in enumerate(axes):
            panel.plot(at, medians[:, i], "--", color=COLOURS[way], label=f"{way}: training", linewidth=1.2)
            panel.plot(at, medians[:, 2 + i], color=COLOURS[way], label=f"{way}: test", linewidth=2)
    axes[0].set(title="Accuracy, median of the seeds", xlabel="epoch", ylabel="percent")
    axes[1].set(title="Loss, median of the seeds", xlabel="epoch", ylabel="cross-entropy")
    axes[1].legend(fontsize=9)

    last = {way: list(zip(*(curve[-1] for curve in its), strict=True)) for way, its in curves.items()}
    gaps = {way: [a - b for a, b in zip(its[0], its[2], strict=True)] for way, its in last.items()}
    rows = [
        (way, spread(its[0]), spread(its[2]), spread(gaps[way]), spread(its[3], ".2f")) for way, its in last.items()
    ]
    free, held = WAYS
    claims = [
        larger("the penalty costs training accuracy", last[free][0], last[held][0], by=3, unit=" points"),
        larger("it closes the gap to the test", gaps[free], gaps[held], by=5, unit=" points"),
        larger("it lowers the test loss", last[free][3], last[held][3]),
        larger("it raises the test accuracy", last[held][2], last[free][2], unit=" points"),
    ]
    header = ("", "training accuracy, %", "test accuracy, %", "gap, points", "test loss")
    return Report(header, rows, figure, claims)


if __name__ == "__main__":
    main(run, __doc__)
