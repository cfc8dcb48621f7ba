"""Train a small vision transformer on handwritten digits, with stock PyTorch and with trainops, side by side.

    python examples/train_digits.py [--device cuda] [--steps 300] [--seed 0] [--output outputs/train_digits.png]

The data are scikit-learn's 1797 images of 8 x 8 pixels; nothing is downloaded. Both runs start from the same
weights and see the same batches and the same DropPath masks, so their losses agree up to rounding. They take turns
step by step, so that whatever else the machine does slows both alike. What differs is ``stock()`` and
``with_trainops()`` below: four lines.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import trainops

BATCH, LR, WEIGHT_DECAY, NOISE = 64, 3e-3, 0.05, 0.3
DROP_PATH, MAX_GRAD_NORM, EMA_DECAY = 0.1, 1.0, 0.98


@dataclass
class Run:
    """One training run: what it is made of, and what was measured."""

    name: str
    model: nn.Module
    ema: AveragedModel | trainops.EMA
    optimizer: torch.optim.AdamW
    after_backward: Callable[[], None]
    losses: list[float] = field(default_factory=list)
    seconds: list[tuple[float, ...]] = field(default_factory=list)  # forward, backward, after: for each step

    def milliseconds(self) -> list[float]:
        """The medians of forward, backward and what comes after."""
        return [1e3 * statistics.median(times) for times in zip(*self.seconds, strict=True)]


def stock(device: str) -> Run:
    """Clip, step, average: the loops that everybody writes."""
    model = ViT(DropPathAdd).to(device)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(param_groups(model), LR)

    def after_backward() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        ema.update_parameters(model)

    return Run("stock PyTorch", model, ema, optimizer, after_backward)


def with_trainops(device: str) -> Run:
    """The same training."""
    model = ViT(trainops.DropPathAdd).to(device)  # 1. DropPath and its residual add are one pass
    ema = trainops.EMA(model, EMA_DECAY)  # 2. the average, which goes ...
    optimizer = trainops.AdamW(param_groups(model), LR, max_grad_norm=MAX_GRAD_NORM, ema=ema)  # 3. ... in here

    def after_backward() -> None:
        optimizer.step()  # 4. clips, steps and averages

    return Run("trainops", model, ema, optimizer, after_backward)


class DropPathAdd(nn.Module):
    """What ``trainops.DropPathAdd`` replaces: a residual add with timm's ``drop_path``, written out."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        """``residual`` plus ``branch``, of which whole samples are dropped in training mode."""
        if self.drop_prob == 0.0 or not self.training:
            return residual + branch
        keep_prob = 1 - self.drop_prob
        mask = branch.new_empty((branch.shape[0],) + (1,) * (branch.ndim - 1)).bernoulli_(keep_prob)
        return residual + branch * mask.div_(keep_prob)


class Block(nn.Module):
    """A pre-norm transformer block whose two branches are dropped at random (arXiv:1603.09382)."""

    def __init__(self, dim: int, drop_path_add: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads=4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop_path_add = drop_path_add

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] to the same."""
        y = self.norm1(x)
        x = self.drop_path_add(x, self.attention(y, y, y, need_weights=False)[0])
        return self.drop_path_add(x, self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """A vision transformer on 8 x 8 images: 9 overlapping patches of 4 x 4, and their mean is classified."""

    def __init__(self, drop_path_add: Callable[[float], nn.Module], dim: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(4 * 4, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, 9, dim))
        rates = torch.linspace(0, DROP_PATH, depth).tolist()  # deeper blocks are dropped more often
        self.blocks = nn.Sequential(*(Block(dim, drop_path_add(rate)) for rate in rates))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images [batch, 1, 8, 8] to logits [batch, 10]."""
        patches = nn.functional.unfold(images, kernel_size=4, stride=2).transpose(1, 2)
        tokens = self.blocks(self.embed(patches) + self.position)
        return self.head(self.norm(tokens).mean(dim=1))


