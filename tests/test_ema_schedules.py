"""Schedules of an average: half-lives, functions, updates that are left out. timm's own are in test_ema_model.py."""

import copy
import pickle

import pytest
import torch
from models import same_tensors, snapshot, wander
from targets import over
from torch import nn

import trainops


def test_a_half_life_is_a_decay():
    ema = trainops.EMA(nn.Linear(2, 2), halflife_steps=1000)
    assert ema.decay**1000 == pytest.approx(0.5, rel=1e-12)
    every = trainops.EMA(nn.Linear(2, 2), halflife_steps=1000, update_every=10)
    assert every.decay**100 == pytest.approx(0.5, rel=1e-12)


def test_a_function_decides_on_each_update():
    seen = []

    def decay(step):
        seen.append(step)
        return {1: 0.0, 2: None, 3: 0.5, 5: 1.0}.get(step, 0.75)

    model = nn.Linear(1, 1)
    ema, averages = trainops.EMA(model, decay), []
    for value in range(1, 6):
        nn.init.constant_(model.weight, value)
        ema.update()
        averages.append(ema.module.weight.item())
    assert seen == [1, 2, 3, 4, 5]
    assert averages == [1.0, 1.0, 2.0, 2.5, 2.5]


def test_without_a_copy_in_the_beginning():
    """As timm's ``update(model)`` without a step."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    ema = trainops.EMA(model, lambda step: 0.75)
    nn.init.constant_(model.weight, 1.0)
    ema.update()
    assert ema.module.weight.item() == 0.25


def test_updates_that_are_left_out_begin_with_a_copy_all_the_same():
    """It was the initial weights that the first update of every ten kept in the average."""
    model = nn.Linear(3, 2)
    ema = trainops.EMA(model, 0.999, update_every=10)
    for _ in range(10):
        wander(model.parameters())
        ema.update()
    assert same_tensors(ema.module, model)
    assert [ema.decay_at(step) for step in (10, 20)] == [0.0, 0.999]


def test_schedules_are_pickled_and_shown():
    for decay in (trainops.DiffusersDecay(0.99), trainops.EMAPytorchDecay(0.99)):
        ema = trainops.EMA(nn.Linear(3, 2), decay)
        assert pickle.loads(pickle.dumps(ema)).decay == decay == copy.deepcopy(ema).decay
        assert f"decay={decay!r}" in repr(ema)


BAD_SCHEDULES = {
    "both": ({"decay": 0.9, "halflife_steps": 5}, ValueError, "decay and halflife_steps say the same"),
    "zero": ({"halflife_steps": 0}, ValueError, "halflife_steps must be positive, got 0"),
    "nan": ({"halflife_steps": float("nan")}, ValueError, "halflife_steps must be positive, got nan"),
    "text": ({"halflife_steps": "5"}, TypeError, "halflife_steps must be a number, got '5'"),
    "warmup": ({"decay": lambda step: 0.9, "warmup": True}, ValueError, "decay is a function: it takes the place"),
    "after": ({"decay": lambda step: 0.9, "update_after_step": 5}, ValueError, "decay is a function"),
}


@over(("options", "error", "message"), BAD_SCHEDULES)
def test_bad_schedules(options, error, message):
    with pytest.raises(error, match=message):
        trainops.EMA(nn.Linear(2, 2), **options)


@pytest.mark.parametrize(("value", "error"), [(1.5, ValueError), ("0.9", TypeError), (float("nan"), ValueError)])
def test_what_a_function_returns_is_checked_before_anything_moves(value, error):
    model = nn.Linear(3, 2)
    optimizer = trainops.AdamW(model.parameters(), ema=trainops.EMA(model, lambda step: value))
    model.weight.grad = torch.ones_like(model.weight)
    before = snapshot(model)
    with pytest.raises(error, match=r"decay\(1\) must be"):
        optimizer.step()
    assert same_tensors(model, before)
    assert optimizer.ema.step == 0
