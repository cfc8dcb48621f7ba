"""Exploding gradients: clipping by norm and by value.

    python examples/tricks/clipping.py [--seeds 10] [--steps 200]

A 10-20-20-1 network whose weights have a deviation of 100 gets gradients of 10^13: they are products of weights.
`clip_grad_norm_` with 4.0 divides all by one number: the norm becomes 4, and the direction stays. `clip_grad_value_`
with 1.0 cuts each number down to 1. Nearly all are larger, so that only signs are left, some 60 degrees away. Its
norm depends on the number of weights: here it is 26.

Training shows what clipping does, and what it does not. Without it, the first step throws the weights so far that
nothing is finite soon. With it, every step lowers the loss, but slowly: with such steps it is a long way back from
weights of 100. (By value it is faster here because its steps are longer: 26 against 4.) Clipping protects from a bad
step. It does not mend a bad initialisation.
"""

import math
import statistics
from itertools import pairwise, repeat

import torch
from experiment import (
    BLUE,
    FAINT,
    GREEN,
    RED,
    Claim,
    Report,
    label_lines,
    larger,
    main,
    network,
    panels,
    spread,
    train,
)
from matplotlib.axes import Axes
from sklearn.datasets import make_regression
from torch import Tensor, nn

import trainops

MAX_NORM, MAX_VALUE, LR, SCALE = 4.0, 1.0, 0.01, 100.0
Parameters = list[nn.Parameter]


def by_norm(parameters: Parameters) -> None:
    """Scale the whole gradient."""
    trainops.clip_grad_norm_(parameters, MAX_NORM)


def by_value(parameters: Parameters) -> None:
    """Cut each of its numbers."""
    trainops.clip_grad_value_(parameters, MAX_VALUE)


def no_clipping(parameters: Parameters) -> None:
    """Leave it."""


WAYS = {
    "no clipping": (no_clipping, RED),
    f"by norm, {MAX_NORM:g}": (by_norm, BLUE),
    f"by value, {MAX_VALUE:g}": (by_value, GREEN),
}


def start(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, and what it is to learn."""
    x, y = (torch.tensor(z, dtype=torch.float32) for z in make_regression(200, 10, random_state=seed))
    torch.manual_seed(seed)
    model = network(10, 20, 20, 1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=SCALE)
    return model, x, ((y - y.mean()) / y.std())[:, None]


def gradient(way: str, seed: int) -> Tensor:
    """The first gradient, of all parameters in one vector."""
    model, x, y = start(seed)
    nn.functional.mse_loss(model(x), y).backward()
    WAYS[way][0](list(model.parameters()))
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()


def angle(a: Tensor, b: Tensor) -> float:
    """Between two vectors, in degrees."""
    return math.degrees(math.acos(min(1.0, (a @ b / (a.norm() * b.norm())).item())))


def fit(way: str, steps: int, seed: int) -> list[float]:
    """The loss, relative to that before the first step."""
    model, x, y = start(seed)
    optimizer = trainops.SGD(model.parameters(), LR)
    optimizer.register_step_pre_hook(lambda *_: WAYS[way][0](list(model.parameters())))
    losses = train(model, optimizer, repeat((x, y), steps), nn.functional.mse_loss)
    return [loss / losses[0] for loss in losses]


def draw_directions(axes: Axes) -> None:
    """What happens to one gradient of two weights."""
    gradient = torch.tensor([8.0, 2.5])
    for way, (clip, colour) in WAYS.items():
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = gradient.clone()
        clip([weight])
        x, y = weight.grad.tolist()
        axes.annotate("", (x, y), (0, 0), arrowprops={"color": colour, "arrowstyle": "-|>", "lw": 2, "shrinkA": 0})
        axes.annotate(way, (x, y), xytext=(0, 6), textcoords="offset points", color=colour, ha="right")
    axes.set(title="A gradient of two weights", xlabel="weight 1", ylabel="weight 2", xlim=(-2, 9), ylim=(0, 4))
    axes.set_aspect("equal")


def run(seeds: int = 10, steps: int = 200) -> Report:
    """Clip the first gradient; train."""
    gradients = {way: [gradient(way, seed) for seed in range(seeds)] for way in WAYS}
    free, norm, value = WAYS
    norms = {way: [g.norm().item() for g in its] for way, its in gradients.items()}
    angles = {way: [angle(a, b) for a, b in zip(its, gradients[free], strict=True)] for way, its in gradients.items()}
    losses = {way: [fit(way, steps, seed) for seed in range(seeds)] for way in WAYS}
    figure, (left, right) = panels(2, width=5.4)
    draw_directions(left)
    for way in (norm, value):
        medians = [statistics.median(step) for step in zip(*losses[way], strict=True)]
        right.plot(medians, color=WAYS[way][1], label=way)
    right.axhline(1, color=FAINT, linewidth=0.8, zorder=0)
    right.set(title="Training", xlabel="step", ylabel="loss relative to the start", ylim=(0, 1.1))
    right.text(0, 1.03, "no clipping: not finite after the first step", color=RED)
    label_lines(right)

    rows = [
        (way, spread(norms[way], ".3g"), spread(angles[way], ".2f"), spread([its[-1] for its in losses[way]], ".3f"))
        for way in WAYS
    ]
    off = max(abs(length - MAX_NORM) for length in norms[norm])
    finite = max(sum(map(math.isfinite, its)) for its in losses[free])
    falls = all(b < a for way in (norm, value) for its in losses[way] for a, b in pairwise(its))
    claims = [
        Claim(f"by norm: the norm is 4 up to {off:.1e}, with every seed", off < 1e-5),
        Claim(f"by norm: the direction is the same up to {max(angles[norm]):.0e} degrees", max(angles[norm]) < 1e-3),
        larger("by value: the direction turns", angles[value], angles[norm], by=45, unit=" degrees"),
        Claim(f"without clipping, no loss is finite after step {finite}", finite < min(10, steps)),
        Claim("with either way of clipping, every step lowers the loss, with every seed", falls),
    ]
    header = ("", "norm", "angle to the gradient, degrees", f"loss after {steps} steps / before")
    return Report(header, rows, figure, claims)


if __name__ == "__main__":
    main(run, __doc__)
