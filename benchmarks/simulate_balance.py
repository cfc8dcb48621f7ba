"""How evenly the chunks of a model keep a GPU busy: a simulation, for GPUs that need not be there.

    python -m benchmarks.simulate_balance [--chunk-numel 8192] [--share 64]

Balance is the time that the blocks would need if all of them worked to the end, over the time until the last one
ends. The model of time: as many blocks run at a time as the multiprocessors hold, each with an equal share of the
memory's bandwidth. A chunk takes ``FIXED`` microseconds, for latencies and barriers, and those that its bytes take.
A block draws its next chunk when it begins with one, as ``ChunkQueue`` (csrc/cuda/common.cuh) does. Where another
kernel holds a multiprocessor, its blocks begin when others have ended. For comparison: a static wave, in which block
i takes chunks i, i + blocks and so on, with the chunks in the order of the rows.

A model with few chunks for each block has a bound that no order exceeds. Of 1,000 small tensors, 500 are of 1,024
elements: with 164 blocks (82 multiprocessors), some have to take four of these, while three would be the mean.

Efficiency is the time that the bytes alone would need, over the time until the last block ends: what chunks cost, and
the tail. Draws are the chunks that blocks draw from the queue, each with an atomic addition.

With ``--share``, a chunk grows with its tensor: it is the largest power of 2 that is no more than that share of the
elements, from ``--chunk-numel`` to 65,536. The kernels have no such chunks. The simulation is for them: with 64,
every model keeps a balance of 86%, ViT-B has a fifth of the draws and GPT-2 XL a fourteenth, and the efficiency of
ViT-B's norm rises from 71% to 89% (if a chunk costs a microsecond). Each chunk of the norm would then hold several of
today's, whose sums it would join in their order.

What the model leaves out: when few blocks are left they have more bandwidth each, so the true tail is shorter; and
launches, the norm's last block, and caches.
"""

import argparse
import heapq
import sys
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from .models import MODELS, Shapes, numel

FIXED = 1.0  # microseconds
CHUNK_NUMEL = 4096  # kChunkNumel in csrc/cuda/kernels.h
LARGEST = 65536  # of growing chunks
LEAST = 0.85


class Card(NamedTuple):
    """A GPU: its multiprocessors, and its bandwidth as its maker states it, in GB/s."""

    name: str
    multiprocessors: int
    bandwidth: float


class Kernel(NamedTuple):
    """What a kernel reads and writes for each element, and its blocks on a multiprocessor."""

    name: str
    bytes: int
    blocks: int


CARDS = [Card("H100", 132, 3350.0), Card("RTX 3090", 82, 936.0), Card("T4", 40, 320.0)]
KERNELS = [Kernel("AdamW and average", 36, 2), Kernel("norm", 4, 4)]


class Chunking(NamedTuple):
    """How many elements the chunks of a tensor have: a function of the number of its elements alone."""

    least: int = CHUNK_NUMEL
    share: int | None = None

    def of(self, count: int) -> int:
        """For a tensor of so many elements."""
        size = self.least
        while self.share is not None and size < LARGEST and 2 * size * self.share <= count:
            size *= 2
        return size


def chunk_sizes(shapes: Shapes, chunking: Chunking) -> list[int]:
    """Elements of the chunks, in the order of the rows."""
    sizes = []
    for count in (numel([shape]) for shape in shapes):
        whole = chunking.of(count)
        sizes += [min(whole, count - begin) for begin in range(0, max(1, count), whole)]
    return sizes


def static_wave(times: Sequence[float], blocks: int, resident: int) -> float:
    """The end of a launch of so many blocks, of which no more than ``resident`` run at a time."""
    count = min(blocks, len(times))
    free = [0.0] * min(resident, count)
    ends = []
    for block in range(count):
        ends.append(free[0] + sum(times[block::count]))
        heapq.heapreplace(free, ends[-1])
    return max(ends)


def queue(times: Sequence[float], blocks: int) -> float:
    """The end of a launch whose blocks draw chunks."""
    order = iter(times)
    held = [next(order, None) for _ in range(blocks)]  # the chunk that each block has drawn
    ready = [(0.0, block) for block in range(blocks)]
    end = 0.0
    while ready:
        now, block = heapq.heappop(ready)
        time = held[block]
        if time is not None:
            held[block] = next(order, None)
            end = max(end, now + time)
            heapq.heappush(ready, (now + time, block))
    return end


class Balance(NamedTuple):
    """Of one model, kernel and card."""

    static: float
    queued: float
    efficiency: float  # with a queue
    draws: int


def balance(
    shapes: Shapes,
    kernel: Kernel,
    card: Card,
    held: int = 0,
    chunking: Chunking = Chunking(),  # noqa: B008 (is immutable)
    fixed: float = FIXED,
) -> Balance:
    """With so many multiprocessors held by another kernel."""
    blocks, resident = (kernel.blocks * count for count in (card.multiprocessors, card.multiprocessors - held))
    by_element = kernel.bytes * blocks / (1e3 * card.bandwidth)
    times = [fixed + size * by_element for size in chunk_sizes(shapes, chunking)]
    ideal = sum(times) / resident
    in_queue = sorted(times, reverse=True)  # as csrc/core/device_words.h lists them
    end = queue(in_queue, resident)
    of_bytes = numel(shapes) * by_element / resident
    return Balance(ideal / static_wave(times, blocks, resident), ideal / end, of_bytes / end, len(times))


def main() -> int:
    """Print the table; 1 if a model has less than ``LEAST``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk-numel", type=int, default=CHUNK_NUMEL)
    parser.add_argument("--share", type=int, help="let chunks grow to this share of their tensor")
    parser.add_argument("--fixed", type=float, default=FIXED, help="microseconds of a chunk without its bytes")
    arguments = parser.parse_args()
    cases = [(card, held) for card in CARDS for held in (0, 1)]
    headings = [f"{card.name}, {card.multiprocessors - held} of {card.multiprocessors}" for card, held in cases]
    title = "in percent: balance of a static wave, of a queue, and its efficiency"
    table = Table("kernel", "model", "draws", *headings, title=title)
    chunking = Chunking(arguments.chunk_numel, arguments.share)
    least = 1.0
    for kernel in KERNELS:
        for name, shapes in MODELS.items():
            found = [balance(shapes, kernel, card, held, chunking, arguments.fixed) for card, held in cases]
            least = min(least, *(each.queued for each in found))
            cells = (", ".join(f"{100 * part:.0f}" for part in x[:3]) for x in found)
            table.add_row(kernel.name, name, f"{found[0].draws:,}", *cells)
    Console(width=160).print(table)
    print(f"the least with a queue: {100 * least:.0f}%")
    return int(least < LEAST)


if __name__ == "__main__":
    sys.exit(main())
