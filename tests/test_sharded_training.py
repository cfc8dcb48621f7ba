"""Clipped training beside one process: FSDP2, FSDP1, ZeroRedundancyOptimizer; and distributed checkpoints."""

import copy
import importlib
import warnings

import pytest
import torch
from contract import same_bits
from process_groups import assert_same_on_all_ranks, distributed, forks, on_ranks
from torch import nn

import trainops

pytestmark = forks
RANKS, STEPS, SAVED = 2, 4, 2
OPTIONS = {"lr": 0.05, "max_grad_norm": 0.1, "skip_nonfinite": True}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5))


def batch(step, rank=0, ranks=1):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 7, generator=generator)[rank::ranks]


def train(model, optimizer, steps, rank, ranks, wanted):
    """The norms of steps whose gradients are means over all ranks."""
    norms = []
    for step in steps:
        optimizer.zero_grad()
        loss = model(batch(step, rank, ranks)).square().mean()
        (loss * math_nan(step, rank, wanted)).backward()
        optimizer.step()
        norms.append(getattr(optimizer, "optim", optimizer).grad_norm)
    return norms


def math_nan(step, rank, wanted):
    return float("nan") if wanted and step == 1 and rank == 1 else 1.0


def on_one_process(**options):
    model = network()
    optimizer = trainops.AdamW(model.parameters(), **(OPTIONS | options))
    return model, optimizer, train(model, optimizer, range(STEPS), 0, 1, False)


def check(model, optimizer, norms, rank):
    true, _, true_norms = on_one_process()
    for norm, true_norm in zip(norms, true_norms, strict=True):
        torch.testing.assert_close(norm, true_norm)
        assert_same_on_all_ranks(norm)
    assert true_norms[0] > 2 * OPTIONS["max_grad_norm"]
    for (name, x), y in zip(model.named_parameters(), true.parameters(), strict=True):
        whole = x.detach().full_tensor() if hasattr(x, "full_tensor") else x.detach()
        torch.testing.assert_close(whole, y.detach(), msg=lambda text, name=name: f"{name}: {text}")


def check_fsdp2(rank, folder):
    """Saved halfway and resumed: the bits of a run that goes on."""
    fully_shard = importlib.import_module("torch.distributed.fsdp").fully_shard
    mesh = importlib.import_module("torch.distributed.device_mesh").init_device_mesh("cpu", (RANKS,))

    def made():
        model = network()
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, trainops.AdamW(model.parameters(), **OPTIONS)

    model, optimizer = made()
    norms = train(model, optimizer, range(SAVED), rank, RANKS, False)
    save(model, optimizer, folder)
    norms += train(model, optimizer, range(SAVED, STEPS), rank, RANKS, False)
    check(model, optimizer, norms, rank)
    resumed, of_resumed = made()
    load(resumed, of_resumed, folder)
    assert all(
        same_bits(x, y)
        for x, y in zip(
            norms[SAVED:], train(resumed, of_resumed, range(SAVED, STEPS), rank, RANKS, False), strict=True
        )
    )
    for x, y in zip(resumed.parameters(), model.parameters(), strict=True):
        assert same_bits(x.detach().to_local(), y.detach().to_local())
    check_skip(*made(), rank)


def check_skip(model, optimizer, rank):
    """A NaN on one rank; FSDP spreads it to the other."""
    train(model, optimizer, range(2), rank, RANKS, True)
    own = getattr(optimizer, "optim", optimizer)
    assert own.skipped_steps == 1
    assert all(state["step"] == 1 for state in own.state.values())


def save(model, optimizer, folder):
    dcp = importlib.import_module("torch.distributed.checkpoint")
    of_state = importlib.import_module("torch.distributed.checkpoint.state_dict")
    dcp.save(
        dict(zip(("model", "optimizer"), of_state.get_state_dict(model, optimizer), strict=True)),
        checkpoint_id=folder,
    )


