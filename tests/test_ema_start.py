"""How an average starts: it copies, continues or resumes; what others load in between; learning rate finders."""

import copy

import pytest
import torch
from contract import same_bits
from models import over_copies, same_tensors, snapshot, tensors_of, wander
from said import said
from targets import over
from torch import nn

import trainops


def fresh(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def make(**options):
    return trainops.EMA(fresh(0), options.pop("decay", 0.75), **options)


def other_state():
    return fresh(1).state_dict()


def assign(module, state):
    module.load_state_dict(copy.deepcopy(state), assign=True)


def by_hand(module, state):
    with torch.no_grad():
        for name, x in tensors_of(module).items():
            x.copy_(state[name])


LOADS = {"load_state_dict": nn.Module.load_state_dict, "assign": assign, "by_hand": by_hand}
over_loads = over("load", LOADS)


def by_step(ema):
    """A step of an optimizer, within which the average moves."""
    optimizer = trainops.AdamW(ema.model.parameters(), 0.1, ema=ema)
    for p in ema.model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    ema.detach()


def by_update(ema):
    for p in ema.model.parameters():
        p.detach().add_(0.1)
    ema.update()


over_moves = over("move", {"step": by_step, "update": by_update})


# Weights that are loaded into the model after the average was made.


@over_loads
def test_weights_loaded_into_the_model_are_in_the_average(load):
    for use in ("swap", "copy_to", "state_dict", "call"):
        ema, state = make(), other_state()
        load(ema.model, state)
        if use == "swap":
            with ema.swap():
                assert same_tensors(ema.model, state)
        elif use == "copy_to":
            other = fresh(2)
            ema.copy_to(other)
            assert same_tensors(other, state)
        elif use == "state_dict":
            assert same_tensors(ema.state_dict()["module"], dict(state))
        else:
            x = torch.randn(5, 3)
            assert same_bits(ema(x), fresh(1).eval()(x))
        assert same_tensors(ema.module, state)


@over_loads
@over_moves
def test_the_first_update_copies(load, move):
    ema = make()
    load(ema.model, other_state())
    move(ema)
    assert same_tensors(ema.module, ema.model)
    move(ema)
    assert not same_tensors(ema.module, ema.model)


def test_all_updates_of_the_beginning_copy():
    ema = make(update_after_step=2)
    for _ in range(3):
        by_update(ema)
        assert same_tensors(ema.module, ema.model)
    by_update(ema)
    assert not same_tensors(ema.module, ema.model)


def test_an_average_that_has_moved_keeps_its_own_weights():
    ema = make()
    by_update(ema)
    average = snapshot(ema.module)
    ema.model.load_state_dict(other_state())
    with ema.swap():
        assert same_tensors(ema.model, average)
    assert same_tensors(ema.state_dict()["module"], average)


def test_an_average_without_its_model_is_saved_all_the_same():
    ema = make()
    before = snapshot(ema.module)
    ema.model[0].weight = nn.Parameter(torch.ones(7, 7))
    assert same_tensors(ema.state_dict()["module"], before)


# Weights that are loaded into the average.


def check_continues(ema, move):
    before, decay = snapshot(ema.module), ema.decay
    move(ema)
    expected = {
        name: x.lerp(tensors_of(ema.model)[name], 1 - decay) for name, x in before.items() if x.is_floating_point()
    }
    for name, x in expected.items():
        torch.testing.assert_close(tensors_of(ema.module)[name].detach(), x.detach())


@over_loads
@over_moves
@pytest.mark.parametrize("options", [{}, {"update_after_step": 3}, {"update_every": 2}], ids=str)
def test_weights_loaded_into_the_average_are_continued(load, move, options):
    ema, state = make(**options), other_state()
    load(ema.module, state)
    with ema.swap():
        assert same_tensors(ema.model, state)
    if options.get("update_every"):
        ema.update()
        assert same_tensors(ema.module, state)
    check_continues(ema, move)
    if not options.get("update_every"):
        check_continues(ema, move)


@over_copies
def test_a_copy_continues_as_well(copied):
    ema = make()
    ema.module.load_state_dict(other_state())
    check_continues(copied(ema), by_update)
    twin = copied(make())
    twin.module.load_state_dict(other_state())
    check_continues(twin, by_update)
    twin = copied(make())
    by_update(twin)
    assert same_tensors(twin.module, twin.model)


@pytest.mark.parametrize(
    "options", [{"warmup": True}, {"decay": trainops.DiffusersDecay()}], ids=["warmup", "function"]
)
def test_a_decay_that_depends_on_the_step_asks_for_it(options):
    ema, state = make(**options), other_state()
    ema.module.load_state_dict(state)
    before = snapshot(ema.model)
    for p in ema.model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = trainops.AdamW(ema.model.parameters(), ema=ema)
    with pytest.raises(
        RuntimeError, match=r"weights were loaded into ema.module, .* set ema.step .*, or call ema.reset"
    ):
        optimizer.step()
    assert same_tensors(ema.model, before)
    assert same_tensors(ema.module, state)
    ema.step = 1000
    optimizer.step()
    assert ema.step == 1001
    assert not same_tensors(ema.module, ema.model)
    ema.reset()
    optimizer.step()
    assert same_tensors(ema.module, ema.model)


UNTOUCHED = {
    "to": lambda ema: ema.module.to(torch.float64).to(torch.float32),
    "train": lambda ema: (ema.module.train()(torch.randn(5, 3)), ema.module.eval()),
}


@over("touch", UNTOUCHED)
def test_what_writes_no_weights_is_no_loading(touch):
    ema = make()
    touch(ema)
    by_update(ema)
    assert same_tensors(ema.module, ema.model)


def test_a_swap_before_the_first_update_is_no_loading():
    ema = make()
    for _ in range(3):
        wander(ema.model.parameters())
        with ema.swap():
            pass
    by_update(ema)
    assert same_tensors(ema.module, ema.model)


def test_a_state_of_no_updates_is_that_of_a_new_average():
    ema, other = make(), make()
    other.model.load_state_dict(other_state())
    ema.load_state_dict(other.state_dict())
    by_update(ema)
    assert same_tensors(ema.module, ema.model)


def test_reset_begins_anew():
    ema = make()
    for _ in range(3):
        by_update(ema)
    ema.reset()
    assert ema.step == 0
    assert same_tensors(ema.module, ema.model)
    by_update(ema)
    assert same_tensors(ema.module, ema.model)
    ema.model[0].weight = nn.Parameter(torch.ones(7, 7))
    with pytest.raises(ValueError, match="shape"):
        ema.reset()
    assert ema.step == 1


# Learning rate finders.


def find(model, optimizer, steps=30, order=("model", "optimizer")):
    """What torch-lr-finder and Lightning do: steps at growing learning rates, from a state that they then load."""
    states = {"model": copy.deepcopy(model.state_dict()), "optimizer": copy.deepcopy(optimizer.state_dict())}
    for step in range(steps):
        train(model, optimizer, lr=1e-5 * 1.3**step)
    for name in order:
        {"model": model, "optimizer": optimizer}[name].load_state_dict(states[name])


def train(model, optimizer, lr=0.01):
    for group in optimizer.param_groups:
        group["lr"] = lr
    for p in model.parameters():
        p.grad = p.detach().sign()
    optimizer.step()


@pytest.mark.parametrize(
    "order", [("model", "optimizer"), ("optimizer", "model")], ids=["model_first", "optimizer_first"]
)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_finder_leaves_no_trace_in_the_average(order, clip):
    averages = []
    for finds in (False, True):
        ema = make(decay=0.99)
        optimizer = trainops.AdamW(ema.model.parameters(), ema=ema, max_grad_norm=clip)
        if finds:
            find(ema.model, optimizer, order=order)
        for _ in range(5):
            train(ema.model, optimizer)
        averages.append((snapshot(ema.module), ema.step))
    assert averages[0][1] == averages[1][1] == 5
    assert same_tensors(averages[1][0], averages[0][0])


def test_between_the_finder_and_the_training_the_average_is_the_model():
    ema = make(decay=0.99)
    before = snapshot(ema.model)
    optimizer = trainops.AdamW(ema.model.parameters(), ema=ema)
    find(ema.model, optimizer)
    with ema.swap():
        assert same_tensors(ema.model, before)
    assert ema.state_dict()["step"] == 0


def test_a_finder_within_a_training_is_told_once():
    ema = make(decay=0.99)
    optimizer = trainops.AdamW(ema.model.parameters(), ema=ema)
    for _ in range(3):
        train(ema.model, optimizer)
    find(ema.model, optimizer)
    (message,) = said(lambda: train(ema.model, optimizer))
    assert "have loaded another state, but their average has not, and keeps its last 33 updates" in message
    assert said(lambda: (find(ema.model, optimizer), train(ema.model, optimizer))) == []
    assert ema.step > 60


def resumed(ema, optimizer):
    states = [copy.deepcopy(x.state_dict()) for x in (ema.model, optimizer, ema)]
    train(ema.model, optimizer)
    for x, state in zip((ema.model, optimizer, ema), states, strict=True):
        x.load_state_dict(state)


def reloaded(ema, optimizer):
    """What Accelerate does when it wraps an optimizer."""
    optimizer.load_state_dict(optimizer.state_dict())


def new_optimizer_state(ema, optimizer):
    """The moments are thrown away, the weights are not: the average goes on."""
    optimizer.load_state_dict(trainops.AdamW(ema.model.parameters()).state_dict())


@over("load", {f.__name__: f for f in (resumed, reloaded, new_optimizer_state)})
def test_other_loads_leave_the_average_alone(load):
    ema = make(decay=0.99)
    optimizer = trainops.AdamW(ema.model.parameters(), ema=ema)
    for _ in range(3):
        train(ema.model, optimizer)
    average = snapshot(ema.module)
    assert said(lambda: load(ema, optimizer)) == []
    assert same_tensors(ema.module, average)
    assert said(lambda: (train(ema.model, optimizer), ema.state_dict())) == []
    assert ema.step == 4


# Two optimizers and one average.


def test_two_optimizers_move_an_average_once_a_round():
    """By the one that steps last: the same as an update after both."""
    averages = []
    for fused in (False, True):
        ema = make(decay=0.9)
        named = list(ema.model.parameters())
        first = trainops.AdamW(named[:3], 0.01)
        second = trainops.AdamW(named[3:], 0.01, ema=ema if fused else None)
        for _ in range(4):
            for p in named:
                p.grad = p.detach().sign()
            first.step()
            second.step()
            if not fused:
                ema.update()
        averages.append(snapshot(ema.module))
        assert ema.step == 4
    assert same_tensors(*averages)
