"""Vanishing gradients: sigmoid against ReLU, 30 layers deep.

    python examples/tricks/vanishing_gradients.py [--seeds 10] [--depth 30]

On the left, the textbook's network: one unit in each layer, every weight 1. A sigmoid's derivative is at most 1/4,
and here, where the units settle at 0.659, it is 0.225: each layer takes three quarters of the gradient. ReLU passes
it on.

That network cannot learn, and its ReLU is the identity. On the right, a network that could: 64 units in each layer,
on the digits. The sigmoids lose the gradient there, too, whatever the initialisation. ReLU alone does not save it:
PyTorch's own initialisation loses more than half of it in each layer. He's, which was made for ReLU, keeps it.
"""

import math
import statistics

import torch
from experiment import BLUE, GREEN, ORANGE, RED, Claim, Report, digits, larger, main, network, panels, spread
from torch import Tensor, nn


def gradient_norms(model: nn.Sequential, x: Tensor, loss) -> list[float]:
    """Of the weights of each layer, from the first one to the last one."""
    model.zero_grad()
    loss(model(x)).backward()
    return [layer.weight.grad.norm().item() for layer in model if isinstance(layer, nn.Linear)]


def chain(activation: type[nn.Module], depth: int) -> list[float]:
    """Gradients of ``depth`` layers of one unit, all weights 1, no biases, at the input 1."""
    model = nn.Sequential()
    for _ in range(depth):
        model.extend((nn.Linear(1, 1, bias=False, dtype=torch.float64), activation()))
    for weight in model.parameters():
        nn.init.ones_(weight)
    return gradient_norms(model, torch.ones(1, 1, dtype=torch.float64), torch.sum)


def he(model: nn.Module) -> None:
    """He's initialisation: variance 2 / inputs."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def xavier(model: nn.Module) -> None:
    """Glorot's initialisation: variance 2 / (inputs + outputs)."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)


WIDE = {  # activation, initialisation, colour
    "ReLU, He": (nn.ReLU, he, GREEN),
    "ReLU, PyTorch's": (nn.ReLU, lambda model: None, BLUE),
    "sigmoid, Xavier": (nn.Sigmoid, xavier, ORANGE),
    "sigmoid, PyTorch's": (nn.Sigmoid, lambda model: None, RED),
}


def wide(way: str, depth: int, seed: int) -> list[float]:
    """Gradients of a classifier of the digits, before it learns anything; in float32, some would be 0."""
    activation, initialise, _ = WIDE[way]
    x, y, *_ = digits(256, seed)
    torch.manual_seed(seed)
    model = network(64, *[64] * (depth - 1), 10, activation=activation)
    initialise(model)
    return gradient_norms(model.double(), x.double(), lambda outputs: nn.functional.cross_entropy(outputs, y))


def run(seeds: int = 10, depth: int = 30) -> Report:
    """Gradients by layer, relative to the last hidden layer's where networks are compared."""
    chains = {"ReLU": chain(nn.ReLU, depth), "sigmoid": chain(nn.Sigmoid, depth)}
    wides = {way: [wide(way, depth, seed) for seed in range(seeds)] for way in WIDE}
    figure, (left, right) = panels(2, width=5.4)
    for (name, gradients), colour in zip(chains.items(), (GREEN, RED), strict=True):
        left.plot(range(1, depth + 1), gradients, "o-", markersize=3, color=colour, label=name)
    for name, its in wides.items():
        medians = [statistics.median(layer) for layer in zip(*its, strict=True)]
        right.plot(range(1, depth + 1), medians, "o-", markersize=3, color=WIDE[name][2], label=name)
    left.set(title="One unit a layer, weights of 1", ylabel="gradient of the weight")
    right.set(title="64 units a layer, digits", ylabel="norm of the weights' gradient, median")
    for axes in (left, right):
        axes.set(yscale="log", xlabel="layer, from the input to the output")
        axes.grid(axis="y", color="#e4e7eb")
        # The names stand where the lines end that matter: at the first layer.
        axes.legend(fontsize=9, loc="lower right")

    rows = [(f"1 unit, {name}", f"{its[0]:.1e}", f"{its[-1]:.1e}") for name, its in chains.items()]
    ends = {way: [[one[0] for one in its], [one[-1] for one in its]] for way, its in wides.items()}
    rows += [(f"64 units, {way}", *(spread(end, ".1e") for end in its)) for way, its in ends.items()]
    lost = {way: [math.log10(b / a) for a, b in zip(*its, strict=True)] for way, its in ends.items()}
    first = chains["sigmoid"][0]
    claims = [
        Claim(f"one unit: the first layer's gradient is {first:.1e} with sigmoid", first < 0.25**depth),
        Claim("one unit: it is exactly 1 in every layer with ReLU", set(chains["ReLU"]) == {1.0}),
        larger(
            "64 units, PyTorch's initialisation: powers of ten that sigmoid loses more than ReLU from end to end",
            lost["sigmoid, PyTorch's"],
            lost["ReLU, PyTorch's"],
            by=depth / 10,
        ),
        larger(
            "64 units: powers of ten that sigmoid loses more than ReLU, each with the initialisation made for it",
            lost["sigmoid, Xavier"],
            lost["ReLU, He"],
            by=depth / 10,
        ),
        larger(
            "64 units, ReLU: powers of ten that PyTorch's initialisation loses more than He's",
            lost["ReLU, PyTorch's"],
            lost["ReLU, He"],
            by=depth / 10,
        ),
    ]
    return Report(("network", "gradient of the first layer", "of the last layer"), rows, figure, claims)


if __name__ == "__main__":
    main(run, __doc__)