def load(model, optimizer, folder):
    """Into an optimizer that has taken no step, and must not seem to have."""
    dcp = importlib.import_module("torch.distributed.checkpoint")
    of_state = importlib.import_module("torch.distributed.checkpoint.state_dict")
    optimizer.init_state()
    state = dict(zip(("model", "optimizer"), of_state.get_state_dict(model, optimizer), strict=True))
    assert all(its["step"] == 0 for its in optimizer.state.values())
    assert all(p.grad is None for p in model.parameters())
    dcp.load(state, checkpoint_id=folder)
    of_state.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert all(its["step"] == SAVED for its in optimizer.state.values())


def check_resumed_alone(rank, folder):
    """The checkpoint of two ranks, on one."""
    model = network()
    optimizer = trainops.AdamW(model.parameters(), **OPTIONS)
    load(model, optimizer, folder)
    train(model, optimizer, range(SAVED, STEPS), 0, 1, False)
    true = on_one_process()[0]
    for x, y in zip(model.parameters(), true.parameters(), strict=True):
        torch.testing.assert_close(x.detach(), y.detach())


def check_fsdp1(rank):
    fsdp = importlib.import_module("torch.distributed.fsdp").FullyShardedDataParallel
    for use_orig_params in (False, True):

        def made(use_orig_params=use_orig_params):
            model = fsdp(network(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
            return model, trainops.AdamW(model.parameters(), norm_group=distributed.group.WORLD, **OPTIONS)

        model, optimizer = made()
        norms = train(model, optimizer, range(STEPS), rank, RANKS, False)
        with fsdp.summon_full_params(model):
            check(model, optimizer, norms, rank)
        check_skip(*made(), rank)


def check_zero(rank):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it compiles functions that it does not use
        zero = importlib.import_module("torch.distributed.optim").ZeroRedundancyOptimizer

    def made(**options):
        model = nn.parallel.DistributedDataParallel(network())
        options = {"norm_group": "world", "backend": None, **OPTIONS, **options}
        return model, zero(model.parameters(), optimizer_class=trainops.AdamW, **options)

    model, optimizer = made()
    assert optimizer.optim.norm_group is distributed.group.WORLD
    norms = train(model, optimizer, range(SAVED), rank, RANKS, False)
    optimizer.consolidate_state_dict(to=0)
    saved = [copy.deepcopy(optimizer.state_dict()) if rank == 0 else None]
    assert not optimizer.optim.state_dict()["param_groups"][0].keys() & {"norm_group", "max_grad_norm", "ema"}
    distributed.broadcast_object_list(saved)
    resumed, of_resumed = made()
    resumed.load_state_dict(model.state_dict())
    of_resumed.load_state_dict(saved[0])
    of_both = [
        train(m, o, range(SAVED, STEPS), rank, RANKS, False) for m, o in ((model, optimizer), (resumed, of_resumed))
    ]
    assert all(map(same_bits, *of_both))
    check(model.module, optimizer, norms + of_both[0], rank)
    check_skip(*made(), rank)
    own_model, own = made(norm_group=None)  # a rank's own
    train(own_model, own, range(1), rank, RANKS, False)
    assert own.optim.grad_norm < norms[0]
    with pytest.raises(ValueError, match=r"call ema\.update\(\) after it"):
        made(ema=trainops.EMA(network()))
    # More ranks than parameters: those without any take part.
    single = nn.Linear(3, 1, bias=False)
    single.weight.grad = torch.ones(1, 3)
    of_single = zero(single.parameters(), optimizer_class=trainops.AdamW, norm_group="world", **OPTIONS)
    of_single.step()
    assert of_single.optim.grad_norm.item() == pytest.approx(3**0.5)


def check_all(rank, folder):
    check_fsdp2(rank, folder)
    check_fsdp1(rank)
    check_zero(rank)


def test_engines_train_as_one_process(tmp_path):
    folder = str(tmp_path / "checkpoint")
    on_ranks(RANKS, tmp_path, check_all, folder)
    on_ranks(1, tmp_path, check_resumed_alone, folder)
