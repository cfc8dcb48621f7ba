"""Models for averages to follow, what training does to them, and checks of what an average then holds."""

import copy
import pickle

import pytest
import torch
from contract import DTYPES, assert_contract, exact, same_bits
from exact import ema as exact_ema
from targets import over
from torch import nn

import trainops

INF = float("inf")

# Views of a tensor of shape (6, 7, 8, 9).
LAYOUTS = {f"offset_{i}": lambda x, i=i: x.flatten()[i:] for i in (0, 1, 2, 3, 5, 7)} | {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2),
    "every_other": lambda x: x[..., ::2],
    "one_column": lambda x: x[..., 5],
}

# A model's dtype, and that of its average where it is another.
BFLOAT16_IN_FLOAT32 = (torch.bfloat16, torch.float32)
AVERAGES = [*((dtype, None) for dtype in DTYPES), BFLOAT16_IN_FLOAT32, (torch.float64, torch.float32)]


over_layouts = over("layout", LAYOUTS)
over_averages = pytest.mark.parametrize(("dtype", "shadow"), AVERAGES, ids=str)
over_two_averages = pytest.mark.parametrize(("dtype", "shadow"), [AVERAGES[0], BFLOAT16_IN_FLOAT32], ids=str)
over_copies = over("copied", {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))})


class Net(nn.Module):
    """Of everything that a model may hold, something."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(33, 31)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.ones(0, 3))
        self.frozen = nn.Parameter(torch.randn(127), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(5))  # never has a gradient
        self.elsewhere = nn.Parameter(torch.randn(4, 3))  # is not given to the optimizer
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("bias_table", torch.tensor([0.0, -INF]))
        self.register_buffer("nothing", None)


class Tied(nn.Module):
    """Two names for one parameter, and for one buffer."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(7, 7), nn.Linear(7, 7, bias=False)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("table", torch.randn(5))
        self.decoder.register_buffer("table", self.table)


class Single(nn.Module):
    """One parameter, and a buffer of its dtype."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("last", torch.zeros((), dtype=weight.dtype, device=weight.device))


FLOAT_BUFFERS = {"norm.running_mean", "norm.running_var", "bias_table"}
OTHER_BUFFERS = {"norm.num_batches_tracked", "mask"}


def make_net(dtype=torch.float32, device="cpu"):
    return Net().to(device=device, dtype=dtype)


def tensors_of(module):
    return dict(module.named_parameters()) | dict(module.named_buffers())


def snapshot(module):
    return {name: x.detach().clone() for name, x in tensors_of(module).items()}


def same_tensors(module, expected):
    """Whether a module holds, bit for bit, what ``expected`` (a module or a snapshot) does."""
    ours, others = (x if isinstance(x, dict) else tensors_of(x) for x in (module, expected))
    return ours.keys() == others.keys() and all(same_bits(ours[name], others[name]) for name in others)


@torch.no_grad()
def wander(tensors):
    """Change every tensor a little, as training would."""
    for x in tensors:
        if x.dtype == torch.bool:
            x.logical_not_()
        else:
            x.add_(0.1 * torch.randn_like(x) if x.is_floating_point() or x.is_complex() else 1)


def moved(model, target, shadow=None):
    """The average of a model after three updates."""
    ema = trainops.EMA(model, 0.9, dtype=shadow, backend=target.backend)
    for _ in range(3):
        wander(tensors_of(model).values())
        ema.update()
    return ema


def check_averages(module, model, before, decay, copied=()):
    """Hold one update to the contract, from what the average was before it."""
    for name, average in tensors_of(module).items():
        old, new = before[name], tensors_of(model)[name]
        if average.is_floating_point() and name not in copied:
            finite = (old.isfinite() & new.isfinite()).cpu()
            true = exact_ema(exact(old)[finite.numpy()], exact(new)[finite.numpy()], decay)
            assert_contract(average.detach().cpu()[finite], true, what=name)


def check_updates(target, ema, updates, every=1):
    """Hold every update to be ``ema_update_`` with the decay of its step, and a copy of what is no float."""
    for _ in range(updates):
        wander(tensors_of(ema.model).values())
        before, expected, step = snapshot(ema.module), snapshot(ema.module), ema.step + 1
        for name, x in tensors_of(ema.model).items() if step % every == 0 else ():
            if x.is_floating_point() or x.is_complex():
                trainops.ema_update_([expected[name]], [x], ema.decay_at(step), backend=target.backend)
            else:
                expected[name].copy_(x)
        ema.update()
        assert ema.step == step
        assert same_tensors(ema.module, expected)
        check_averages(ema.module, ema.model, before, ema.decay_at(step) if step % every == 0 else 1.0)


def replace(model, name, make):
    module, _, key = name.rpartition(".")
    x = make(model.get_parameter(name).detach())
    setattr(model.get_submodule(module), key, nn.Parameter(x, requires_grad=x.is_floating_point()))


def replace_data(model, make):
    model.linear.weight.data = make(model.linear.weight.data)


def shard(x):
    """A view into flat memory, unaligned, as sharding frameworks give to parameters."""
    return x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)


CHANGES = {
    "replaced": lambda model: replace(model, "linear.weight", torch.randn_like),
    "data": lambda model: replace_data(model, torch.randn_like),
    "data_transposed": lambda model: replace_data(model, lambda x: x.t().contiguous().t()),
    "data_shard": lambda model: replace_data(model, shard),
    "data_double": lambda model: replace_data(model, torch.Tensor.double),
    "data_half": lambda model: replace_data(model, torch.Tensor.half),
    "buffer": lambda model: setattr(model.norm, "running_mean", torch.randn_like(model.norm.running_mean)),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "assigned": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "frozen": lambda model: model.requires_grad_(False),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
}
SOME_CHANGES = [CHANGES[name] for name in ("replaced", "data_shard", "channels_last", "half")]
