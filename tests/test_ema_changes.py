"""Averages whose model, module, optimizer or settings others change: right, or an error that changes nothing."""

import copy
import math

import pytest
import torch
from contract import same_bits
from models import same_tensors, snapshot
from said import said
from targets import over
from torch import nn

import trainops


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def train(model, optimizer, steps=1):
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()


# Optimizers that begin anew beside models that do not: the average stays, and a warning says so.


def load_best(model, best):
    model.load_state_dict(best)


@torch.no_grad()
def clamp(model, best):
    for p in model.parameters():
        p.clamp_(-0.5, 0.5)


@over("change", {"best": load_best, "clamp": clamp})
def test_a_second_phase_keeps_the_average(change):
    model = net()
    ema = trainops.EMA(model, 0.99)
    optimizer = trainops.AdamW(model.parameters(), lr=0.01, ema=ema)
    fresh = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 6)
    best = copy.deepcopy(model.state_dict())
    train(model, optimizer, 4)
    optimizer.load_state_dict(fresh)
    change(model, best)
    average = snapshot(ema.module)
    (message,) = said(lambda: train(model, optimizer))
    assert "keeps its last 10 updates" in message
    assert ema.step == 11
    assert not same_bits(ema.module[0].weight, model[0].weight)
    assert (ema.module[0].weight - average["0.weight"]).abs().max() < 0.1


def test_a_state_of_torchs_sgd_is_not_one_from_before_any_step():
    model, theirs = net(), net()
    before = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    train(theirs, before, 3)
    ema = trainops.EMA(model, 0.99)
    optimizer = trainops.SGD(model.parameters(), lr=0.1, momentum=0.9, ema=ema)
    train(model, optimizer, 5)
    model.load_state_dict(theirs.state_dict())
    optimizer.load_state_dict(before.state_dict())
    (message,) = said(lambda: train(model, optimizer))
    assert "keeps its last 5 updates" in message
    assert ema.step == 6


# Tensors that cannot be moved any more: nothing has happened.


def frozen_quantised(model, module):
    model[2].weight.requires_grad_(False)
    model[2].weight.data = torch.ones(2, 4, dtype=torch.int8)


def cast_buffer(model, module):
    model[1].running_mean.data = model[1].running_mean.data.int()


def expanded_average(model, module):
    module[1].running_mean = torch.zeros(1).expand(4)


def average_of_inference(model, module):
    with torch.inference_mode():
        module.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)


@over(
    ("change", "message"),
    {
        "frozen": (frozen_quantised, "2.weight is torch.int8, but its average is torch.float32"),
        "buffer": (cast_buffer, "1.running_mean is torch.int32"),
        "expanded": (expanded_average, "elements of the average of 1.running_mean share memory"),
        "inference": (average_of_inference, "was made in inference mode"),
    },
)
def test_what_cannot_be_moved_stops_the_step_before_it_begins(change, message):
    model = net()
    ema = trainops.EMA(model, 0.9)
    optimizer = trainops.AdamW(model.parameters(), ema=ema)
    train(model, optimizer, 2)
    change(model, ema.module)
    before, average, state = snapshot(model), snapshot(ema.module), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        train(model, optimizer)
    assert all(same_bits(x, before[name]) for name, x in snapshot(model).items())
    assert all(same_bits(x, average[name]) for name, x in snapshot(ema.module).items())
    assert str(optimizer.state_dict()) == str(state)
    assert ema.step == 2


# Modules that hold their parameters twice, and conversions that swap tensors.


@over("options", {"exclude": {"exclude": "weight_hh_l0"}, "trainable_only": {"trainable_only": True}})
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_modules_have_what_they_share(cls, options):
    model, x = cls(8, 8), torch.randn(3, 2, 8)
    model.weight_hh_l0.requires_grad_(False)
    ema = trainops.EMA(model, 0.5, **options)
    assert same_bits(ema(x)[0], model(x)[0])
    if "trainable_only" in options:
        model.weight_hh_l0.requires_grad_(True)
        ema.update()
        model.weight_hh_l0.data.add_(1)
        ema.update()
    twin = cls(8, 8)
    twin.load_state_dict({**model.state_dict(), **ema.module.state_dict()})
    assert same_bits(ema(x)[0], twin(x)[0])


def test_conversions_that_swap_tensors(monkeypatch):
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    model = net()
    ema = trainops.EMA(model, 0.9)
    model.load_state_dict(net().state_dict())
    ema.module.load_state_dict(net().state_dict())
    ema.load_state_dict(trainops.EMA(net()).state_dict())
    model.double()
    ema.module.double()
    ema.update()
    assert ema.step == 1


@over("wrap", {"compiled": lambda x: torch.compile(x, backend="eager"), "parallel": nn.DataParallel})
def test_copies_go_through_wrappers(wrap):
    model = net()
    ema = trainops.EMA(model, 0.5)
    for _ in range(2):
        model[0].weight.data.add_(1)
        ema.update()
    ema.copy_to(wrap(model))
    assert same_tensors(model, ema.module)
    other = net()
    trainops.EMA(wrap(model)).copy_to(other)
    assert same_tensors(other, model)


# Numbers that may be set at any time.


@pytest.mark.parametrize("decay", [2.0, math.nan, -0.5])
def test_a_decay_that_is_none_is_refused_by_the_update(decay):
    model = net()
    ema = trainops.EMA(model, 0.9)
    ema.update()
    before = snapshot(ema.module)
    ema.decay = decay
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
        ema.update()
    assert all(same_bits(x, before[name]) for name, x in snapshot(ema.module).items())


@over(
    "count",
    {
        "attribute": lambda ema, step: setattr(ema, "step", step),
        "update": lambda ema, step: ema.update(step=step),
        "load": lambda ema, step: ema.load_state_dict(ema.state_dict(), step=step),
    },
)
def test_a_count_that_is_none_is_refused(count):
    ema = trainops.EMA(net(), 0.9)
    ema.update()
    for step, error in ((1.5, TypeError), (-1, ValueError), (True, TypeError)):
        with pytest.raises(error, match="step must"):
            count(ema, step)
    assert ema.step == 1


def test_other_numbers():
    param = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="warmup_power must be finite"):
        trainops.EMA(net(), warmup=True, warmup_power=math.nan)
    with pytest.raises(TypeError, match="skip_nonfinite must be True or False"):
        trainops.AdamW([param], skip_nonfinite="no")
    limit = torch.tensor(1.0)
    optimizer = trainops.AdamW([param], max_grad_norm=limit)
    param.grad = torch.ones(2)
    with pytest.raises(ValueError, match="total_norm must not be negative"):
        optimizer.step(total_norm=-1.0)
    limit.fill_(-1.0)
    with pytest.raises(ValueError, match="Invalid max_grad_norm"):
        optimizer.step()
    optimizer.max_grad_norm = None
    optimizer.param_groups[0]["betas"] = (1.0, 0.999)
    with pytest.raises(ValueError, match="Invalid betas"):
        optimizer.step()
    assert param.tolist() == [0.0, 0.0]
    assert not optimizer.state
