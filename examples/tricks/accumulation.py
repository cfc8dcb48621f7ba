"""Gradient accumulation: many small batches as one large one.

    python examples/tricks/accumulation.py [--seeds 10] [--steps 50]

A batch of 256 digits gives one gradient at once, or adds up those of 8 batches of 32, of which each loss is divided
by 8. The two are equal but for the order in which float32 numbers are added, and stay so in training. (With ReLU in
place of tanh, single runs get 0.0001 apart: where a sum is 0 up to rounding, rounding decides whether a unit is on.)

There are two traps. Where the small batches have different sizes, as the words of sentences have, the mean of their
means is not the mean: divide the sum of all losses by the number of all samples. And batch norm takes its statistics
from the small batch, which nothing cures.
"""

from collections.abc import Callable, Sequence

import torch
from experiment import BLUE, GREEN, ORANGE, RED, Claim, Report, batches, digits, main, network, panels, spread
from torch import Tensor, nn

import trainops

BATCH, LR = 256, 0.1


def plain() -> nn.Module:
    """No sample knows of another."""
    return network(64, 64, 10, activation=nn.Tanh)


def normed() -> nn.Module:
    """With batch norm."""
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 10))


def mean_of_means(model: nn.Module, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Each part's mean loss, divided by the number of parts."""
    for x, y in parts:
        (nn.functional.cross_entropy(model(x), y) / len(parts)).backward()


def mean_of_all(model: nn.Module, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Each part's summed loss, divided by the number of samples in all parts."""
    samples = sum(len(y) for _, y in parts)
    for x, y in parts:
        (nn.functional.cross_entropy(model(x), y, reduction="sum") / samples).backward()


EQUAL, UNEQUAL = [32] * 8, [128, 64, 32, 16, 8, 4, 2, 1, 1]
WAYS: dict[str, tuple[Callable, Callable, list[int], str]] = {
    "8 parts of 32": (plain, mean_of_means, EQUAL, GREEN),
    "parts of 128, 64, ..., 1, counted": (plain, mean_of_all, UNEQUAL, BLUE),
    "the same, mean of means": (plain, mean_of_means, UNEQUAL, ORANGE),
    "8 parts of 32, batch norm": (normed, mean_of_means, EQUAL, RED),
}


def compare(way: str, steps: int, seed: int) -> list[float]:
    """How far the weights are from those trained with whole batches, relative to how far these have moved."""
    build, accumulate, sizes, _ = WAYS[way]
    x, y, *_ = digits(1200, seed)
    torch.manual_seed(seed)
    first = build()
    models = [first, build()]
    models[1].load_state_dict(first.state_dict())
    optimizers = [trainops.SGD(model.parameters(), LR) for model in models]
    start = nn.utils.parameters_to_vector(first.parameters()).detach().double()
    found = []
    for batch in batches(x, y, BATCH, steps, seed):
        parts = list(zip(*(tensor.split(sizes) for tensor in batch), strict=True))
        mean_of_means(models[0], [batch])
        accumulate(models[1], parts)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        whole, pieced = (nn.utils.parameters_to_vector(model.parameters()).detach().double() for model in models)
        found.append(((whole - pieced).norm() / (whole - start).norm()).item())
    return found


def run(seeds: int = 10, steps: int = 50) -> Report:
    """Train each network twice."""
    found = {way: [compare(way, steps, seed) for seed in range(seeds)] for way in WAYS}
    figure, (axes,) = panels(1, width=7.2)
    for way, its in found.items():
        axes.plot(range(1, steps + 1), torch.tensor(its).quantile(0.5, dim=0), color=WAYS[way][-1], label=way)
    axes.set(title="Distance from training with whole batches", xlabel="step", yscale="log")
    axes.set(ylabel="distance / distance from the start")
    axes.legend(fontsize=9, loc="center right")
    rows = [(way, *(spread([one[step] for one in its], ".1e") for step in (0, -1))) for way, its in found.items()]
    equal, counted, means, norm = ([value for one in its for value in one] for its in found.values())
    claims = [
        Claim(f"parts of one size: equal up to {max(equal):.0e}, with every seed and step", max(equal) < 1e-5),
        Claim(f"counted parts: equal up to {max(counted):.0e}", max(counted) < 1e-5),
        Claim(f"mean of means of parts of different sizes: at least {min(means):.0e} apart", min(means) > 1e-2),
        Claim(f"batch norm: at least {min(norm):.0e} apart", min(norm) > 1e-2),
    ]
    return Report(("", "after 1 step", f"after {steps} steps"), rows, figure, claims)


if __name__ == "__main__":
    main(run, __doc__)
