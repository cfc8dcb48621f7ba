"""The paths of SGD, momentum and Adam through two valleys.

    python examples/tricks/valleys.py [--steps 600]

Two functions of two numbers. The ravine is (x^2 + 60 y^2) / 2: its sides are 60 times as steep as its floor. The
steep valley is Rosenbrock's, (1 - x)^2 + 20 (y - x^2)^2, which bends. SGD is held back by the sides: they limit the
rate, and along the floor that rate is far too small. Momentum adds up what points along the floor, and the zigzag
cancels. Adam takes steps of one length along both axes, and so starts at 45 degrees.

Each optimizer has the best rate of a list, the one that reaches 0.01 in the fewest steps. Momentum and Adam take less
than half as many as SGD. Adam is not the first: in the steep valley momentum is far ahead.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from experiment import BLUE, FAINT, GREEN, ORANGE, RED, Claim, Report, main, panels
from matplotlib.axes import Axes
from torch import Tensor

import trainops


class Valley(NamedTuple):
    """A function to minimise, where to start, and what part of the plane to draw."""

    function: Callable[[Tensor, Tensor], Tensor]
    start: tuple[float, float]
    lowest: tuple[float, float]
    x: tuple[float, float]
    y: tuple[float, float]


VALLEYS = {
    "ravine": Valley(lambda x, y: (x**2 + 60 * y**2) / 2, (-4.0, 0.8), (0.0, 0.0), (-4.6, 1.4), (-1.3, 1.3)),
    "steep valley": Valley(
        lambda x, y: (1 - x) ** 2 + 20 * (y - x**2) ** 2, (-1.2, 1.6), (1.0, 1.0), (-1.7, 1.5), (-0.5, 2.1)
    ),
}
WAYS = {
    "SGD": (lambda parameters, lr: trainops.SGD(parameters, lr), ORANGE),
    "momentum 0.9": (lambda parameters, lr: trainops.SGD(parameters, lr, momentum=0.9), GREEN),
    "Adam": (lambda parameters, lr: trainops.Adam(parameters, lr), BLUE),
}
RATES = [round(10 ** (i / 4), 4) for i in range(-10, 1)]
NEAR = 0.01  # the value at which a path has arrived


def descend(valley: Valley, way: str, lr: float, steps: int) -> tuple[Tensor, float]:
    """The path [points, 2] until it arrives, and its number of steps."""
    point = torch.tensor(valley.start, dtype=torch.float64, requires_grad=True)
    optimizer = WAYS[way][0]([point], lr)
    path = [point.detach().clone()]
    while (value := valley.function(*point)).item() > NEAR:
        if len(path) > steps or not value.item() < 1e6:
            return torch.stack(path), float("inf")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        path.append(point.detach().clone())
    return torch.stack(path), len(path) - 1


def draw(axes: Axes, name: str, paths: dict[str, Tensor]) -> None:
    """Lines of equal height, and the paths."""
    valley = VALLEYS[name]
    x, y = torch.meshgrid(*(torch.linspace(*ends, 200) for ends in (valley.x, valley.y)), indexing="xy")
    height = valley.function(x, y)
    axes.contour(x, y, height, levels=[0.02 * 3**i for i in range(10)], colors=FAINT, linewidths=0.6)
    for way, path in paths.items():
        axes.plot(*path.T, "o-", markersize=2.5, linewidth=1.1, color=WAYS[way][1], label=way)
    axes.plot(*valley.lowest, "*", color=RED, markersize=12)
    axes.set(title=name.capitalize(), xlabel="x", ylabel="y", xlim=valley.x, ylim=valley.y)


def run(steps: int = 600) -> Report:
    """Find each optimizer's best rate in each valley, and draw its path."""
    figure, axes = panels(2, height=4.4, width=5.4)
    rows, claims = [], []
    for panel, (name, valley) in zip(axes, VALLEYS.items(), strict=True):
        found = {(way, lr): descend(valley, way, lr, steps) for way in WAYS for lr in RATES}
        best = {way: min(RATES, key=lambda lr, way=way: found[way, lr][1]) for way in WAYS}
        taken = {way: found[way, best[way]][1] for way in WAYS}
        draw(panel, name, {way: found[way, best[way]][0] for way in WAYS})
        rows += [(name, way, f"{best[way]:g}", f"{taken[way]:.0f}") for way in WAYS]
        sgd, momentum, adam = taken.values()
        claims += [
            Claim(f"{name}: SGD takes {sgd / momentum:.1f} times the steps of momentum", sgd > 2 * momentum),
            Claim(f"{name}: SGD takes {sgd / adam:.1f} times the steps of Adam", sgd > 2 * adam),
        ]
    claims.append(Claim(f"{name}: Adam takes {adam / momentum:.1f} times the steps of momentum", adam > 2 * momentum))
    axes[0].legend(fontsize=9, loc="lower left")
    return Report(("", "optimizer", "best rate", "steps to 0.01"), rows, figure, claims)


if __name__ == "__main__":
    main(run, __doc__)
