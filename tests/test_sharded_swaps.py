"""Averaged weights in a sharded model for an evaluation, and their checkpoints, beside one process."""

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
    memory,
    mesh_of,
    on_one_process,
    sharded,
    train,
)

import trainops

pytestmark = forks
SAVED, STEPS = 2, 4


def made(mesh):
    model = sharded(Network().begin(), mesh)
    ema = trainops.EMA(model, DECAY)
    return model, ema, trainops.AdamW(model.parameters(), ema=ema, **OPTIONS)


@torch.no_grad()
def output(model):
    """In eval mode, in which buffers stay. FSDP2's root stays gathered."""
    model.eval()
    found = model(batch(9))
    model.train()
    return found


def held(model):
    """What this rank has of a model, by bits."""
    model.reshard()
    return list(map(memory, [*model.parameters(), *model.buffers()]))


def outputs():
    """Of one process after SAVED steps: with its own weights, and with the averaged ones."""
    model, ema, *_ = on_one_process(range(SAVED))
    own, averaged = output(model), output(ema.module)
    assert (own - averaged).abs().max() > 1e-3
    return own, averaged


def gather(model):
    output(model)


def begin_to_gather(model):
    model.unshard(async_op=True)


def check_swaps(model, ema, rank):
    """Whatever is gathered before, within and afterwards; twice in a row; around training, which is lost."""
    own, averaged = outputs()
    bits = held(model)
    ways = (held, gather, begin_to_gather)
    for before in ways:
        for within in ways:
            before(model)
            with ema.swap():
                torch.testing.assert_close(output(model), averaged)
                within(model)
            torch.testing.assert_close(output(model), own)
    with ema.swap():
        train(model, torch.optim.SGD(model.parameters(), 0.1), range(2), rank, RANKS)
    assert all(map(same_bits, held(model), bits))


def check_copies(model, ema):
    own, averaged = outputs()
    bits = held(model)
    for before in (held, gather, begin_to_gather):
        before(model)
        ema.store()
        before(model)
        ema.copy_to()
        torch.testing.assert_close(output(model), averaged)
        ema.restore()
        torch.testing.assert_close(output(model), own)
        ema.store(model.parameters())  # a generator yields what is there when it is asked
        gather(model)
        ema.copy_to(model.parameters())
        assert all(map(same_bits, held(model)[:-2], map(memory, ema.module.parameters())))
        gather(model)
        ema.restore(model.parameters())
        torch.testing.assert_close(output(model), own)
    assert all(map(same_bits, held(model), bits))
    other = sharded(Network().begin(), model.head.weight.device_mesh)
    gather(other)
    ema.copy_to(other)
    torch.testing.assert_close(output(other), averaged)


def check_errors(model, ema):
    """What could go wrong in silence raises, and has changed nothing."""
    own, _ = outputs()
    bits = held(model)
    gather(model)
    for call in (ema.store, ema.copy_to):
        gathered = list(model.parameters())
        with pytest.raises(RuntimeError, match="copies that FSDP has gathered of its shards: give the model"):
            call(gathered)
        gather(model)
    with pytest.raises(ValueError, match=r"inner\.0\.weight is not sharded, but its average is placed as .*Shard"):
        ema.copy_to(Network().begin())
    model.reshard()
    of_list = trainops.EMA(model.parameters(), DECAY)
    of_list.update()
    for call in (of_list.swap().__enter__, of_list.copy_to, of_list.store):
        with pytest.raises(RuntimeError, match=r"of a list of shards.*EMA\(model\)"):
            call()
    seen = []

    def inside(module, args):
        with pytest.raises(ValueError, match="inside a forward or backward pass") as raised:
            ema.swap().__enter__()
        seen.append(raised)

    with model.inner.register_forward_pre_hook(inside):
        torch.testing.assert_close(output(model), own)
    assert seen
    with (  # in the middle of a pass of FSDP, which has to be told, as ever
        model.inner.register_forward_pre_hook(lambda *_: 1 / 0),
        pytest.raises(ZeroDivisionError),
        ema.swap(),
    ):
        output(model)
    model.train()
    model.reset_iter_state()
    assert all(map(same_bits, held(model), bits))


def check_attach(mesh):
    """An average finds its parameters also where all of them are gathered."""
    model = importlib.import_module("torch.distributed.fsdp").fully_shard(torch.nn.Linear(7, 3), mesh=mesh)
    optimizer, ema = trainops.AdamW(model.parameters()), trainops.EMA(model, DECAY)
    gather(model)
    optimizer.ema = ema
    model(batch(0)).sum().backward()
    optimizer.step()
    assert ema.step == 1


def state_of(model, ema, optimizer):
    of_state = importlib.import_module("torch.distributed.checkpoint.state_dict")
    optimizer.init_state()
    state = dict(zip(("model", "optimizer"), of_state.get_state_dict(model, optimizer), strict=True))
    assert list(state["model"]) == list(ema.state_dict()["module"])
    return {**state, "ema": ema.state_dict()}


def save(made, folder):
    importlib.import_module("torch.distributed.checkpoint").save(state_of(*made), checkpoint_id=folder)


def load(made, folder):
    """Into an optimizer and an average that have taken no step, and do not seem to have."""
    model, ema, optimizer = made
    state = state_of(*made)
    assert ema.step == 0
    assert all(its["step"] == 0 for its in optimizer.state.values())
    importlib.import_module("torch.distributed.checkpoint").load(state, checkpoint_id=folder)
    importlib.import_module("torch.distributed.checkpoint.state_dict").set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    ema.load_state_dict(state["ema"])
    assert ema.step == SAVED


def check_all(rank, folder):
    mesh = mesh_of(RANKS)
    model, ema, optimizer = made(mesh)
    losses = train(model, optimizer, range(SAVED), rank, RANKS)
    check_swaps(model, ema, rank)
    check_copies(model, ema)
    check_attach(mesh)
    check_errors(model, ema)
    save((model, ema, optimizer), folder)
    gather(model)
    _, of_true, _, true_losses = on_one_process(range(STEPS))
    losses += train(model, optimizer, range(SAVED, STEPS), rank, RANKS)
    torch.testing.assert_close(losses, true_losses)
    torch.testing.assert_close(ema.full_state_dict(), dict(of_true.state_dict()["module"]) if rank == 0 else {})
    resumed, of_resumed, its_optimizer = made(mesh)
    load((resumed, of_resumed, its_optimizer), folder)
    train(resumed, its_optimizer, range(SAVED, STEPS), rank, RANKS)
    assert all(map(same_bits, held(resumed), held(model)))
    averages = ([*map(memory, x.state_dict()["module"].values())] for x in (of_resumed, ema))
    assert all(map(same_bits, *averages))
    assert of_resumed.step == ema.step == STEPS


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # on one process, by intent
def test_swaps_and_checkpoints(tmp_path):
    folder = str(tmp_path / "checkpoint")
    on_ranks(RANKS, tmp_path, check_all, folder)
    model = Network().begin()  # one process resumes what two have saved
    ema = trainops.EMA(model, DECAY)
    optimizer = trainops.AdamW(model.parameters(), ema=ema, **OPTIONS)
    load((model, ema, optimizer), folder)
    train(model, optimizer, range(SAVED, STEPS))
    true, of_true, *_ = on_one_process(range(STEPS))
    torch.testing.assert_close(dict(model.state_dict()), dict(true.state_dict()))
    torch.testing.assert_close(dict(ema.state_dict()["module"]), dict(of_true.state_dict()["module"]))
