"""Learning rates: the same line, fitted slowly, fast and oscillating.

    python examples/tricks/learning_rate.py [--seeds 10] [--steps 300]

A line y = a x + b is fitted to 100 points by gradient descent on the mean squared error. In a direction in which the
loss has curvature c, each step multiplies the error by 1 - lr * c. The inputs are scaled so that c is 19 for the
slope a and 2 for the intercept b.

The usual picture holds for the slope: at 0.001 it is slow, at 0.1 it jumps to the other side at each step (factor
-0.9), at 0.01 it comes straight and fast (0.81). Beyond 2 / 19 = 0.105 it diverges. It does not hold for the
intercept, whose curvature is small: that comes ten times as fast at 0.1, and so the loss is down to 1% sooner there
than at 0.01. One rate for all directions is a compromise. This is why momentum, Adam and normalised inputs help.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from experiment import (
    BLUE,
    FAINT,
    GREEN,
    ORANGE,
    RED,
    Claim,
    Report,
    label_lines,
    larger,
    main,
    panels,
    spread,
    train,
)
from sklearn.datasets import make_regression
from torch import Tensor, nn

import trainops

CURVATURE = 19.0  # of the loss, for the slope
WAYS = {0.001: BLUE, 0.01: GREEN, 0.1: ORANGE, 0.11: RED}
SHOWN = 25  # steps of the slope in the picture


class Fit(NamedTuple):
    """What is left, before each step and after the last one, relative to the start."""

    slope: list[float]
    intercept: list[float]
    loss: list[float]  # of what a line can avoid


def points(seed: int) -> tuple[Tensor, Tensor]:
    """Points near a line."""
    x, y = (torch.tensor(z) for z in make_regression(100, 1, noise=10.0, bias=30.0, random_state=seed))
    return (x - x.mean()) / x.std(correction=0) * (CURVATURE / 2) ** 0.5, y[:, None]


def fit(lr: float, steps: int, seed: int) -> Fit:
    """Gradient descent from slope and intercept 0."""
    x, y = points(seed)
    best = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x)], dim=1), y).solution
    least = (y - best[0] * x - best[1]).square().mean().item()
    model = nn.Linear(1, 1, dtype=torch.float64)
    slope, intercept = (nn.init.zeros_(parameter) for parameter in model.parameters())
    found = Fit([], [], [])

    def data():
        for _ in range(steps + 1):
            found.slope.append(1 - (slope / best[0]).item())
            found.intercept.append(1 - (intercept / best[1]).item())
            yield x, y

    losses = train(model, trainops.SGD(model.parameters(), lr), data(), nn.functional.mse_loss)
    found.loss.extend((loss - least) / (losses[0] - least) for loss in losses)
    return found


def steps_to_a_percent(left: list[float]) -> float:
    """How many steps it takes until 1% is left, for good."""
    above = [step for step, share in enumerate(left) if abs(share) > 0.01]
    return above[-1] + 1 if above[-1] + 1 < len(left) else float("inf")


def run(seeds: int = 10, steps: int = 300) -> Report:
    """How many steps each learning rate takes."""
    fits = {lr: [fit(lr, steps, seed) for seed in range(seeds)] for lr in WAYS}
    slope, intercept, loss = (
        {lr: [steps_to_a_percent(its[part]) for its in found] for lr, found in fits.items()} for part in range(3)
    )
    figure, (left, right) = panels(2)
    for lr, (its, *_) in fits.items():
        if lr * CURVATURE < 2:
            left.plot(its.slope[:SHOWN], "o-", markersize=3, color=WAYS[lr], label=f"{lr:g}")
        right.plot(its.loss, color=WAYS[lr], label=f"{lr:g}")
    left.set(title="Error of the slope", xlabel="step", ylabel="relative to the start")
    left.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    right.set(title="Loss that a line can avoid", xlabel="step", ylabel="relative to the start")
    right.set(yscale="log", ylim=(1e-9, 100))
    left.legend(title="learning rate", fontsize=9, loc="lower right")
    label_lines(right)

    rows = []
    for lr in WAYS:
        taken = [spread(part[lr], ".0f").replace("inf", f"> {steps}") for part in (slope, intercept, loss)]
        rows.append((f"{lr:g}", f"{1 - lr * CURVATURE:.3f}", *taken))
    steps_of = {lr: [pair for its in fits[lr] for pair in pairwise(its.slope[:SHOWN])] for lr in (0.01, 0.1)}
    grown = min(its.loss[-1] for its in fits[0.11])
    claims = [
        Claim("at 0.1 every step changes the sign of the slope's error", all(a * b < 0 for a, b in steps_of[0.1])),
        Claim("at 0.01 every step shrinks it and keeps its sign", all(0 < b < a for a, b in steps_of[0.01])),
        larger("slope: 0.001 takes more steps than 0.01", slope[0.001], slope[0.01], by=100, unit=" steps"),
        larger("slope: 0.1 takes more steps than 0.01", slope[0.1], slope[0.01], by=10, unit=" steps"),
        larger("intercept: 0.01 takes more steps than 0.1", intercept[0.01], intercept[0.1], by=100, unit=" steps"),
        larger("loss: 0.01 takes more steps than 0.1", loss[0.01], loss[0.1], by=10, unit=" steps"),
        Claim(f"at 0.11 the loss grows, at least {grown:.0e} times", grown > 1000),
    ]
    header = ("learning rate", "factor of a step", "steps to 1%: slope", "intercept", "loss")
    return Report(header, rows, figure, claims)


if __name__ == "__main__":
    main(run, __doc__)
