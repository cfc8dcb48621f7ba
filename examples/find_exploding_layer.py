"""Find the layer that makes a deep network explode, by name and step, with a monitor.

    python examples/find_exploding_layer.py [--steps 60] [--output outputs/exploding_layer]

A residual network of 12 blocks learns handwritten digits (scikit-learn's; nothing is downloaded). At a third of the
steps, somebody's bug multiplies the weights of one block. The monitor says where, and its pictures show when.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn

import trainops

BLOCKS, WIDTH, BATCH, BAD_BLOCK, FACTOR = 12, 64, 64, 7, 300.0


class Block(nn.Module):
    """Adds what two layers make of normalised inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.widen, self.act, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` and the branch, (batch, width)."""
        out: Tensor = x + self.narrow(self.act(self.widen(self.norm(x))))
        return out


class Network(nn.Module):
    """Residual blocks between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (batch, 10)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def train(steps: int, console: Console) -> trainops.Monitor:
    """Train with the bug, and return what was seen."""
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(digits)
    model = Network()
    optimizer = trainops.AdamW(model.parameters(), 1e-3, max_grad_norm=1.0)
    monitor = trainops.Monitor(model, optimizer, every=max(1, steps // 20), activations="blocks.*.act")
    for step in range(1, steps + 1):
        if step == steps // 3:
            with torch.no_grad():
                model.blocks[BAD_BLOCK].narrow.weight.mul_(FACTOR)
        chosen = torch.randint(len(x), (BATCH,))
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    console.print(f"loss of the last step: {loss.item():.3g}")
    return monitor


def main() -> None:
    """Train, print a table and what looks wrong, save two pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("outputs/exploding_layer"), help="folder of the pictures")
    args = parser.parse_args()
    if args.steps < 3:
        parser.error("--steps must be at least 3")
    console = Console()
    monitor = train(args.steps, console)
    console.print(monitor.table())
    for finding in monitor.findings():
        console.print(str(finding), style="bold red")
    args.output.mkdir(parents=True, exist_ok=True)
    monitor.plot().savefig(args.output / "norms.png", dpi=120)
    monitor.plot_distributions().savefig(args.output / "distributions.png", dpi=120)
    monitor.write(args.output / "records.jsonl")
    console.print(f"saved pictures and records in {args.output}")


if __name__ == "__main__":
    main()
