"""DropPath: test accuracy against the rate.

    python examples/tricks/drop_path.py [--seeds 5] [--steps 200]

Four residual blocks learn 300 digits, of which 30% got a random label, and are tested with the 1497 others. Each
block leaves out its branch for some samples, with `trainops.DropPathAdd(rate)`.

The usual rates, 0.1 to 0.4, do nothing here that is larger than the noise of the seeds: four blocks of so small a
network learn the wrong labels all the same. Only rates that keep the network from learning them help the test, and
these are far above what large models use. DropPath is for depth and long training. In a small network, dropout does
more (see there).
"""

import statistics

import torch
from experiment import BLUE, ORANGE, Report, accuracy, batches, digits, larger, main, panels, spread, train
from torch import Tensor, nn

import trainops

RATES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)
DIM, DEPTH, NOISE, LR = 64, 4, 0.3, 3e-3


class Block(nn.Module):
    """A residual block of a multi-layer perceptron."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.add = trainops.DropPathAdd(rate)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, DIM] to the same."""
        return self.add(x, self.branch(x))


def fit(rate: float, steps: int, seed: int) -> tuple[float, float]:
    """Accuracy in training, with the labels that were learned, and in the test."""
    x, y, test_x, test_y = digits(300, seed)
    torch.manual_seed(seed)
    y = torch.where(torch.rand(y.shape) < NOISE, torch.randint(10, y.shape), y)
    blocks = [Block(rate) for _ in range(DEPTH)]
    model = nn.Sequential(nn.Linear(64, DIM), *blocks, nn.LayerNorm(DIM), nn.Linear(DIM, 10))
    train(model, trainops.AdamW(model.parameters(), LR), batches(x, y, 64, steps, seed))
    return accuracy(model, x, y), accuracy(model, test_x, test_y)


def run(seeds: int = 5, steps: int = 200) -> Report:
    """Train at each rate."""
    found = {rate: list(zip(*(fit(rate, steps, seed) for seed in range(seeds)), strict=True)) for rate in RATES}
    figure, (axes,) = panels(1, width=7.2)
    for part, (label, colour) in enumerate((("training, wrong labels among them", ORANGE), ("test", BLUE))):
        axes.plot(RATES, [statistics.median(found[rate][part]) for rate in RATES], color=colour, label=label)
        for rate in RATES:
            axes.plot([rate] * seeds, found[rate][part], "o", color=colour, alpha=0.4, markersize=4)
    axes.set(title="Each seed, and the medians", xlabel="rate of every block", ylabel="accuracy, %")
    axes.legend(fontsize=9, loc="lower left")
    training, test = ({rate: found[rate][part] for rate in RATES} for part in (0, 1))
    rows = [(f"{rate:g}", spread(training[rate]), spread(test[rate])) for rate in RATES]
    points = {"by": 1, "unit": " points"}
    claims = [
        larger("training: none fits the labels better than 0.9", training[0.0], training[0.9], **points),
        larger("test: 0.9 is better than none", test[0.9], test[0.0], **points),
    ]
    return Report(("rate", "training accuracy, %", "test accuracy, %"), rows, figure, claims)


if __name__ == "__main__":
    main(run, __doc__)
