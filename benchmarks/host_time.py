"""The host's time of `AdamW.step()` with clipping and an average, over tensors of one element.

    python benchmarks/host_time.py [--trees TREE ...] [--output FILE.json]    (--help has more)

``cpu`` is the whole step, kernels included; ``triton`` is all but the kernels: whatever is launched returns at once.
Each call with cold caches, 64 MB having been written before it, is followed by some with warm ones. ``--trees`` are
checkouts, built in place: processes of each take turns, so that what slows the machine down slows all of them.
Times are the processor's, of one thread: what else the machine does in between does not count.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

TENSORS = [10, 300, 1000, 10000]
BACKENDS = ["cpu", "triton"]
WARM = 3  # calls after each cold one


def without_launches():
    """Replace what Triton launches by nothing. Returns the list of what would have been launched."""
    from triton.runtime import jit

    launched = []
    jit.KernelInterface.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: launched.append(kernel)
    return launched


def measure(backend, tensors, seconds):
    """Microseconds of the calls with cold caches and of those with warm ones, in at least three rounds."""
    import torch

    import trainops

    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    model = torch.nn.Module()
    model.params = torch.nn.ParameterList(torch.ones(1, device=device) for _ in range(tensors))
    for param in model.params:
        param.grad = torch.ones(1, device=device)
    ema = trainops.EMA(model, 0.999, update_after_step=-2)  # moves from the first step on
    optimizer = trainops.AdamW(model.parameters(), max_grad_norm=1.0, ema=ema, backend=backend)
    big, found = torch.zeros(2**24), {"cold": [], "warm": []}
    for _ in range(3):
        optimizer.step()
    end = time.perf_counter() + seconds
    while len(found["cold"]) < 3 or time.perf_counter() < end:
        big.add_(1)
        for caches in ("cold", *["warm"] * WARM):
            start = time.thread_time()
            optimizer.step()
            found[caches].append(1e6 * (time.thread_time() - start))
    return found


def work(backend, tensors, seconds):
    """What a process of one tree does: print its samples by number of tensors."""
    import gc

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # lets the backend take tensors of the CPU
    import trainops

    if not Path(trainops.__file__).is_relative_to(Path.cwd()):
        raise SystemExit(f"{Path.cwd()} is no checkout: trainops is that of {trainops.__file__}")
    torch.set_num_threads(1)
    gc.disable()
    launched = without_launches() if backend == "triton" else [backend]
    print(json.dumps({count: measure(backend, count, seconds) for count in tensors}))
    if not launched:
        raise SystemExit("nothing was replaced: kernels are not called as kernel[grid](...)")


def samples_of(tree, backend, args):
    """The samples of a process of a tree; nothing where it has failed."""
    sizes = [str(count) for count in args.tensors]
    command = [sys.executable, __file__, "--worker", backend, "--seconds", str(args.seconds), "--tensors", *sizes]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def main():
    """Measure, print a table, write JSON; 1 if a process has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=Path, nargs="+", default=[Path(__file__).parent.parent], metavar="TREE")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--tensors", type=int, nargs="+", default=TENSORS)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each tree and backend")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each number of tensors, in each process")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--worker", choices=BACKENDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.tensors, args.seconds)
        return 0
    trees, samples, failed = [tree.resolve() for tree in args.trees], defaultdict(list), False
    for i in range(args.rounds):
        for backend, k in itertools.product(args.backends, range(len(trees))):
            tree = (k + i) % len(trees)
            found = samples_of(trees[tree], backend, args)
            failed |= not found
            for (count, by_caches), caches in itertools.product(found.items(), ("warm", "cold")):
                samples[backend, int(count), caches, tree].extend(by_caches[caches])
    results = [result_of(*key, taken) for key, taken in sorted(samples.items())]
    print(f"{'backend':8} {'tensors':>7} caches tree {'us per step':>12} {'p20':>9} {'p80':>9} {'us per row':>11}")
    for x in results:
        times = f"{x['median']:12.1f} {x['p20']:9.1f} {x['p80']:9.1f} {x['per_row']:11.3f}"
        print(f"{x['backend']:8} {x['tensors']:7} {x['caches']:6} {x['tree']:4} {times}")
    if args.output:
        about = {"python": sys.version.split()[0], "trees": [described(tree) for tree in trees]}
        args.output.write_text(json.dumps({"environment": about, "results": results}, indent=1))
    return int(failed)


def result_of(backend, tensors, caches, tree, taken):
    """A line of the results; ``tree`` is its place among those that were asked for."""
    p20, _, _, p80 = statistics.quantiles(taken, n=5, method="inclusive")
    median = statistics.median(taken)
    own = {"backend": backend, "tensors": tensors, "caches": caches, "tree": tree, "samples": len(taken)}
    return own | {"median": median, "p20": p20, "p80": p80, "per_row": median / tensors}


def described(tree):
    """The commit of a tree."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
