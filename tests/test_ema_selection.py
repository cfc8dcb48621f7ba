"""Which parameters and buffers are averaged, and what becomes of the others."""

import copy
import re

import pytest
import torch
from contract import same_bits
from models import over_copies, snapshot
from targets import over
from torch import nn

import trainops


class Adapted(nn.Module):
    """A frozen layer beside two small matrices that are trained."""

    def __init__(self, size=32, rank=4):
        super().__init__()
        self.base = nn.Linear(size, size).requires_grad_(False)
        self.down, self.up = nn.Linear(size, rank, bias=False), nn.Linear(rank, size, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Flagged(nn.Module):
    """Float buffers of three kinds, beside parameters."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.register_buffer("initialized", torch.tensor(0.0))
        self.register_buffer("cache", torch.zeros(2))
        self.register_buffer("nothing", None)


def set_grads(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None


def trained(model, steps=3, **options):
    """The average and the optimizer after some steps."""
    ema = trainops.EMA(model, 0.5, **options)
    optimizer = trainops.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, ema=ema)
    for _ in range(steps):
        set_grads(model)
        optimizer.step()
    return ema, optimizer


def pairs(ema):
    return ema.check_model().pairs


def shared(ema):
    theirs = dict(ema.model.named_parameters())
    return {name for name, p in ema.module.named_parameters() if p is theirs[name]}


def test_adapters_alone():
    """Of a frozen model, nothing is copied, kept or read."""
    model = nn.Sequential(*[Adapted() for _ in range(8)])
    ema, _ = trained(model, trainable_only=True)
    everything = trainops.EMA(model, 0.5)
    assert (len(pairs(ema)), len(pairs(everything))) == (16, 32)
    own = {id(p): p for p in model.parameters()}
    kept = [p for p in ema.module.parameters() if id(p) not in own]
    assert sum(p.numel() for p in kept) == 8 * 2 * 32 * 4
    assert shared(ema) == {name for name, p in model.named_parameters() if not p.requires_grad}
    expected = trained(copy.deepcopy(model), 0)[0]
    x = torch.randn(2, 32)
    assert ema.module(x).shape == expected.module(x).shape
    assert all(p.requires_grad == (".base." not in name) for name, p in model.named_parameters())


@over("fused", {"update": False, "step": True})
def test_the_adapters_averages_are_those_of_all(fused):
    torch.manual_seed(0)
    model = Adapted()
    averages = [trainops.EMA(model, 0.5, trainable_only=only) for only in (True, False)]
    optimizer = trainops.AdamW([*model.down.parameters(), *model.up.parameters()], lr=0.1)
    optimizer.ema = averages[0] if fused else None
    for _ in range(4):
        set_grads(model)
        optimizer.step()
        for ema in averages[fused:]:
            ema.update()
    ours, theirs = (dict(ema.module.named_parameters()) for ema in averages)
    assert all(same_bits(ours[name], x) for name, x in theirs.items())


def test_a_parameter_that_is_unfrozen_is_averaged_from_then_on():
    """From the value that it has after the step, as by a step and an update."""
    model = Adapted()
    ema, optimizer = trained(model, trainable_only=True)
    model.base.weight.requires_grad_(True)
    optimizer.add_param_group({"params": [model.base.weight]})
    start = None
    for _ in range(2):
        set_grads(model)
        optimizer.step()
        weight = model.base.weight.detach().clone()
        start = weight if start is None else start.lerp(weight, 0.5)
        assert same_bits(ema.module.base.weight, start)
    assert shared(ema) == {"base.bias"}
    assert not ema.module.base.weight.requires_grad
    before = ema.module.base.weight.detach().clone()
    model.base.weight.requires_grad_(False)  # and stays so
    model.base.weight.add_(1)
    set_grads(model)
    optimizer.step()
    torch.testing.assert_close(ema.module.base.weight, before.lerp(model.base.weight, 0.5))


def test_shared_parameters_are_the_models_whatever_becomes_of_them():
    model = Adapted()
    ema, _ = trained(model, trainable_only=True)
    model.base.weight = nn.Parameter(torch.zeros(32, 32), requires_grad=False)
    model.base.bias.data = torch.ones(32)
    set_grads(model)
    ema.optimizer.step()
    assert shared(ema) == {"base.weight", "base.bias"}
    with ema.swap():
        assert model.base.bias.tolist() == [1.0] * 32
    other = Adapted()
    ema.copy_to(other)
    assert same_bits(other.base.bias, torch.ones(32))
    assert same_bits(other.down.weight, ema.module.down.weight)


def test_a_frozen_parameter_of_another_dtype_and_device_stays_as_it_is():
    model = Adapted().to(torch.bfloat16)
    ema, _ = trained(model, trainable_only=True, dtype=torch.float32, device="cpu")
    assert ema.module.base.weight is model.base.weight
    assert ema.module.down.weight.dtype == torch.float32


# include= and exclude=

CHOICES = {
    "name": ({"include": "linear.weight"}, {"linear.weight"}),
    "names": ({"include": ["linear.weight", "norm.bias"]}, {"linear.weight", "norm.bias"}),
    "module": ({"include": "norm"}, {"norm.weight", "norm.bias"}),
    "pattern": ({"include": "*.weight"}, {"linear.weight", "norm.weight"}),
    "expression": ({"include": re.compile(r"r\.(weight|bias)$")}, {"linear.weight", "linear.bias"}),
    "excluded": ({"exclude": "linear.*"}, {"norm.weight", "norm.bias"}),
    "excluded_expression": ({"exclude": [re.compile("weight")]}, {"linear.bias", "norm.bias"}),
    "both": ({"include": "norm", "exclude": "*.bias"}, {"norm.weight"}),
    "nothing": ({"include": []}, set()),
}


@over(("options", "expected"), CHOICES)
def test_parameters_by_name(options, expected):
    ema, _ = trained(Flagged(), **options)
    names = {name for name, _ in ema.model.named_parameters()}
    assert names - shared(ema) == expected
    assert all(p.requires_grad for p in ema.model.parameters())
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "initialized", "cache"}
    assert ema.state_dict()["module"].keys() == expected | buffers


def test_tied_parameters_are_chosen_by_any_of_their_names():
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 3)})
    model["second"].weight = model["first"].weight
    assert shared(trainops.EMA(model, exclude="second.weight")) == {"first.weight"}
    ema = trainops.EMA(model, include="second")
    assert shared(ema) == {"first.bias"}
    ema.update()
    assert ema.module["first"].weight is ema.module["second"].weight


BAD = {
    "include": ({"include": "linaer"}, ValueError, "include: the model has no parameter whose name fits 'linaer'"),
    "exclude": ({"exclude": ["linear", "x.*"]}, ValueError, r"exclude: the model has no parameter .* 'x\.\*'"),
    "a_buffer": ({"exclude": "cache"}, ValueError, "no parameter whose name fits 'cache'"),
    "number": ({"include": 3}, TypeError, "include must be names, or patterns of names, got 3"),
    "numbers": ({"exclude": [3]}, TypeError, "exclude must be names, or patterns of names, got 3"),
    "trainable_only": ({"trainable_only": 1}, TypeError, "trainable_only must be True or False, got 1"),
    "buffers": ({"average_buffers": "never"}, ValueError, "one of 'average', 'copy', 'leave', got 'never'"),
    "buffers_type": ({"average_buffers": None}, TypeError, "average_buffers must be True, False"),
    "buffer_name": ({"average_buffers": {"cahce": "copy"}}, ValueError, "no buffer whose name fits 'cahce'"),
    "buffer_use": ({"average_buffers": {"cache": False}}, ValueError, "got False"),
}


@over(("options", "error", "message"), BAD)
def test_bad_choices(options, error, message):
    with pytest.raises(error, match=message):
        trainops.EMA(Flagged(), **options)


# average_buffers=

FLOATS = ("initialized", "cache", "norm.running_mean")
BUFFERS = {
    "default": ({}, ["average"] * 3),
    "true": ({"average_buffers": True}, ["average"] * 3),
    "false": ({"average_buffers": False}, ["copy"] * 3),
    "copy": ({"average_buffers": "copy"}, ["copy"] * 3),
    "leave": ({"average_buffers": "leave"}, ["leave"] * 3),
    "flag": ({"average_buffers": {"initialized": "copy"}}, ["copy", "average", "average"]),
    "first_fits": ({"average_buffers": {"norm": "average", "*": "copy"}}, ["copy", "copy", "average"]),
    "cache": ({"average_buffers": {re.compile("^c"): "leave"}}, ["average", "leave", "average"]),
    "none": ({"average_buffers": {"nothing": "leave"}}, ["average"] * 3),
}
AFTER = {"average": 0.25, "copy": 1.0, "leave": 0.0}


@over("fused", {"update": False, "step": True})
@over(("options", "uses"), BUFFERS)
def test_buffers_by_kind(options, uses, fused):
    """A flag that is copied is a flag, while BatchNorm's statistics are averaged."""
    model = Flagged()
    model.norm.running_mean.zero_()
    ema = trainops.EMA(model, 0.75, **options)
    optimizer = trainops.AdamW(model.parameters(), ema=ema if fused else None)
    for step in range(2):
        set_grads(model)
        if step == 1:
            for name in FLOATS:
                model.get_buffer(name).fill_(1)
            model.norm.num_batches_tracked.fill_(5)
        optimizer.step()
        None if fused else ema.update()
    got = [ema.module.get_buffer(name).unique().item() for name in FLOATS]
    assert got == [AFTER[use] for use in uses]
    assert ema.module.norm.num_batches_tracked == (0 if uses[2] == "leave" else 5)


def test_a_copied_buffer_may_grow():
    model = Flagged()
    ema = trainops.EMA(model, 0.75, average_buffers={"cache": "copy"})
    for size in (2, 5, 5, 1):
        model.cache = torch.full((size,), float(size))
        ema.update()
        assert same_bits(ema.module.cache, model.cache)
        assert ema.module.cache is not model.cache


def test_what_is_left_may_change_at_will():
    """And nothing is looked at anew for it."""
    model = Flagged()
    ema = trainops.EMA(model, 0.75, average_buffers={"cache": "leave"})
    ema.update()
    matched = ema.plan_update().matched
    for value in (torch.ones(5), None, torch.ones(2, dtype=torch.int64)):
        model.cache = value
        ema.update()
    assert ema.plan_update().matched is matched
    assert ema.module.cache.tolist() == [0.0, 0.0]


# Checkpoints and copies.


@over_copies
def test_copies_share_with_their_own_model(copied):
    ema, _ = trained(Adapted(), trainable_only=True)
    twin = copied(ema)
    assert shared(twin) == {"base.weight", "base.bias"}
    assert twin.module.base.weight is twin.model.base.weight
    twin.update()
    assert shared(twin) == {"base.weight", "base.bias"}


@over("whole", {"": False, "whole_model": True})
def test_a_checkpoint_has_no_frozen_weights_and_writes_none(whole):
    ema, _ = trained(Adapted(), trainable_only=True)
    state = copy.deepcopy(ema.state_dict())
    assert state["module"].keys() == {"down.weight", "up.weight"}
    if whole:  # as of an average of everything
        state["module"] = copy.deepcopy(ema.module.state_dict())
        state["module"]["base.weight"].zero_()
    other = trainops.EMA(Adapted(), 0.5, trainable_only=True)
    base = snapshot(other.model)
    other.load_state_dict(state)
    assert same_bits(other.module.up.weight, ema.module.up.weight)
    assert all(same_bits(x, base[name]) for name, x in snapshot(other.model).items())
    assert other.module.base.weight is other.model.base.weight
    state["module"].pop("up.weight")
    with pytest.raises(ValueError, match=r"missing \['up.weight'\], unexpected \[\]"):
        other.load_state_dict(state)
