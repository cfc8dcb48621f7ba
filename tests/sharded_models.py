"""A model that FSDP2 spreads over ranks, unevenly, and its training beside that of one process."""

import importlib

import torch
from process_groups import distributed
from torch import nn

import trainops
from trainops.ema_shards import layout

RANKS, DECAY = 2, 0.6
OPTIONS = {"lr": 0.05, "max_grad_norm": 0.1, "skip_nonfinite": True}


class Network(nn.Module):
    """Of 13, 5 and 1 rows: uneven shards, and an empty one. FSDP leaves ``gain`` alone."""

    def __init__(self, width=13):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(7, width), nn.Tanh(), nn.Linear(width, 5), nn.Tanh())
        self.head = nn.Linear(5, 1)
        self.gain = nn.Parameter(torch.empty(5))
        self.register_buffer("mean", torch.empty(5))
        self.register_buffer("batches", torch.empty((), dtype=torch.int64))
        self.register_buffer("zero", torch.empty(()), persistent=False)

    @torch.no_grad()
    def begin(self):
        """Weights that are the same however they are spread."""
        for i, p in enumerate(self.parameters()):
            p.copy_(placed(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 2, p))
        self.mean.zero_()
        self.batches.zero_()
        self.zero.zero_()
        return self

    def forward(self, x):
        if self.training:
            self.batches.add_(1)
            self.mean.add_(1.0 / self.batches)
        return self.head(self.inner(x) * self.gain + self.mean) + self.zero


def placed(whole, like):
    """``whole``, spread as ``like`` is."""
    tensors = importlib.import_module("torch.distributed.tensor")
    return whole if layout(like) is None else tensors.distribute_tensor(whole, like.device_mesh, like.placements)


def whole(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach()


def memory(x):
    """A copy of what this rank has of a tensor."""
    return (x.to_local() if hasattr(x, "to_local") else x).detach().clone()


def mesh_of(*sizes):
    names = ("outer", "inner")[-len(sizes) :]
    return importlib.import_module("torch.distributed.device_mesh").init_device_mesh(
        "cpu", sizes, mesh_dim_names=names
    )


def sharded(model, mesh):
    fully_shard = importlib.import_module("torch.distributed.fsdp").fully_shard
    fully_shard(model.inner, mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params={model.gain})


def batch(step, rank=0, ranks=1):
    return torch.randn(8, 7, generator=torch.Generator().manual_seed(step))[rank::ranks]


def train(model, optimizer, steps, rank=0, ranks=1, after_step=lambda: None):
    """The losses over all ranks. Of what FSDP leaves alone, nobody joins the gradients."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model(batch(step, rank, ranks)).square().mean()
        loss.backward()
        losses.append(mean(loss.detach(), ranks))
        if hasattr(model, "gain"):
            mean(model.gain.grad, ranks)
        optimizer.step()
        after_step()
    return losses


def mean(x, ranks):
    """Over all ranks, in place, if there are several that differ."""
    if ranks > 1:
        distributed.all_reduce(x)
        x /= distributed.get_world_size()
    return x


def on_one_process(steps, **sizes):
    """Model, average, optimizer, losses."""
    model = Network(**sizes).begin()
    ema = trainops.EMA(model, DECAY)
    optimizer = trainops.AdamW(model.parameters(), ema=ema, **OPTIONS)
    return model, ema, optimizer, train(model, optimizer, steps)


def communication(call):
    """The collectives that a call makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [x.name for x in profile.events() if "c10d" in x.name]
