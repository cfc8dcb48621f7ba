"""Warnings about a second clip and about schedulers: each comes once, and ordinary use is left alone."""

import copy
import math
import pickle

import pytest
import torch
from said import said
from targets import over
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, StepLR

import trainops


def make(**options):
    """A model with gradients, and an optimizer of ours."""
    model = with_gradients(nn.Linear(3, 2))
    return model, trainops.AdamW(model.parameters(), lr=0.1, **options)


def with_gradients(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


# A second clip.

CLIPS = {
    "clip_grad_norm_": lambda params: trainops.clip_grad_norm_(params, 1.0),
    "clip_grads_with_norm_": lambda params: trainops.clip_grads_with_norm_(params, 1.0, torch.tensor(9.0)),
    "one_parameter": lambda params: trainops.clip_grad_norm_(next(iter(params)), 1.0),
}


@over("clip", CLIPS)
@pytest.mark.parametrize("copied", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_second_clip_is_named_once(clip, copied):
    def step():
        clip(model.parameters())
        optimizer.step()

    model, optimizer = copied(make(max_grad_norm=1.0))
    with_gradients(model)
    (message,) = said(step)
    assert "clipped again inside step()" in message
    assert "leave out the call" in message
    assert "AdamW.grad_norm" in message
    assert said(step) == said(step) == []
    model, optimizer = make(max_grad_norm=1.0)  # the next one is told, too
    assert len(said(step)) == 1


def test_a_warning_that_is_an_error_has_changed_nothing():
    model, optimizer = make(max_grad_norm=1.0)
    before = copy.deepcopy(model.state_dict())
    trainops.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(UserWarning, match="clipped again"):
        optimizer.step()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not optimizer.state


def measure(model, optimizer):
    trainops.clip_grad_norm_(model.parameters(), math.inf)
    trainops.get_total_norm([p.grad for p in model.parameters()])


def clip_values(model, optimizer):
    trainops.clip_grad_value_(model.parameters(), 0.5)


def clip_others(model, optimizer):
    trainops.clip_grad_norm_(make()[0].parameters(), 1.0)


def clip_without_a_step(model, optimizer):
    other = torch.optim.SGD(model.parameters(), 0.1)
    trainops.clip_grad_norm_(model.parameters(), 1.0)
    other.step()
    optimizer.max_grad_norm, optimizer.skip_nonfinite = None, True


ORDINARY = {f.__name__: f for f in (measure, clip_values, clip_others, clip_without_a_step)}


@over("use", ORDINARY)
def test_what_is_no_second_clip_is_left_alone(use):
    model, optimizer = make(max_grad_norm=1.0)
    assert said(lambda: (use(model, optimizer), optimizer.step(), optimizer.step())) == []


def test_clipping_outside_alone_is_left_alone():
    model, optimizer = make(skip_nonfinite=True)
    assert said(lambda: (trainops.clip_grad_norm_(model.parameters(), 1.0), optimizer.step())) == []


# A scheduler that advances on skipped steps.


def train(optimizer, scheduler_step, steps=6, bad=3):
    params = optimizer.param_groups[0]["params"]
    for i in range(steps):
        for p in params:
            p.grad = torch.full_like(p, math.nan if i == bad else 1.0)
        optimizer.step()
        scheduler_step(i)


def test_a_scheduler_that_advances_on_skipped_steps_is_named_once():
    _, optimizer = make(skip_nonfinite=True)
    scheduler = ExponentialLR(optimizer, 0.9)
    (message,) = said(lambda: train(optimizer, lambda i: scheduler.step()))
    assert "scheduler advanced after a step that was skipped" in message
    assert "`scheduler.step()` only where `optimizer.skipped_steps` has not grown" in message
    assert said(lambda: train(optimizer, lambda i: scheduler.step())) == []


def test_a_scheduler_that_waits_is_left_alone():
    def step(i):
        nonlocal skipped
        if optimizer.skipped_steps == skipped:
            scheduler.step()
        skipped = int(optimizer.skipped_steps)

    _, optimizer = make(skip_nonfinite=True)
    scheduler, skipped = ExponentialLR(optimizer, 0.9), 0
    assert said(lambda: train(optimizer, step)) == []


@pytest.mark.parametrize(
    ("options", "bad"),
    [({"skip_nonfinite": True}, -1), ({"max_grad_norm": 1.0}, -1), ({}, 3)],
    ids=["none_skipped", "clipping", "torchs"],
)
def test_a_scheduler_of_steps_that_are_taken_is_left_alone(options, bad):
    optimizer = trainops.AdamW([nn.Parameter(torch.ones(2))], **options)
    scheduler = ExponentialLR(optimizer, 0.9)
    assert said(lambda: train(optimizer, lambda i: scheduler.step(), bad=bad)) == []


def test_a_scheduler_of_epochs_is_left_alone():
    """It moves after the last step of an epoch, whether that was skipped or not."""
    _, optimizer = make(skip_nonfinite=True)
    scheduler = StepLR(optimizer, 1)
    assert said(lambda: train(optimizer, lambda i: scheduler.step() if i % 3 == 2 else None, 9, bad=5)) == []
