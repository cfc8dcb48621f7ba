"""Averages under DDP, tensor parallelism, HSDP, and tensor parallelism with FSDP2, beside one process."""

import importlib

import pytest
import torch
from contract import same_bits
from process_groups import assert_same_on_all_ranks, forks, on_ranks
from sharded_models import (
    DECAY,
    OPTIONS,
    Network,
    batch,
    communication,
    memory,
    mesh_of,
    on_one_process,
    sharded,
    train,
)
from targets import thorough
from torch import nn

import trainops
from trainops.ema_shards import layout

pytestmark = forks
STEPS, EVEN = 3, {"width": 12}


def split(model, mesh):
    """Tensor parallelism: by columns, and then by rows."""
    parallel = importlib.import_module("torch.distributed.tensor.parallel")
    plan = {"inner.0": parallel.ColwiseParallel(), "inner.2": parallel.RowwiseParallel()}
    return parallel.parallelize_module(model, mesh, plan)


def train_and_check(model, ema, rank=0, ranks=1, trained=None):
    """The average has the numbers of one process, and lies as its model does."""
    optimizer = trainops.AdamW(model.parameters(), ema=ema, **OPTIONS)
    train(model if trained is None else trained, optimizer, range(STEPS), rank, ranks)
    assert [*map(layout, model.parameters())] == [*map(layout, ema.module.parameters())]
    true = on_one_process(range(STEPS), **EVEN)[1]
    found = ema.full_state_dict()
    expected = dict(true.state_dict()["module"])
    if torch.distributed.get_rank() > 0:
        expected = {}
    torch.testing.assert_close(found, expected)
    return true


def check_ddp(rank, ranks):
    for is_wrapped in (False, True):
        model = Network(**EVEN).begin()
        ddp = nn.parallel.DistributedDataParallel(model)
        followed = ddp if is_wrapped else model
        ema = trainops.EMA(followed, DECAY)
        train_and_check(followed, ema, rank, ranks, ddp)
        for x in ema.module.parameters():
            assert_same_on_all_ranks(x)


def check_tensor_parallel(mesh):
    """Made before, and after with gradients there; the copy of a split model can be called."""
    model = Network(**EVEN).begin()
    ema = trainops.EMA(model, DECAY)
    train_and_check(split(model, mesh), ema)
    model = split(Network(**EVEN).begin(), mesh)
    model.eval()(batch(0)).sum().backward()
    model.train()
    ema = trainops.EMA(model, DECAY)
    true = train_and_check(model, ema)
    for it in (ema, true):
        it.module.eval()
    with torch.no_grad():
        expected = true(batch(9))
        torch.testing.assert_close(ema(batch(9)), expected)
        bits = list(map(memory, model.parameters()))
        with ema.swap():
            torch.testing.assert_close(model.eval()(batch(9)), expected)
        assert all(map(same_bits, map(memory, model.parameters()), bits))


def check_left_out(mesh, rank):
    """What is left out is the model's own shard, whether the average was made before or after."""

    def made(is_made_before=True, spread=lambda model: model):
        model = Network(**EVEN).begin()
        model.inner[0].requires_grad_(False)
        options = {"trainable_only": True, "exclude": "head"}
        ema = trainops.EMA(model, DECAY, **options) if is_made_before else None
        spread(model)
        return model, ema or trainops.EMA(model, DECAY, **options)

    def trained(model, ema, *ranks):
        train(model, trainops.AdamW(model.parameters(), ema=ema, **OPTIONS), range(STEPS), *ranks)
        with torch.no_grad():
            model(batch(9))  # FSDP's root stays gathered
        return ema.state_dict()["module"].keys(), ema.full_state_dict()

    names, expected = trained(*made())
    for is_made_before in (True, False):
        model, ema = made(is_made_before, lambda model: sharded(model, mesh))
        its_names, found = trained(model, ema, rank, 2)
        assert names == its_names
        assert names.isdisjoint({"inner.0.weight", "head.weight"})
        assert ema.module.head.weight is model.head.weight
        torch.testing.assert_close(found, expected)


def check_lists(mesh):
    """Of lists of DTensors, kernels get this rank's memory; what is placed otherwise is refused."""
    weights = list(sharded(Network().begin(), mesh).parameters())
    averages = [torch.zeros_like(p).detach() for p in weights]
    assert communication(lambda: trainops.ema_update_(averages, weights, 0.75)) == []
    for average, p in zip(averages, weights, strict=True):
        torch.testing.assert_close(memory(average), 0.25 * memory(p))
    with pytest.raises(ValueError, match=r"tensor 1 is placed as .*, but its average is not sharded"):
        trainops.ema_update_([averages[0], torch.zeros(13, 7)], weights[:2], 0.75)


def check_two(rank):
    check_ddp(rank, 2)
    check_tensor_parallel(mesh_of(2))
    check_left_out(mesh_of(2), rank)
    check_lists(mesh_of(2))


def check_four(rank):
    hybrid = mesh_of(2, 2)
    model = Network(**EVEN).begin()
    ema = trainops.EMA(model, DECAY)
    train_and_check(sharded(model, hybrid), ema, rank, 4)
    # Both dimensions: each pair of ranks splits the tensors, FSDP2 shards what is split, unevenly.
    for is_made_before in (True, False):
        model = Network(**EVEN).begin()
        ema = trainops.EMA(model, DECAY) if is_made_before else None
        sharded(split(model, hybrid["inner"]), hybrid["outer"])
        train_and_check(model, ema or trainops.EMA(model, DECAY), rank // 2, 2)


def test_averages_of_two_ranks(tmp_path):
    on_ranks(2, tmp_path, check_two)


@thorough(lambda: True)
def test_averages_of_four_ranks(tmp_path):
    on_ranks(4, tmp_path, check_four)
