"""A ViT block with stochastic depth and layer scale, written the usual way and the two ways of trainops.

    python examples/vit_stochastic_depth.py [--device cuda] [--drop-prob 0.4] [--steps 20] [--depth 2] [--dim 256]

All stacks start from the same weights and train on the same batches from the same seeds. The losses of the first
three agree, because they draw the same masks, timm's. ``fixed`` keeps other samples, always as many, so its losses
are its own. The blocks differ in ``forward`` alone.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import trainops


class Block(nn.Module):
    """The usual way: ``x + drop_path(layer_scale * branch(x))``, with everything computed and some of it dropped."""

    def __init__(self, dim: int, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((dim,), 0.1)) for _ in range(2))

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention of [batch, tokens, dim], with heads of 64."""
        batch, tokens, dim = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, tokens, 3, dim // 64, 64).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*heads)
        return self.proj(attended.transpose(1, 2).reshape(x.shape))

    def feed(self, x: Tensor) -> Tensor:
        """The multi-layer perceptron."""
        return self.mlp(self.norm2(x))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] to the same."""
        x = x + self.drop_path(self.attend(x) * self.gamma1)
        return x + self.drop_path(self.feed(x) * self.gamma2)

    def drop_path(self, x: Tensor) -> Tensor:
        """What timm's ``DropPath`` does."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        return x * (mask.div_(keep_prob) if keep_prob > 0.0 else mask)


class FusedBlock(Block):
    """Product, mask and sum in one pass each way."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] to the same."""
        x = trainops.drop_path_add(x, self.attend(x), self.drop_prob, self.training, layer_scale=self.gamma1)
        return trainops.drop_path_add(x, self.feed(x), self.drop_prob, self.training, layer_scale=self.gamma2)


class SkippingBlock(Block):
    """What is dropped is not computed."""

    mode = "bernoulli"

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] to the same."""
        options = {"drop_prob": self.drop_prob, "training": self.training, "mode": self.mode}
        x = trainops.stochastic_depth(x, self.attend, layer_scale=self.gamma1, **options)
        return trainops.stochastic_depth(x, self.feed, layer_scale=self.gamma2, **options)


class FixedBlock(SkippingBlock):
    """As many samples each time: static shapes, and on a GPU no wait."""

    mode = "fixed"


WAYS = {
    "the usual way": Block,
    "drop_path_add": FusedBlock,
    "stochastic_depth, bernoulli": SkippingBlock,
    "stochastic_depth, fixed": FixedBlock,
}


def timed_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, seed: int) -> tuple[float, float]:
    """Loss and seconds of a step that learns to return its input reversed."""

    def now() -> float:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter()

    torch.manual_seed(seed)
    start = now()
    loss = nn.functional.mse_loss(model(x), x.flip(-1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), now() - start


def main() -> None:
    """Train the stacks side by side, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--drop-prob", type=float, default=0.4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--dim", type=int, default=256, help="a multiple of 64")
    args = parser.parse_args()
    if not 0.0 <= args.drop_prob <= 1.0:
        parser.error("--drop-prob must be in [0, 1]")
    if args.steps < 1 or args.depth < 1:
        parser.error("--steps and --depth must be at least 1")
    if args.dim < 64 or args.dim % 64:
        parser.error("--dim must be a positive multiple of 64")
    try:
        torch.zeros((), device=args.device).item()
    except (AssertionError, RuntimeError) as error:
        parser.error(f"--device {args.device}: {error}")
    models, optimizers = {}, {}
    for name, block in WAYS.items():
        torch.manual_seed(0)
        models[name] = nn.Sequential(*(block(args.dim, args.drop_prob) for _ in range(args.depth))).to(args.device)
        optimizers[name] = trainops.AdamW(models[name].parameters(), 1e-3, max_grad_norm=1.0)
    losses, seconds = {name: [] for name in WAYS}, {name: [] for name in WAYS}
    for step in track(range(args.steps), "training all four"):
        x = torch.randn(32, 64, args.dim, device=args.device)
        for name in WAYS:
            loss, elapsed = timed_step(models[name], optimizers[name], x, seed=step)
            losses[name].append(loss)
            seconds[name].append(elapsed)
    usual = next(iter(WAYS))
    table = Table("", "ms, median", "times as fast", "last loss", "losses apart")
    for name in WAYS:
        apart = max(abs(a - b) for a, b in zip(losses[name], losses[usual], strict=True))
        median = {which: statistics.median(seconds[which][1:] or seconds[which]) for which in (name, usual)}
        ratio = f"{median[usual] / median[name]:.2f}"
        table.add_row(name, f"{1e3 * median[name]:.1f}", ratio, f"{losses[name][-1]:.5f}", f"{apart:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
