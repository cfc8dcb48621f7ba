"""A step with clipping on FSDP2's shards, from the gradients on, over gloo ranks on this machine.

    python benchmarks/sharded.py [--ranks N] [--tensors N ...] [--rounds N]

PyTorch's clip with its fused AdamW, and trainops, whose step clips. First, the norms and the weights of all are held
to one process in float64. Then all take turns in each round, behind a barrier; the time of a round is that of its
slowest rank. Medians, and the median ratio to trainops within the rounds, with its quartiles; the same of the time
that a rank's threads computed, which depends less on what else the machine does.
"""

import argparse
import os
import statistics
import tempfile
import time

import torch
import torch.multiprocessing as mp
from torch import distributed, nn

import trainops

SHAPE, MAX_NORM = (64, 16), 1.0


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


def steps(count, mesh):
    """By name: the parameters, and a step that returns the norm."""
    found = {}

    def torchs(params, optimizer):
        norm = torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        return norm.full_tensor()

    def ours(optimizer):
        optimizer.step()
        return optimizer.grad_norm

    for name in ("torch: clip and fused AdamW", "trainops.clip_grad_norm_ and step", "trainops"):
        model, params = made(count, mesh)
        if name == "trainops":
            optimizer = trainops.AdamW(params, max_grad_norm=MAX_NORM)
            step = lambda optimizer=optimizer: ours(optimizer)  # noqa: E731
        elif name.startswith("trainops"):
            optimizer = trainops.AdamW(params)

            def step(params=params, optimizer=optimizer):
                norm = trainops.clip_grad_norm_(params, MAX_NORM)
                optimizer.step()
                return norm
        else:
            optimizer = torch.optim.AdamW(params, fused=True)
            step = lambda params=params, optimizer=optimizer: torchs(params, optimizer)  # noqa: E731
        found[name] = model, params, step
    return found


def verify(count, found):
    """The first step of each, beside one process in float64."""
    from torch.distributed.tensor import distribute_tensor

    params = [nn.Parameter(x.double()) for x in tensors(count, 0)]
    for p, grad in zip(params, tensors(count, 1), strict=True):
        p.grad = grad.double()
    norm = torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
    torch.optim.AdamW(params).step()
    for name, (_, own, step) in found.items():
        torch.testing.assert_close(step().double(), norm, rtol=1e-6, atol=0, msg=lambda text, name=name: name + text)
        for p, true in zip(own, params, strict=True):
            expected = distribute_tensor(true.detach(), p.device_mesh, p.placements, src_data_rank=None).to_local()
            torch.testing.assert_close(p.detach().to_local().double(), expected, rtol=1e-5, atol=1e-6)


def on_rank(rank, ranks, folder, options):
    """Verify, measure and print."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (ranks,))
    for count in options.tensors:
        found = steps(count, mesh)
        verify(count, found)
        rounds = {name: [] for name in found}  # milliseconds on the clock and of computing
        for _ in range(options.rounds + 3):
            for name, (_, _, step) in found.items():
                distributed.barrier()
                began = time.perf_counter(), time.process_time()
                step()
                ended = time.perf_counter(), time.process_time()
                rounds[name].append([1e3 * (y - x) for x, y in zip(began, ended, strict=True)])
        times = torch.tensor([rounds[name][3:] for name in found], dtype=torch.float64)
        distributed.all_reduce(times, distributed.ReduceOp.MAX)
        if rank == 0:
            show(count, ranks, dict(zip(found, times.tolist(), strict=True)))
    distributed.destroy_process_group()


def show(count, ranks, rounds):
    """One table."""
    print(f"{count} tensors, {ranks} ranks of one thread, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
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
