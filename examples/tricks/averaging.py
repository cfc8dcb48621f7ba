"""EMA: averaged weights against the last ones.

    python examples/tricks/averaging.py [--seeds 10] [--steps 400]

A 64-64-10 network learns 300 digits, of which a fifth got a random label, with SGD at a constant rate and batches of
16. Such training never settles: the weights jump around, and how good they are depends on the step at which it stops.
`trainops.EMA` (decay 0.98: about the last 50 steps), given to the optimizer, follows them and is better nearly all
the time, and steadier.

A rate that falls to 0 settles the weights as well, and ends at least as good as the average: who knows when training
will stop needs no average for this. An average is good at every step.
"""

import math
import statistics

import torch
from experiment import (
    BLUE,
    GREEN,
    ORANGE,
    Report,
    accuracy,
    batches,
    digits,
    larger,
    main,
    network,
    panels,
    spread,
    train,
)

import trainops

RAW, AVERAGE, FALLING = "last weights", "average", "last weights, rate to 0"
COLOURS = {RAW: ORANGE, AVERAGE: BLUE, FALLING: GREEN}
LR, DECAY, BATCH, NOISE, EVERY = 0.1, 0.98, 16, 0.2, 10


def fit(steps: int, seed: int) -> dict[str, list[float]]:
    """Test accuracy every few steps."""
    x, y, test_x, test_y = digits(300, seed)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(10, y.shape, generator=generator)
    y = torch.where(torch.rand(y.shape, generator=generator) < NOISE, random, y)
    torch.manual_seed(seed)
    constant, falling = network(64, 64, 10), network(64, 64, 10)
    falling.load_state_dict(constant.state_dict())
    ema = trainops.EMA(constant, DECAY)
    optimizer = trainops.SGD(constant.parameters(), LR, ema=ema)
    settling = trainops.SGD(falling.parameters(), LR)
    found = {way: [] for way in COLOURS}
    for start in range(0, steps, EVERY):
        data = list(batches(x, y, BATCH, EVERY, 10_000 * seed + start))
        train(constant.train(), optimizer, data)
        settling.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * start / steps)) / 2
        train(falling.train(), settling, data)
        for way, model in zip(COLOURS, (constant, ema.module, falling), strict=True):
            found[way].append(accuracy(model, test_x, test_y))
    return found


def run(seeds: int = 10, steps: int = 400) -> Report:
    """Train with each seed; the last quarter counts."""
    runs = [fit(steps, seed) for seed in range(seeds)]
    figure, (left, right) = panels(2, width=5.4)
    at = range(EVERY, steps + EVERY, EVERY)
    for way, colour in COLOURS.items():
        left.plot(at, runs[0][way], color=colour, label=way)
        right.plot(
            at, [statistics.median(its) for its in zip(*(one[way] for one in runs), strict=True)], color=colour
        )
    left.set(title="One seed", xlabel="step", ylabel="test accuracy, %", ylim=(70, 95))
    right.set(title="Median of the seeds", xlabel="step", ylabel="test accuracy, %", ylim=(70, 95))
    left.legend(fontsize=9, loc="lower right")

    late = {way: [one[way][-(len(one[way]) // 4) :] for one in runs] for way in COLOURS}
    means = {way: [statistics.fmean(its) for its in late[way]] for way in COLOURS}
    swings = {way: [max(its) - min(its) for its in late[way]] for way in COLOURS}
    last = {way: [its[-1] for its in late[way]] for way in COLOURS}
    rows = [(way, spread(means[way]), spread(swings[way]), spread(last[way])) for way in COLOURS]
    claims = [
        larger("mean of the last quarter: the average is better", means[AVERAGE], means[RAW], by=1, unit=" points"),
        larger(
            "from the best to the worst: the last weights swing more",
            swings[RAW],
            swings[AVERAGE],
            by=1,
            unit=" points",
        ),
        larger("and so is the rate that falls to 0", means[FALLING], means[RAW], unit=" points"),
    ]
    header = ("", "accuracy in the last quarter, mean, %", "best - worst there, points", "at the end, %")
    return Report(header, rows, figure, claims)


if __name__ == "__main__":
    main(run, __doc__)
