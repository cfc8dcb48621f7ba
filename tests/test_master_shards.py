"""Masters of FSDP2's shards, and their distributed checkpoints: saved by two ranks, loaded by two and by one."""

import copy
import importlib

import pytest
import torch
from contract import same_bits
from process_groups import forks, on_ranks
from targets import thorough
from torch import nn

import trainops

OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "state_dtype": torch.float32}
STEPS, SAVED = 5, 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 5))


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).bfloat16() for p in network().parameters()]


def on_each_rank(rank, ranks, saves, path, master, backend):
    fully_shard = importlib.import_module("torch.distributed.fsdp").fully_shard
    tensors = importlib.import_module("torch.distributed.tensor")
    dcp = importlib.import_module("torch.distributed.checkpoint")
    of_state = importlib.import_module("torch.distributed.checkpoint.state_dict")
    mesh = importlib.import_module("torch.distributed.device_mesh").init_device_mesh("cpu", (ranks,))

    def sharded(x, like):
        return tensors.distribute_tensor(x, mesh, like.placements)

    model = network()
    state_dict = copy.deepcopy(model.state_dict())
    model.bfloat16()
    fully_shard(model, mesh=mesh)
    optimizer = trainops.AdamW(model.parameters(), master=master, backend=backend, **OPTIONS)
    own = model.state_dict()
    if saves:
        optimizer.load_float32_state_dict(model, {name: sharded(x, own[name]) for name, x in state_dict.items()})
    else:
        loaded = dict(zip(("model", "optimizer"), of_state.get_state_dict(model, optimizer), strict=True))
        dcp.load(loaded, checkpoint_id=path)
        of_state.set_state_dict(
            model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
        )
    for step in range(SAVED) if saves else range(SAVED, STEPS):
        for p, grad in zip(model.parameters(), gradients(step), strict=True):
            p.grad = sharded(grad, p)
        optimizer.step()
    if saves:
        saved = dict(zip(("model", "optimizer"), of_state.get_state_dict(model, optimizer), strict=True))
        dcp.save(saved, checkpoint_id=path)
    check(model, optimizer, SAVED if saves else STEPS, backend)


def check(model, optimizer, steps, backend):
    """All ranks together have the weights of a float32 model on one."""
    whole = network()
    theirs = trainops.AdamW(whole.parameters(), backend=backend, **OPTIONS)
    for step in range(steps):
        for p, grad in zip(whole.parameters(), gradients(step), strict=True):
            p.grad = grad.float()
        theirs.step()
    weights = optimizer.float32_state_dict(model)
    for name, x in whole.state_dict().items():
        assert same_bits(weights[name].full_tensor(), x), name


@forks
@thorough(lambda master, backend: (master, backend) != ("split", "cpu"))
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("master", ["split", "float32"])
def test_shards_are_those_of_float32_and_are_saved_and_loaded(tmp_path, master, backend):
    if not trainops.backends()[backend].available:
        pytest.skip(f"no backend {backend}")
    for ranks, saves in [(2, True), (2, False), (1, False)]:
        on_ranks(ranks, tmp_path, on_each_rank, ranks, saves, str(tmp_path / "saved"), master, backend)
