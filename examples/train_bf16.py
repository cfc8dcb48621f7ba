"""Train a small network in bfloat16 three ways, and see it stall, and two cures.

    python examples/train_bf16.py [--device cuda] [--steps 600] [--seed 0]

The data are scikit-learn's 1797 images of 8 x 8 pixels; nothing is downloaded. All runs start from the same weights
and see the same batches. Their learning rate is small, as at the end of a schedule: a bfloat16 weight has 8
significant bits, so that most of its updates are less than half of its last place, and rounding loses them.

- float32: the reference, 16 bytes per parameter with its gradient and moments;
- bfloat16: weights, gradients and moments in bfloat16, 8 bytes;
- split: the same with ``master="split"``, 10 bytes. It follows the float32 run;
- stochastic: the 8 bytes of bfloat16 with ``stochastic_rounding=True``. It moves as far, on a noisier path.
"""

import argparse
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import trainops

BATCH, LR = 128, 3e-5


@dataclass
class Run:
    """One way to train."""

    name: str
    model: nn.Module
    optimizer: trainops.AdamW
    before: list[Tensor]  # its weights, in full

    def weights(self) -> list[Tensor]:
        """The weights in full: with a master, more than the model has."""
        return [x.clone() for x in self.optimizer.float32_state_dict(self.model).values()]

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One step; returns the loss."""
        dtype = next(self.model.parameters()).dtype
        loss = nn.functional.cross_entropy(self.model(images.to(dtype)).float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def start(name: str, state_dict: dict[str, Tensor], device: str) -> Run:
    """A run from these float32 weights."""
    model = network().to(device)
    model.load_state_dict(state_dict)
    if name == "float32":
        optimizer = trainops.AdamW(model.parameters(), LR)
    elif name == "bfloat16":
        optimizer = trainops.AdamW(model.bfloat16().parameters(), LR)
    elif name == "stochastic":
        optimizer = trainops.AdamW(model.bfloat16().parameters(), LR, stochastic_rounding=True)
    else:
        optimizer = trainops.AdamW(model.bfloat16().parameters(), LR, master="split")
        optimizer.load_float32_state_dict(model, state_dict)
    run = Run(name, model, optimizer, [])
    run.before = run.weights()
    return run


def network() -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))


def changed(before: list[Tensor], after: list[Tensor]) -> float:
    """The share of weights that are not what they were."""
    return sum((x != y).sum().item() for x, y in zip(before, after, strict=True)) / sum(x.numel() for x in before)


def moved(before: list[Tensor], after: list[Tensor]) -> float:
    """How far all weights have moved together."""
    return sum((x - y).square().sum().item() for x, y in zip(before, after, strict=True)) ** 0.5


def main(arguments: list[str] | None = None) -> None:
    """Train, and show a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    try:
        torch.ones(1, device=options.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32, device=options.device) / 16
    labels = torch.tensor(digits.target, device=options.device)

    torch.manual_seed(options.seed)
    state_dict = network().state_dict()
    runs = [start(name, state_dict, options.device) for name in ("float32", "bfloat16", "split", "stochastic")]
    losses: dict[str, list[float]] = {run.name: [] for run in runs}
    generator = torch.Generator().manual_seed(options.seed)
    began = time.perf_counter()
    for _ in range(options.steps):
        batch = torch.randint(len(labels), (BATCH,), generator=generator).to(options.device)
        for run in runs:
            losses[run.name].append(run.step(images[batch], labels[batch]))
    seconds = time.perf_counter() - began

    table = Table(
        "weights", "first loss", "last losses", "moved by", "changed by the last step", title="bfloat16 three ways"
    )
    last = max(1, min(20, options.steps // 2))
    for run in runs:
        before = run.weights()
        run.step(images[:BATCH], labels[:BATCH])
        its = losses[run.name]
        mean = sum(its[-last:]) / last
        share = changed(before, run.weights())
        table.add_row(run.name, f"{its[0]:.3f}", f"{mean:.3f}", f"{moved(run.before, before):.2f}", f"{share:.1%}")
    Console().print(table)
    print(
        f"{options.steps} steps of each in {seconds:.0f} s. Where rounding loses an update, a weight does not change."
    )


if __name__ == "__main__":
    main()
