"""Averages of models that FSDP2, tensor parallelism and DDP have spread over ranks, beside one process."""

import importlib

import pytest
import torch
from contract import same_bits
from process_groups import forks, on_ranks
from sharded_models import (
    DECAY,
    OPTIONS,
    RANKS,
    Network,
    batch,
    communication,
    memory,
    mesh_of,
    on_one_process,
    sharded,
    train,
)

import trainops
from trainops import ema_update
from trainops.ema_shards import layout

pytestmark = forks
STEPS = 4


def on_meta():
    with torch.device("meta"):
        return Network()


def made_before(mesh):
    model = Network().begin()
    ema = trainops.EMA(model, DECAY)
    return sharded(model, mesh), ema


def made_after(mesh):
    model = sharded(Network().begin(), mesh)
    return model, trainops.EMA(model, DECAY)


def made_on_meta(mesh):
    model = on_meta()
    ema = trainops.EMA(model, DECAY)
    return sharded(model, mesh).to_empty(device="cpu").begin(), ema


def made_of_shards_on_meta(mesh):
    model = sharded(on_meta(), mesh)
    ema = trainops.EMA(model, DECAY)
    return model.to_empty(device="cpu").begin(), ema


def filled_on_meta(mesh):
    """By the user, who need not."""
    model = sharded(on_meta(), mesh)
    ema = trainops.EMA(model, DECAY)
    ema.state_dict()  # writes what the model has
    ema.module.to_empty(device="cpu")
    return model.to_empty(device="cpu").begin(), ema


def made_after_meta(mesh):
    model = sharded(on_meta(), mesh).to_empty(device="cpu").begin()
    return model, trainops.EMA(model, DECAY)


def with_module(mesh):
    model, fresh = (sharded(Network().begin(), mesh) for _ in range(2))
    return model, trainops.EMA(model, DECAY, module=fresh)


def both_sharded(mesh):
    model = Network().begin()
    ema = trainops.EMA(model, DECAY)
    sharded(ema.module, mesh)
    return sharded(model, mesh), ema


def both_on_meta(mesh):
    model = on_meta()
    ema = trainops.EMA(model, DECAY)
    sharded(ema.module, mesh).to_empty(device="cpu")
    return sharded(model, mesh).to_empty(device="cpu").begin(), ema


ALONE = (made_before, made_after, made_on_meta, made_of_shards_on_meta, filled_on_meta, made_after_meta)
CALLABLE = (with_module, both_sharded, both_on_meta)


def check_average(way, mesh, rank, true):
    """It lies as the model does, has the bits of kernels on this rank's memory, and the numbers of one process."""
    model, ema = way(mesh)
    optimizer = trainops.AdamW(model.parameters(), ema=ema, **OPTIONS)
    expected = []

    def follow():
        weights = list(map(memory, model.parameters()))
        if expected:
            trainops.ema_update_(expected, weights, DECAY)
        expected.extend(weights[len(expected) :])

    train(model, optimizer, range(STEPS), rank, RANKS, follow)
    averages = list(ema.module.parameters())
    assert [*map(layout, averages)] == [*map(layout, model.parameters())]
    assert [x is None for x in map(layout, averages)].count(True) == 1
    assert not any(memory(x).numel() for x in averages[-1:]) or rank == 0
    assert all(map(same_bits, map(memory, averages), expected))
    check_export(ema, rank, true)
    return model, ema, optimizer


def check_export(ema, rank, true):
    found = ema.full_state_dict()
    expected = true.state_dict()["module"] if rank == 0 else {}
    assert list(found) == list(expected)
    assert not found or found["gain"].data_ptr() != ema.module.gain.data_ptr()
    for name, x in found.items():
        assert layout(x) is None
        torch.testing.assert_close(x, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def check_silence(model, ema, optimizer, rank):
    """An average asks no other rank for anything, and is moved in the step's launch, or by one kernel for all."""
    moved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema, "check_model", pytest.fail)  # FSDP brings back the tensors that it takes away
        train(model, optimizer, range(2), rank, RANKS)

    def spy(averages, sources, *args, update=ema_update.update_averages):
        assert {type(x) for x in (*averages, *sources)} <= {torch.Tensor, torch.nn.Parameter}
        moved.append(len(averages))
        return update(averages, sources, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema_update, "update_averages", spy)
        with_norm = communication(optimizer.step)
        assert sum(moved) <= 2  # buffers alone
        assert len(with_norm) == 1, with_norm  # that of the norm: they are seen
        optimizer.max_grad_norm, optimizer.skip_nonfinite = None, False
        assert communication(optimizer.step) == []
        ema.detach()
        before = list(map(memory, ema.module.parameters()))
        assert communication(ema.update) == []
        assert moved[-1] == len(before) + 2
    assert not all(map(same_bits, before, map(memory, ema.module.parameters())))


