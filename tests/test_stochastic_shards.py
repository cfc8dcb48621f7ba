"""Stochastic rounding of shards: two ranks have the bits of one, for FSDP2's parameters and for their average."""

import importlib

import pytest
import torch
from contract import same_bits
from process_groups import forks, on_ranks
from targets import thorough
from torch import nn

import trainops

STEPS = 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 1)).bfloat16()


def optimizer_of(model, seed, ema, backend):
    return trainops.SGD(model.parameters(), lr=2.0**-6, stochastic_rounding=True, seed=seed, ema=ema, backend=backend)


def average_of(model, backend):
    return trainops.EMA(model, 0.9, update_after_step=-1, stochastic_rounding=True, seed=7, backend=backend)


def train(model, optimizer, place):
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(model.parameters()):
            grad = torch.randn(p.shape, generator=generator).bfloat16()
            p.grad = None if (step, i) == (1, 0) else place(grad, p)
        optimizer.step()


def on_each_rank(rank, backend):
    fully_shard = importlib.import_module("torch.distributed.fsdp").fully_shard
    tensors = importlib.import_module("torch.distributed.tensor")
    of_state = importlib.import_module("torch.distributed.checkpoint.state_dict")
    mesh = importlib.import_module("torch.distributed.device_mesh").init_device_mesh("cpu", (2,))
    whole = network()
    its = average_of(whole, backend)
    train(whole, optimizer_of(whole, 5, its, backend), lambda grad, p: grad)

    model = network()
    ema = average_of(model, backend)
    fully_shard(model, mesh=mesh)
    fully_shard(ema.module, mesh=mesh)
    optimizer = optimizer_of(model, 5, ema, backend)
    train(model, optimizer, lambda grad, p: tensors.distribute_tensor(grad, mesh, p.placements))
    for ours, theirs in ((model, whole), (ema.module, its.module)):
        for p, x in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert same_bits(p.full_tensor(), x.detach())
    for p, x in zip(model.parameters(), whole.parameters(), strict=True):
        p.data.copy_(tensors.distribute_tensor(x.detach() + 1, mesh, p.placements))
        x.data.add_(1)
    ema.detach()
    its.detach()
    ema.update()
    its.update()
    for p, x in zip(ema.module.parameters(), its.module.parameters(), strict=True):
        assert same_bits(p.full_tensor(), x.detach())

    other = optimizer_of(model, 6, None, backend)
    state = of_state.get_optimizer_state_dict(model, optimizer)
    of_state.set_optimizer_state_dict(model, other, state)
    assert other.seed == 5

    columns = nn.Parameter(tensors.distribute_tensor(torch.ones(4, 6).bfloat16(), mesh, [tensors.Shard(1)]))
    columns.grad = torch.ones_like(columns)
    refused = trainops.SGD([columns], stochastic_rounding=True, backend=backend)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sharded by their first dimension"):
            refused.step()
    assert (columns.to_local() == 1).all()


@forks
@thorough(lambda backend: backend != "cpu")
@pytest.mark.parametrize("backend", ["reference", "foreach", "cpu"])
def test_two_ranks_have_the_bits_of_one(tmp_path, backend):
    if not trainops.backends()[backend].available:
        pytest.skip(f"no backend {backend}")
    on_ranks(2, tmp_path, on_each_rank, backend)
