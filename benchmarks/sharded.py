"""A step with clipping on FSDP2's shards, and one with an average, from the gradients on, over gloo ranks here.

    python benchmarks/sharded.py [--ranks N] [--tensors N ...] [--rounds N]

PyTorch's clip with its fused AdamW, and trainops, whose step clips. Then with an average: PyTorch's by `lerp_` of one
DTensor after the other, or by one `_foreach_lerp_` of the shards; trainops' within the step. First, the norms, the
weights and the averages of all are held to one process in float64. Then all take turns in each round, behind a
barrier; the time of a round is that of its slowest rank. Medians, and the median ratio to trainops within the rounds,
with its quartiles; the same of the time that a rank's threads computed, which depends less on what else the machine
does.
"""

import argparse
import functools
import itertools
import os
import statistics
import tempfile
import time

import torch
import torch.multiprocessing as mp
from torch import distributed, nn

import trainops

SHAPE, MAX_NORM, DECAY = (64, 16), 1.0, 0.9


def tensors(count, seed):
    """The same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def made(count, mesh):
    """The parameters of a sharded model, with gradients."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    model = nn.Module()
    for i, x in enumerate(tensors(count, 0)):
        model.register_parameter(f"weight{i}", nn.Parameter(x))
    fully_shard(model, mesh=mesh)
    params = list(model.parameters())
    for p, grad in zip(params, tensors(count, 1), strict=True):
        p.grad = distribute_tensor(grad, mesh, p.placements, src_data_rank=None)
    return model, params


def in_parts(clip, optimizer_class, move, **options):
    """Makes a step of a clip, an update, and where there is to be an average a call that moves it."""

    def make(model, params):
        optimizer = optimizer_class(params, **options)
        averages = [p.detach().clone() for p in params]

        def step():
            norm = clip(params, MAX_NORM)
            optimizer.step()
            move(averages, params)
            return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

        return step, averages

    return make


@torch.no_grad()
def one_by_one(averages, params):
    """What people write."""
    for average, p in zip(averages, params, strict=True):
        average.lerp_(p, 1 - DECAY)


@torch.no_grad()
def at_once(averages, params):
    """PyTorch's best."""
    torch._foreach_lerp_([x.to_local() for x in averages], [p.to_local() for p in params], 1 - DECAY)


def fused(model, params, is_averaged):
    """Makes a step of trainops that clips, and moves the average if there is to be one."""
    ema = trainops.EMA(model, lambda step: DECAY) if is_averaged else None  # a function: its first update moves, too
    optimizer = trainops.AdamW(params, max_grad_norm=MAX_NORM, ema=ema)

    def step():
        optimizer.step()
        return optimizer.grad_norm

    return step, list(ema.module.parameters()) if is_averaged else []


def ways(is_averaged):
    """By name, what makes a step, which returns the norm, and the averages that it moves."""
    torchs = torch.nn.utils.clip_grad_norm_, torch.optim.AdamW
    ours = {"trainops": functools.partial(fused, is_averaged=is_averaged)}
    if is_averaged:
        moves = {"lerp_ of each": one_by_one, "_foreach_lerp_ of shards": at_once}
        return {f"torch, {name}": in_parts(*torchs, move, fused=True) for name, move in moves.items()} | ours
    alone = in_parts(trainops.clip_grad_norm_, trainops.AdamW, lambda *_: None)
    named = {"torch: clip and fused AdamW": in_parts(*torchs, lambda *_: None, fused=True)}
    return named | {"trainops.clip_grad_norm_ and step": alone} | ours


def steps(count, mesh, is_averaged):
    """By name: the model, which is to live as long, its parameters, averages, and the step."""
    found = {}
    for name, make in ways(is_averaged).items():
        model, params = made(count, mesh)
        step, averages = make(model, params)
        found[name] = model, params, averages if is_averaged else [], step
    return found


def verify(count, found):
    """The first step of each, beside one process in float64."""
    from torch.distributed.tensor import distribute_tensor

    params = [nn.Parameter(x.double()) for x in tensors(count, 0)]
    averages = [p.detach().clone() for p in params]
    for p, grad in zip(params, tensors(count, 1), strict=True):
        p.grad = grad.double()
    norm = torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
    torch.optim.AdamW(params).step()
    one_by_one(averages, params)
    for name, (_, own, its, step) in found.items():
        torch.testing.assert_close(step().double(), norm, rtol=1e-6, atol=0, msg=lambda text, name=name: name + text)
        pairs = [*zip(own, params, strict=True), *zip(its, averages, strict=bool(its))]
        for x, true in pairs:
            expected = distribute_tensor(true.detach(), x.device_mesh, x.placements, src_data_rank=None).to_local()
            torch.testing.assert_close(x.detach().to_local().double(), expected, rtol=1e-5, atol=1e-6)


def on_rank(rank, ranks, folder, options):
    """Verify, measure and print."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (ranks,))
    for count, is_averaged in itertools.product(options.tensors, (False, True)):
        found = steps(count, mesh, is_averaged)
        verify(count, found)
        rounds = {name: [] for name in found}  # milliseconds on the clock and of computing
        for _ in range(options.rounds + 3):
            for name, (*_, step) in found.items():
                distributed.barrier()
                began = time.perf_counter(), time.process_time()
                step()
                ended = time.perf_counter(), time.process_time()
                rounds[name].append([1e3 * (y - x) for x, y in zip(began, ended, strict=True)])
        times = torch.tensor([rounds[name][3:] for name in found], dtype=torch.float64)
        distributed.all_reduce(times, distributed.ReduceOp.MAX)
        if rank == 0:
            show(count, ranks, is_averaged, dict(zip(found, times.tolist(), strict=True)))
    distributed.destroy_process_group()


def show(count, ranks, is_averaged, rounds):
    """One table."""
    what = f"{count} tensors{' and averages' if is_averaged else ''}, {ranks} ranks of one thread"
    print(f"{what}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    for kind, what in enumerate(("on the clock", "of computing")):
        for name, times in rounds.items():
            ratios = [a[kind] / b[kind] for a, b in zip(times, rounds["trainops"], strict=True)]
            low, middle, high = statistics.quantiles(ratios)
            median = statistics.median(x[kind] for x in times)
            print(f"  {name:34} {median:7.2f} ms {what}   {middle:5.2f} ({low:.2f} to {high:.2f})")


def main():
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tensors", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (options.ranks, folder, options), nprocs=options.ranks)


if __name__ == "__main__":
    main()
