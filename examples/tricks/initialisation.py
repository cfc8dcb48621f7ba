"""Initialisation: what reaches the end of a network, and what comes back.

    python examples/tricks/initialisation.py [--seeds 10] [--steps 20]

A 512-256-256-128 network with ReLU meets 250 samples of `make_regression` (512 inputs, 128 targets, all of variance
1). The picture has the variance of what each layer computes, and of the loss's gradient there, before training.

With all weights 0.01, every unit of a layer computes the same and gets the same gradient. It stays one unit, however
long it is trained. Weights of a fixed deviation, 0.01, are too small for these widths: the signal fades. He's
variance, 2 / inputs, keeps it. Xavier's, 2 / (inputs + outputs), is meant for activations that pass on what they get.
ReLU passes on half of it, and so it halves from layer to layer. Three layers bear that; in 30 it would be a factor of
a billion.
"""

import statistics
from functools import cache
from itertools import repeat

import torch
from experiment import (
    BLUE,
    GREEN,
    ORANGE,
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
from sklearn.datasets import make_regression
from torch import Tensor, nn

import trainops

SIZES = (512, 256, 256, 128)
WAYS = {
    "constant 0.01": (lambda weight: nn.init.constant_(weight, 0.01), RED),
    "deviation 0.01": (lambda weight: nn.init.normal_(weight, std=0.01), ORANGE),
    "Xavier": (nn.init.xavier_normal_, BLUE),
    "He": (lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"), GREEN),
}


@cache
def samples(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each of mean 0 and variance 1."""
    x, y = make_regression(250, SIZES[0], n_informative=64, n_targets=SIZES[-1], random_state=seed)
    x, y = (torch.tensor(z, dtype=torch.float32) for z in (x, y))
    return tuple((z - z.mean(dim=0)) / z.std(dim=0) for z in (x, y))


def look(way: str, steps: int, seed: int) -> tuple[list[float], list[float], int]:
    """Variances of the layers' outputs and of the gradients there; then, how many units of layer 2 differ."""
    x, y = samples(seed)
    torch.manual_seed(seed)
    model = network(*SIZES)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer in layers:
        WAYS[way][0](layer.weight)
        nn.init.zeros_(layer.bias)
    z = x
    outputs = [z := module(z) for module in model][::2]  # of the linear layers
    gradients = torch.autograd.grad(nn.functional.mse_loss(z, y), outputs)
    train(model, trainops.SGD(model.parameters(), 0.1), repeat((x, y), steps), nn.functional.mse_loss)
    forth, back = ([z.var().item() for z in tensors] for tensors in (outputs, gradients))
    return forth, back, len(layers[1].weight.unique(dim=0))


def run(seeds: int = 10, steps: int = 20) -> Report:
    """Look at each initialisation; train from it."""
    found = {way: [look(way, steps, seed) for seed in range(seeds)] for way in WAYS}
    figure, axes = panels(2)
    for part, panel in enumerate(axes):
        for way, its in found.items():
            medians = [statistics.median(layer) for layer in zip(*(one[part] for one in its), strict=True)]
            panel.plot(range(1, len(SIZES)), medians, "o-", color=WAYS[way][1], label=way)
        panel.set_xticks(range(1, len(SIZES)), [f"layer {i}\n{size} units" for i, size in enumerate(SIZES[1:], 1)])
        panel.set(yscale="log", ylabel="variance, median of the seeds")
        label_lines(panel)
    axes[0].set(title="What a layer computes")
    axes[1].set(title="The loss's gradient there")

    forth = {way: [outputs[-1] / outputs[0] for outputs, *_ in its] for way, its in found.items()}
    back = {way: [gradients[0] / gradients[-1] for _, gradients, _ in its] for way, its in found.items()}
    units = {way: [count for *_, count in its] for way, its in found.items()}
    rows = [(way, spread(forth[way], ".2g"), spread(back[way], ".2g"), spread(units[way], ".0f")) for way in WAYS]
    constant, fixed, xavier, he = WAYS
    kept = [0.5 < ratio < 2 for ratio in forth[he] + back[he]]
    claims = [
        Claim(
            "constant: all units of layer 2 are still one and the same after training", set(units[constant]) == {1}
        ),
        Claim("with the others, each unit is another", {*units[fixed], *units[xavier], *units[he]} == {SIZES[2]}),
        Claim("He keeps the variance within a factor of 2, forth and back, with every seed", all(kept)),
        Claim(
            f"deviation 0.01 loses a factor of at least {1 / max(forth[fixed]):.0f} forth and "
            f"{1 / max(back[fixed]):.0f} back, with every seed",
            max(forth[fixed] + back[fixed]) < 1e-3,
        ),
        larger("He keeps more than Xavier forth, as the difference of the ratios", forth[he], forth[xavier], by=0.3),
        larger("He keeps more than Xavier back", back[he], back[xavier], by=0.3),
    ]
    header = ("weights", "forth: layer 3 / layer 1", "back: layer 1 / layer 3", "different units in layer 2")
    return Report(header, rows, figure, claims)


if __name__ == "__main__":
    main(run, __doc__)
