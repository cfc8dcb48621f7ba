"""What watching the training of a ViT-Ti costs: by `trainops.Monitor`, and by histograms as loggers take them.

    python -m benchmarks.monitor_overhead [--batch N] [--rounds N] [--every N] [--output FILE.json]

Each way to watch has a model of its own, from the same weights, and looks at each of its steps; all take turns with a
model that nobody watches. The overhead is that of looking at one step of ``--every``: the difference to the step
before it that nobody watched, over ``--every`` times such a step; medians over the rounds, and their quartiles. What
the hooks cost in the steps between is measured without a model around them. Numbers are verified first.

``histc`` is what ``wandb.watch(log="all")`` does to each gradient and weight: ``min``, ``max`` and 64 bins, each of
which waits for the device. ``add_histogram`` is TensorBoard's; it is left out where that is not installed.
"""

import argparse
import copy
import importlib.util
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import trainops

from .bench_training import NETS, Transformer

SETTINGS = {"lr": 1e-3, "weight_decay": 0.05}
# Percent of a step, with every=10.
LIMITS = {"Monitor": 1.0, "Monitor, activations": 3.0}
IDLE = 2000  # steps without gradients, for the cost of hooks that have nothing to do

Look = Callable[[], object]


class Subject:
    """A model in training, and what looks at it."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self.model, self.inputs, self.targets = copy.deepcopy(model), inputs, targets
        self.optimizer = trainops.AdamW(self.model.parameters(), **SETTINGS)
        self.look: Look = lambda: None  # after backward, before the step
        self.hooks: list[object] = []

    def seconds(self) -> float:
        """A whole step."""
        start = time.perf_counter()
        self.model.zero_grad(set_to_none=True)
        self.model(self.inputs, self.targets).backward()
        self.look()
        self.optimizer.step()
        return time.perf_counter() - start


def unwatched(subject: Subject) -> None:
    """Nobody looks."""


def monitored(subject: Subject) -> None:
    """Gradients, weights and updates."""
    subject.hooks.append(trainops.Monitor(subject.model, subject.optimizer, every=1))


def monitored_with_activations(subject: Subject) -> None:
    """Also the outputs of every block."""
    blocks = [f"blocks.{i}" for i in range(len(subject.model.blocks))]
    subject.hooks.append(trainops.Monitor(subject.model, subject.optimizer, every=1, activations=blocks))


def binned(x: Tensor) -> tuple[list[float], list[float]]:
    """A histogram with 64 bins from the least element to the largest."""
    flat = x.detach().reshape(-1).float()
    low, high = flat.min().item(), flat.max().item()
    counts = flat.histc(64, low, high).cpu()
    return counts.tolist(), torch.linspace(low, high, 65).tolist()


def histc(subject: Subject) -> None:
    """Gradients as backward computes them, weights before the step."""
    found: dict[str, object] = {}
    named = dict(subject.model.named_parameters())
    for name, param in named.items():
        param.register_hook(lambda grad, name=name: found.__setitem__(f"gradients/{name}", binned(grad)))
    subject.look = lambda: found.update({f"parameters/{name}": binned(p) for name, p in named.items()})


def histc_with_activations(subject: Subject) -> None:
    """Also the outputs of every block."""
    histc(subject)
    for block in subject.model.blocks:
        block.register_forward_hook(lambda module, args, output: binned(output) and None)


def add_histogram(subject: Subject) -> None:
    """Gradients and weights, to a folder that is thrown away."""
    from torch.utils.tensorboard import SummaryWriter

    folder = tempfile.TemporaryDirectory()
    writer = SummaryWriter(folder.name)
    subject.hooks.append(folder)

    def look() -> None:
        for name, param in subject.model.named_parameters():
            writer.add_histogram(f"gradients/{name}", param.grad)
            writer.add_histogram(f"parameters/{name}", param)

    subject.look = look


WAYS: dict[str, Callable[[Subject], None]] = {
    "nothing": unwatched,
    "Monitor": monitored,
    "Monitor, activations": monitored_with_activations,
    "histc": histc,
    "histc, activations": histc_with_activations,
    "add_histogram": add_histogram,
}


def verify(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """The numbers of a monitor are those of PyTorch, and each element is in a histogram."""
    subject = Subject(model, inputs, targets)
    monitored(subject)
    before = [p.detach().clone() for p in subject.model.parameters()]
    subject.seconds()
    record = subject.hooks[0].last()
    grads = [p.grad for p in subject.model.parameters()]
    updates = [p.detach() - old for p, old in zip(subject.model.parameters(), before, strict=True)]
    for stats, tensors in ((record.grads, grads), (record.weights, before), (record.updates, updates)):
        norms = torch.stack([x.double().norm() for x in tensors])
        torch.testing.assert_close(stats.l2_norm.double(), norms, rtol=1e-5, atol=1e-12)
        sizes = torch.tensor([x.numel() for x in tensors])
        torch.testing.assert_close(stats.histogram.sum(1) + stats.zeros, sizes)


def between(blocks: int) -> float:
    """Seconds that a monitor with an activation for each block adds to a step that it does not look at."""

    def seconds(watch: bool) -> float:
        model = nn.Sequential(*(nn.Identity() for _ in range(blocks)), nn.Linear(1, 1))
        optimizer = trainops.AdamW(model.parameters(), **SETTINGS)
        names = [str(i) for i in range(blocks)]
        if watch:
            monitor = trainops.Monitor(model, optimizer, every=10 * IDLE, activations=names)
        x, times = torch.zeros(1, 1), []
        for _ in range(IDLE):
            start = time.perf_counter()
            with torch.no_grad():
                model(x)
            optimizer.step()
            times.append(time.perf_counter() - start)
        if watch:
            monitor.remove()
        return statistics.median(times)

    return statistics.median(seconds(True) - seconds(False) for _ in range(3))


def measured(batch: int, rounds: int, every: int) -> Iterator[dict[str, object]]:
    """A row for each way: what looking costs, in milliseconds and in percent of the time of training."""
    torch.manual_seed(0)
    net = NETS["cpu"]["ViT-Ti"]
    model = Transformer(net)
    inputs, targets = torch.randn(batch, net.tokens, 768), torch.randint(1000, (batch,))
    verify(model, inputs, targets)
    ways = [name for name in WAYS if name != "add_histogram" or importlib.util.find_spec("tensorboard")]
    subjects = {name: Subject(model, inputs, targets) for name in ways}
    for name, subject in subjects.items():
        WAYS[name](subject)
    plain, order = Subject(model, inputs, targets), list(subjects)
    for subject in (plain, *subjects.values()):
        subject.seconds()
    steps, more = [], {name: [] for name in order}
    for i in range(rounds):
        random.Random(i).shuffle(order)
        for name in order:
            steps.append(plain.seconds())
            more[name].append(subjects[name].seconds() - steps[-1])
    step, idle = statistics.median(steps), between(net.depth)
    for name in subjects:
        quartiles = statistics.quantiles(more[name], n=4)
        own = (every - 1) * idle if name.startswith("Monitor") else 0.0
        percent = [100.0 * (x + own) / (every * step) for x in quartiles]
        yield {
            "way": name,
            "ms": 1e3 * quartiles[1],
            "percent": percent,
            "step_ms": 1e3 * step,
            "idle_us": 1e6 * idle,
        }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = list(measured(options.batch, options.rounds, options.every))
    threads, load = torch.get_num_threads(), os.getloadavg()
    print(f"ViT-Ti, batch {options.batch}, {threads} threads, load {load}, torch {torch.__version__}")
    print(f"a step {rows[0]['step_ms']:.0f} ms; a step between, with hooks: {rows[0]['idle_us']:.0f} us more")
    print(f"looking at one step, and its share of {options.every} steps:")
    for row in rows:
        low, middle, high = row["percent"]
        limit = LIMITS.get(row["way"])
        said = "" if limit is None or options.every != 10 else f"; the limit is {limit:.0f}%"
        print(f"{row['way']:22} {row['ms']:8.1f} ms {middle:8.2f}%  (quartiles {low:.2f}, {high:.2f}{said})")
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
