"""A whole training step: forward and backward of a small ViT and a small GPT, and the tail three ways.

How much of a step the tail is depends on the batch: each model is trained with a small one, as when memory is short,
and with a larger one, where there is little to gain.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import trainops

from .__main__ import main
from .bench_ema import lerp_foreach
from .runner import Case, Options, Provider, Step
from .saved import OURS
from .work import DECAY

# The error of all movement of parameters and of averages, as a share of it. Not element by element: Adam's first
# steps are as long for gradients that rounding errors have the wrong sign of.
STEPS, TOLERANCE = 3, 0.03

SETTINGS = {"lr": 1e-3, "weight_decay": 0.05}
MAX_NORM = 1.0


class Net(NamedTuple):
    """A transformer, and what it is fed with. Images are patches of 768 numbers already."""

    dim: int
    depth: int
    tokens: int
    batches: tuple[int, int]
    vocabulary: int = 0


NETS = {
    "cpu": {"ViT-Ti": Net(192, 12, 197, (2, 8)), "GPT": Net(512, 6, 128, (1, 4), 16384)},
    "cuda": {"ViT-B": Net(768, 12, 197, (8, 128)), "GPT-2": Net(768, 12, 512, (2, 16), 50257)},
}


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.causal = nn.LayerNorm(dim), nn.LayerNorm(dim), causal
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A stack of blocks over patches or words, with its loss."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.embed = nn.Embedding(net.vocabulary, net.dim) if net.vocabulary else nn.Linear(768, net.dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, net.tokens, net.dim))
        self.blocks = nn.Sequential(*(Block(net.dim, bool(net.vocabulary)) for _ in range(net.depth)))
        self.norm, self.head = nn.LayerNorm(net.dim), nn.Linear(net.dim, net.vocabulary or 1000)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy: of each next word, or of each image's class."""
        x = self.norm(self.blocks(self.embed(inputs) + self.position))
        x = x if targets.ndim == 2 else x.mean(1)
        return nn.functional.cross_entropy(self.head(x).flatten(0, -2), targets.flatten())


class Tail(NamedTuple):
    """What follows a backward pass, and the averages that it moves."""

    step: Step
    averages: list[Tensor]


def as_written(model: nn.Module) -> Tail:
    """What everybody writes, with PyTorch's defaults. The first average would be a copy."""
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    ema.n_averaged.fill_(1)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        ema.update_parameters(model)

    return Tail(step, list(ema.module.parameters()))


def fastest(model: nn.Module) -> Tail:
    """PyTorch's fastest documented composition."""
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, **SETTINGS, fused=True)
    averages = [p.detach().clone() for p in params]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()
        lerp_foreach(averages, params)

    return Tail(step, averages)


def ours(model: nn.Module) -> Tail:
    """In one call. The negative `update_after_step` leaves out the copy with which an EMA begins."""
    ema = trainops.EMA(model, DECAY, update_after_step=-2)
    optimizer = trainops.AdamW(model.parameters(), **SETTINGS, max_grad_norm=MAX_NORM, ema=ema)
    return Tail(optimizer.step, list(ema.module.parameters()))


TAILS: dict[str, Callable[[nn.Module], Tail]] = {"torch as written": as_written, "torch fused": fastest, OURS: ours}


class TrainingBench:
    """One model for each provider, from the same weights, on the same batch."""

    def __init__(self, net: Net, batch: int, device: str) -> None:
        torch.manual_seed(0)
        self.model = Transformer(net).to(device)
        if net.vocabulary:
            words = torch.randint(net.vocabulary, (batch, net.tokens + 1)).to(device)
            self.inputs, self.targets = words[:, :-1], words[:, 1:]
        else:
            self.inputs = torch.randn(batch, net.tokens, 768).to(device)
            self.targets = torch.randint(1000, (batch,)).to(device)
        self.expected: list[Tensor] | None = None

    def admit(self, name: str) -> tuple[Provider, float]:
        """Parameters and averages after some steps, against float64."""
        if self.expected is None:
            exact = copy.deepcopy(self.model).double()
            self.expected = self.moved(exact, fastest(exact))
        model = copy.deepcopy(self.model)
        tail = TAILS[name](model)
        moved = self.moved(model, tail)
        errors = [torch.dist(ours, truth) / truth.norm() for ours, truth in zip(moved, self.expected, strict=True)]
        return self.provider(model, tail), float(torch.stack(errors).max()) / TOLERANCE

    def moved(self, model: nn.Module, tail: Tail) -> list[Tensor]:
        """Take steps: how far all parameters and all averages have come."""
        provider = self.provider(model, tail)
        for _ in range(STEPS):
            provider.step()
        start = parameters_to_vector(self.model.parameters()).detach().double()
        ends = model.parameters(), tail.averages
        return [parameters_to_vector(end).detach().double() - start for end in ends]

    def provider(self, model: nn.Module, tail: Tail) -> Provider:
        """Forward and backward, and the tail."""
        dtype = next(model.parameters()).dtype
        inputs = self.inputs.to(dtype) if self.inputs.is_floating_point() else self.inputs

        def forward_backward() -> None:
            model.zero_grad(set_to_none=True)
            model(inputs, self.targets).backward()

        return Provider({"forward and backward": forward_backward, "tail": tail.step})


def cases(options: Options) -> Iterator[Case]:
    """Each model with a small and a larger batch, in float32."""
    if options.models is not None or (options.dtypes and "float32" not in options.dtypes):
        return
    for name, net in NETS[options.device].items():
        for batch in net.batches[:1] if options.quick else net.batches:
            with torch.device("meta"):
                params = list(Transformer(net).parameters())
            count = sum(p.numel() for p in params)
            activations = batch * net.tokens * (net.depth * net.dim * 40 + 4 * net.vocabulary)
            yield Case(
                "training",
                f"{name}, batch {batch} of {net.tokens}",
                list(TAILS),
                lambda net=net, batch=batch: TrainingBench(net, batch, options.device),
                group="training",
                common=1,
                tensors=len(params),
                numel=count,
                need=4 * (30 * count + 2 * activations),
                cold=False,
            )


def test_training(measured) -> None:
    """Under pytest-benchmark."""


if __name__ == "__main__":
    sys.exit(main(["--ops", "training", *sys.argv[1:]]))