def check_no_forward(ema):
    for call in (ema, ema.module):
        with pytest.raises(RuntimeError, match=r"`with ema\.swap\(\):`, or .*: EMA\(model, module=\.\.\.\)"):
            call(batch(0))


def check_forward(model, ema, optimizer, rank, true):
    """A module that FSDP gathers is called with what the average has then."""
    for step in range(STEPS, STEPS + 2):
        for it in (ema, true[1]):
            it.module.eval()
        with torch.no_grad():
            torch.testing.assert_close(ema(batch(9)), true[1](batch(9)))
        train(model, optimizer, [step], rank, RANKS)
        train(true[0], true[2], [step])


def check_moved_before(mesh, rank):
    """An average that has moved before it is sharded keeps its values, bit for bit, and sends nothing for it."""
    model, ema, *_ = on_one_process(range(2))
    expected = {name: x.clone() for name, x in ema.state_dict()["module"].items()}
    ema.detach()
    sharded(model, mesh)
    assert communication(ema.state_dict) == []
    assert layout(ema.module.head.weight) == layout(model.head.weight) is not None
    shards = [p.to_local() for p in ema.module.parameters() if layout(p) is not None]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in shards)  # nothing holds the whole
    found = ema.full_state_dict()
    assert all(same_bits(found[name], x) for name, x in expected.items()) if rank == 0 else not found
    # Whole weights come back as shards.
    _, other = made_after(mesh)
    other.load_state_dict({"module": expected, "step": 2})
    assert all(map(same_bits, map(memory, other.module.parameters()), map(memory, ema.module.parameters())))
    assert other.step == 2


@torch.no_grad()
def check_written(mesh):
    """Weights that are written into an average, before it is sharded or after, are what it continues from."""
    for is_written_before in (True, False):
        model = Network().begin()
        ema = trainops.EMA(model, DECAY, update_every=2)
        if is_written_before:
            ema.module.head.weight.add_(1.0)
        sharded(model, mesh)
        ema.update()  # does not move it, but lets it lie as the model does
        if not is_written_before:
            ema.module.head.weight.add_(1.0)
        before = memory(ema.module.head.weight)
        ema.update()
        torch.testing.assert_close(memory(ema.module.head.weight), before - (1 - DECAY))


def check_errors(mesh):
    fsdp = importlib.import_module("torch.distributed.fsdp")
    model, other = sharded(Network().begin(), mesh), Network().begin()
    fsdp.fully_shard(other.head, mesh=mesh)
    with pytest.raises(ValueError, match="gain is on cpu, but its average on meta"):
        trainops.EMA(model, module=sharded(on_meta(), mesh))
    with pytest.raises(ValueError, match=r"inner\.0\.weight is placed as .*, but its average is not sharded"):
        trainops.EMA(model, module=other)
    with pytest.raises(ValueError, match=r"FSDP1.*torch\.distributed\.fsdp\.fully_shard"):
        trainops.EMA(fsdp.FullyShardedDataParallel(torch.nn.Linear(4, 4), device_id=torch.device("cpu")))


def check_all(rank):
    mesh = mesh_of(RANKS)
    for way in ALONE:
        made = check_average(way, mesh, rank, on_one_process(range(STEPS))[1])
        check_no_forward(made[1])
    check_silence(*made, rank)
    for way in CALLABLE:
        true = on_one_process(range(STEPS))
        check_forward(*check_average(way, mesh, rank, true[1]), rank, true)
    check_moved_before(mesh, rank)
    check_written(mesh)
    check_errors(mesh)


def test_averages_of_shards(tmp_path):
    on_ranks(RANKS, tmp_path, check_all)
