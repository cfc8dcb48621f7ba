"""Warnings about an average that no step ever moves: each comes once, and ordinary use is left alone."""

import pytest
import torch
from said import said
from targets import over
from torch import nn

import trainops
from trainops import advice, ema_advice


def with_gradients(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def make():
    model = with_gradients(nn.Linear(3, 2))
    return model, trainops.AdamW(model.parameters())


def swap(ema):
    with ema.swap():
        pass


USES = {
    "swap": swap,
    "copy_to": lambda ema: ema.copy_to(nn.Linear(3, 2)),
    "state_dict": lambda ema: ema.state_dict(),
}


class Wrapper:
    """What frameworks put around an optimizer: settings stay on the wrapper."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


@over("use", USES)
@pytest.mark.parametrize("make_torchs", [False, True], ids=["trainops", "torch"])
def test_an_average_that_no_step_moves_is_named_once(use, make_torchs):
    model, optimizer = make()
    wrapper = Wrapper(torch.optim.AdamW(model.parameters()) if make_torchs else optimizer)
    wrapper.ema = ema = trainops.EMA(model)
    for _ in range(advice.WRITES_OF_TRAINING):
        wrapper.step()
    (message,) = said(lambda: use(ema))
    assert "never updated, but its model has been trained" in message
    assert "`AdamW(..., ema=ema)`" in message
    assert "wrapper" in message
    assert [said(lambda each=each: each(ema)) for each in USES.values()] == [[]] * len(USES)


def test_an_average_whose_optimizer_takes_no_step_is_named():
    model, optimizer = make()
    ema = trainops.EMA(model)
    idle = trainops.AdamW(model.parameters(), ema=ema)
    for _ in range(advice.WRITES_OF_TRAINING):
        optimizer.step()
    (message,) = said(lambda: swap(ema))
    assert "the AdamW that has it has taken no step" in message
    assert idle.ema is ema


def by_hand(ema):
    ema.update()


def swapped(ema):
    for _ in range(advice.WRITES_OF_TRAINING):
        swap(ema)


def copied_back(ema):
    for _ in range(advice.WRITES_OF_TRAINING):
        ema.copy_to(ema.model)


def prepared(ema):
    """What people do with a model before they train it."""
    ema.model.load_state_dict(nn.Linear(3, 2).state_dict())
    for p in ema.model.parameters():
        nn.init.trunc_normal_(p)
    ema.model.to(torch.bfloat16).to(torch.float32)


def loaded(ema):
    ema.load_state_dict(trainops.EMA(ema.model).state_dict())
    for p in ema.model.parameters():
        for _ in range(advice.WRITES_OF_TRAINING):
            p.detach().add_(1.0)


@over("before", {f.__name__: f for f in (by_hand, swapped, copied_back, prepared, loaded)})
@over("use", USES)
def test_averages_of_which_nothing_is_amiss_are_left_alone(use, before):
    ema = trainops.EMA(nn.Linear(3, 2))
    assert said(lambda: (before(ema), use(ema))) == []


def test_an_average_in_the_step_is_left_alone():
    model = with_gradients(nn.Linear(3, 2))
    ema = trainops.EMA(model)
    optimizer = trainops.AdamW(model.parameters(), ema=ema)
    assert said(lambda: ([optimizer.step() for _ in range(30)], swap(ema), ema.state_dict())) == []


def test_an_average_of_inference_tensors_is_made():
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    assert said(lambda: trainops.EMA(model).state_dict()) == []


# Averages that move while their models do not.


def train(ema, steps, updates, write=lambda p: p.detach().add_(0.1)):
    """Some updates after each step."""
    for _ in range(steps):
        for p in ema.model.parameters():
            if p.requires_grad:
                write(p)
        for _ in range(updates):
            ema.update()


@pytest.mark.parametrize("updates", [2, 8])
def test_updates_after_every_batch_of_a_step_are_named_once(updates):
    ema = trainops.EMA(nn.Linear(3, 2))
    (message,) = said(lambda: train(ema, 300 // updates, updates))
    assert "in half or more of 100 updates of this average, its model had the weights of the update before" in message
    assert "call ema.update() once after each optimizer.step()" in message
    assert said(lambda: train(ema, 300 // updates, updates)) == []


def test_updates_without_any_step_are_named():
    ema = trainops.EMA(nn.Linear(3, 2))
    train(ema, 200, 1)
    assert len(said(lambda: train(ema, 1, 3 * ema_advice.UPDATES_LOOKED_AT))) == 1


def without_a_version(p):
    p.data.add_(0.1)


def make_partly_unused():
    """A parameter that no step changes, beside one that every step does."""
    model = nn.Linear(3, 2)
    versions = iter(range(10**6))

    def write(p):
        if p is model.bias:
            p.detach().add_(next(versions))

    return model, write


def test_updates_after_steps_are_left_alone():
    for write in (without_a_version, lambda p: p.detach().add_(0.1)):
        ema = trainops.EMA(nn.Linear(3, 2))
        assert said(lambda ema=ema, write=write: train(ema, 350, 1, write)) == []
    model, write = make_partly_unused()
    assert said(lambda: train(trainops.EMA(model), 350, 1, write)) == []
    assert said(lambda: train(trainops.EMA(nn.Linear(3, 2).requires_grad_(False)), 350, 1)) == []
    fused = trainops.EMA(with_gradients(nn.Linear(3, 2)))
    optimizer = trainops.AdamW(fused.model.parameters(), ema=fused)
    assert said(lambda: [optimizer.step() for _ in range(350)]) == []