def param_groups(model: nn.Module) -> list[dict]:
    """Matrices decay; biases, norms and positions do not."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> SequentialLR:
    """Linear warm-up over a tenth of the steps, then a cosine to zero."""
    warmup = max(1, steps // 10)
    phases = [LinearLR(optimizer, 0.01, total_iters=warmup), CosineAnnealingLR(optimizer, max(1, steps - warmup))]
    return SequentialLR(optimizer, phases, milestones=[warmup])


def timed_step(run: Run, images: Tensor, labels: Tensor) -> None:
    """One training step, with the clock read between its phases."""

    def now() -> float:
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter()

    run.optimizer.zero_grad()
    clock = [now()]
    loss = nn.functional.cross_entropy(run.model(images), labels)
    clock += [now()]
    loss.backward()
    clock += [now()]
    run.after_backward()
    clock += [now()]
    run.losses.append(loss.item())
    run.seconds.append(tuple(end - start for start, end in pairwise(clock)))


def train(runs: list[Run], images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Train all runs in one loop, on the same batches."""
    schedulers = [schedule(run.optimizer, args.steps) for run in runs]
    generator = torch.Generator().manual_seed(args.seed)
    with Progress() as progress:
        task = progress.add_task("", total=args.steps)
        for step in range(args.steps):
            chosen = torch.randperm(len(images), generator=generator)[:BATCH]
            noise = NOISE * torch.randn(len(chosen), 1, 8, 8, generator=generator)
            batch = images[chosen] + noise.to(args.device), labels[chosen]
            for run in runs if step % 2 else reversed(runs):
                torch.manual_seed(args.seed + step)  # the same DropPath masks for both
                timed_step(run, *batch)
            for scheduler in schedulers:
                scheduler.step()
            losses = " and ".join(f"{run.losses[-1]:.4f}" for run in runs)
            progress.update(task, advance=1, description=f"training both: losses {losses}")


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that are classified correctly."""
    return (model.eval()(images).argmax(dim=1) == labels).double().mean().item()


def report(runs: list[Run], images: Tensor, labels: Tensor) -> None:
    """Print what was measured."""
    table = Table("", *(run.name for run in runs))
    table.add_row("loss, mean of the last 20 steps", *(f"{statistics.fmean(run.losses[-20:]):.5f}" for run in runs))
    apart = [abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
    table.add_row("  largest difference, first 50 steps", "", f"{max(apart[:50]):.1e}")
    table.add_row("  largest difference, all steps", "", f"{max(apart):.1e}")
    table.add_row("test accuracy", *(f"{accuracy(run.model, images, labels):.2%}" for run in runs))
    table.add_row("  of the averaged weights", *(f"{accuracy(run.ema.module, images, labels):.2%}" for run in runs))
    times = [run.milliseconds() for run in runs]
    table.add_row("forward and backward, median ms", *(f"{forward + backward:.2f}" for forward, backward, _ in times))
    table.add_row("after backward(), median ms", *(f"{after:.2f}" for *_, after in times))
    table.add_row("  times as fast", "", f"{times[0][-1] / times[1][-1]:.1f}")
    Console().print(table)


def plot(runs: list[Run], path: Path) -> None:
    """Both loss curves, and where the time of a step goes."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    looks = {"color": "#f4a261", "linewidth": 5}, {"color": "#1d3557", "linewidth": 1.2}
    for shift, run, look in zip((-0.2, 0.2), runs, looks, strict=True):
        left.semilogy(range(1, len(run.losses) + 1), run.losses, label=run.name, **look)
        bars = right.bar([i + shift for i in range(3)], run.milliseconds(), 0.38, color=look["color"], label=run.name)
        right.bar_label(bars, fmt="%.2f", padding=2)
    left.set(title="Training loss: same seed, same curve", xlabel="step", ylabel="cross-entropy")
    right.set(title="Where the time of a step goes", ylabel="milliseconds, median")
    right.set_xticks(range(3), ["forward", "backward", "after backward():\nclip, AdamW, EMA"])
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the options, train, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/train_digits.png"))
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    try:
        torch.zeros((), device=args.device).item()
    except (AssertionError, RuntimeError) as error:
        parser.error(f"--device {args.device}: {error}")
    torch.set_num_threads(1)  # so small a model gains little from more, and loses much where others want the cores
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    split = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    images, test_images, labels, test_labels = (part.to(args.device) for part in split)
    runs = []
    for build in (stock, with_trainops):
        torch.manual_seed(args.seed)  # the same initial weights for both
        runs.append(build(args.device))
    train(runs, images, labels, args)
    report(runs, test_images, test_labels)
    plot(runs, args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
