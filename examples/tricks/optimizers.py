"""SGD, momentum and Adam on one network.

    python examples/tricks/optimizers.py [--seeds 5] [--steps 300]

A 64-64-10 network learns the digits, in batches of 64. All with the learning rate 0.01, Adam is far ahead of
momentum, and that of plain SGD, as is often shown. But this compares the lengths of steps as much as optimizers: with
momentum 0.9, steps are in the long run ten times as long, so that momentum at 0.01 does what SGD does at 0.1. Adam's
steps have the length of the rate, whatever the gradient. On the right, each gets the rates that it needs (the best
one is marked). Of Adam's lead over SGD little is left, and none over momentum that is larger than the noise of the
seeds.
"""

import statistics
from itertools import product

import torch
from experiment import (
    BLUE,
    GREEN,
    ORANGE,
    Claim,
    Report,
    above,
    batches,
    digits,
    label_lines,
    main,
    network,
    panels,
    spread,
    train,
)

import trainops

WAYS = {
    "SGD": (lambda parameters, lr: trainops.SGD(parameters, lr), ORANGE),
    "momentum 0.9": (lambda parameters, lr: trainops.SGD(parameters, lr, momentum=0.9), GREEN),
    "Adam": (lambda parameters, lr: trainops.Adam(parameters, lr), BLUE),
}
SAME, RATES = 0.01, (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
LAST = 20  # steps that a loss is the mean of


def fit(way: str, lr: float, steps: int, seed: int) -> list[float]:
    """The mean losses of 20 steps each."""
    x, y, *_ = digits(1200, seed)
    torch.manual_seed(seed)
    model = network(64, 64, 10)
    losses = train(model, WAYS[way][0](model.parameters(), lr), batches(x, y, 64, steps, seed))
    return [statistics.fmean(losses[max(0, end - LAST) : end]) for end in range(steps, 0, -LAST)][::-1]


def run(seeds: int = 5, steps: int = 300) -> Report:
    """Train with every rate."""
    curves = {
        (way, lr): [fit(way, lr, steps, seed) for seed in range(seeds)]
        for way, lr in product(WAYS, {*RATES, SAME, 10 * SAME})
    }
    last = {key: [curve[-1] for curve in its] for key, its in curves.items()}
    medians = {key: statistics.median(losses) for key, losses in last.items()}
    best = {way: min(RATES, key=lambda lr, way=way: medians[way, lr]) for way in WAYS}
    figure, (left, right) = panels(2)
    for way, (_, colour) in WAYS.items():
        curve = [statistics.median(losses) for losses in zip(*curves[way, SAME], strict=True)]
        left.plot(range(LAST, steps + 1, LAST), curve, color=colour, label=way)
        right.plot(RATES, [medians[way, lr] for lr in RATES], "o-", color=colour, label=way)
        right.plot(best[way], medians[way, best[way]], "o", color=colour, markersize=11)
    left.set(title=f"All at the rate {SAME:g}", xlabel="step", ylabel=f"training loss, mean of {LAST} steps")
    left.set(yscale="log")
    label_lines(left)
    right.set(title="Each at several rates", xlabel="learning rate", ylabel=f"training loss after {steps} steps")
    right.set(xscale="log", yscale="log")
    right.legend(fontsize=9)

    rows = [
        (way, spread(last[way, SAME], ".3g"), f"{best[way]:g}", spread(last[way, best[way]], ".3g")) for way in WAYS
    ]

    def ratios(these: tuple[str, float], others: tuple[str, float]) -> list[float]:
        return [a / b for a, b in zip(last[these], last[others], strict=True)]

    sgd, momentum, adam = WAYS
    lead, lead_at_best = ratios((sgd, SAME), (adam, SAME)), ratios((sgd, best[sgd]), (adam, best[adam]))
    shrinks = [a / b for a, b in zip(lead, lead_at_best, strict=True)]
    like = ratios((sgd, 10 * SAME), (momentum, SAME))
    claims = [
        above("at 0.01, the loss of SGD over that of momentum", ratios((sgd, SAME), (momentum, SAME)), 2),
        above("at 0.01, the loss of momentum over that of Adam", ratios((momentum, SAME), (adam, SAME)), 2),
        above("at 0.01, the loss of SGD over that of Adam", lead, 4),
        above("this ratio at 0.01 over the same with the best rates", shrinks, 2),
        Claim(
            f"SGD at 0.1 ends where momentum at 0.01 does: ratio {spread(like, '.2f')}",
            0.8 < min(like) <= max(like) < 1.25,
        ),
    ]
    return Report(("optimizer", "loss at 0.01", "its best rate", "loss there"), rows, figure, claims)


if __name__ == "__main__":
    main(run, __doc__)
