"""The average in the optimizer's step: the bits of a step followed by an update."""

import copy

import pytest
import torch
from contract import same_bits
from models import (
    CHANGES,
    SOME_CHANGES,
    Single,
    Tied,
    make_net,
    moved,
    over_averages,
    over_copies,
    over_layouts,
    over_two_averages,
    same_tensors,
    snapshot,
    wander,
)
from targets import REFERENCE, interpreted, over
from torch import nn
from training import randn

import trainops

INF, NAN = float("inf"), float("nan")


def train(target, make, steps, *, fused, change=None, shadow=None, gradless=(), options=None, **schedule):
    """Train with the average in the optimizer's step, or after it."""
    torch.manual_seed(1)
    model = make()
    ema = trainops.EMA(model, 0.9, dtype=shadow, backend=target.backend, **schedule)
    if change is not None:
        ema.update()
        change(model)
    named = dict(model.named_parameters()) | {"stranger": nn.Parameter(torch.randn(9, device=target.device))}
    inside = [p for name, p in named.items() if name != "elsewhere"]
    groups = [{"params": inside[::2]}, {"params": inside[1::2], "lr": 0.1, "weight_decay": 0.0}]
    optimizer = trainops.AdamW(groups, 0.05, ema=ema if fused else None, backend=target.backend, **options or {})
    for step in range(steps):
        wander([*model.buffers(), *(p for name, p in named.items() if name == "elsewhere")])
        for i, (name, p) in enumerate(named.items()):
            has_grad = p.requires_grad and name != "unused" and (step, i) not in gradless
            p.grad = torch.randn_like(p) if has_grad else None
        optimizer.step()
        if not fused:
            ema.update()
    return ema


def check_fused(target, make, steps=3, **arguments):
    ema, fused = (train(target, make, steps, fused=fused, **arguments) for fused in (False, True))
    torch.manual_seed(1)
    for name, start in make().named_parameters():
        own, average = fused.model.get_parameter(name), fused.module.get_parameter(name)
        if own.requires_grad and own.numel() > 0 and name != "unused":
            assert not same_bits(own, start), f"{name} has not moved"
            assert not same_bits(average, start), f"the average of {name} has not moved"
    assert same_tensors(fused.model, ema.model)
    assert same_tensors(fused.module, ema.module)
    assert fused.step == ema.step


STEPS = {
    "plain": {},
    "clipped": {"options": {"max_grad_norm": 0.5}},
    "skipping": {"options": {"max_grad_norm": 0.5, "skip_nonfinite": True}},
    "amsgrad": {"options": {"amsgrad": True, "maximize": True}},
    "warmup": {"warmup": True, "update_after_step": 1},
    "every_second": {"update_every": 2, "average_buffers": False},
    "missing_gradients": {"gradless": [(0, 0), (0, 5), (1, 1), *((2, i) for i in range(20)), (3, 6)]},
}


def test_one_update_a_step(target):
    ema = moved(make_net(device=target.device), target)
    params = list(ema.model.parameters())
    optimizer = trainops.AdamW(params[::2], ema=ema, backend=target.backend)
    assert ema.optimizer is optimizer
    optimizer.step()
    before = snapshot(ema.module)
    with pytest.raises(RuntimeError, match=r"leave out ema\.update"):
        ema.update()
    assert same_tensors(ema.module, before)
    ema.detach()
    assert optimizer.ema is None
    ema.update()
    assert ema.step == 5


def test_an_average_has_the_optimizer_that_it_was_given_to_last(target):
    ema = moved(make_net(device=target.device), target)
    params = list(ema.model.parameters())
    first = trainops.AdamW(params[::2], ema=ema, backend=target.backend)
    second = trainops.AdamW(params[1::2], ema=ema, backend=target.backend)
    assert (first.ema, second.ema, ema.optimizer) == (None, ema, second)
    with pytest.warns(UserWarning, match="given to another optimizer"):
        first.step()
    second.step()
    first.step()
    second.step()
    assert ema.step == 5
    first.ema = ema
    assert (first.ema, second.ema, ema.optimizer) == (ema, None, first)
    first.ema = trainops.EMA(ema.model)
    assert ema.optimizer is None
    ema.update()


@over_copies
def test_a_copy_made_within_swap_is_not_swapped(copied):
    ema = moved(make_net(), REFERENCE)
    before, average = snapshot(ema.model), snapshot(ema.module)
    with ema.swap():
        twin, model = copied((ema, ema.model))
        copy_of_model = copied(ema.model)
        assert same_tensors(ema.model, average)
    assert same_tensors(ema.model, before)
    assert model is twin.model
    assert same_tensors(twin.model, before)
    assert same_tensors(twin.module, average)
    assert same_tensors(copy_of_model, average)
    twin.update()
    with twin.swap():
        pass


def test_a_shallow_copy_made_within_swap_leaves_the_model_swapped():
    ema = moved(make_net(), REFERENCE)
    before, average = snapshot(ema.model), snapshot(ema.module)
    with ema.swap():
        twin = copy.copy(ema)
        assert twin.model is ema.model
        assert same_tensors(ema.model, average)
    assert same_tensors(ema.model, before)
    with twin.swap():
        pass
    assert same_tensors(ema.model, before)


@over_copies
def test_a_copy_within_swap_of_a_model_that_holds_its_average(copied):
    model = make_net()
    model.average = ema = moved(model, REFERENCE)
    before = snapshot(model)
    with ema.swap():
        twin = copied(model)
    assert twin.average.model is twin
    assert same_tensors(twin, before)


def test_a_step_that_raises_takes_nothing_over():
    ema = moved(make_net(), REFERENCE)
    params = list(ema.model.parameters())
    optimizer = trainops.AdamW(params, ema=ema)
    params[0].grad = torch.ones_like(params[0]).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    params[0].grad = None
    optimizer.step()
    assert ema.step == 4


def test_an_optimizer_that_is_gone_holds_nothing():
    ema = moved(make_net(), REFERENCE)
    optimizer = trainops.AdamW(ema.model.parameters(), ema=ema)
    optimizer.step()
    del optimizer
    ema.update()
    optimizer = trainops.AdamW(ema.model.parameters(), ema=ema)
    optimizer.itself = optimizer  # kept alive by nothing else
    del optimizer
    ema.detach()
    ema.update()


def test_a_shallow_copy_does_not_take_the_average_away():
    ema = moved(make_net(), REFERENCE)
    optimizer = trainops.AdamW(ema.model.parameters(), ema=ema)
    twin = copy.copy(optimizer)
    assert ema.optimizer is optimizer
    with pytest.raises(RuntimeError, match="another optimizer has this average"):
        twin.step()
    twin.ema = ema
    assert optimizer.ema is None
    twin.step()


@over_copies
def test_a_copy_is_held_by_its_own_optimizer(copied):
    ema = moved(make_net(), REFERENCE)
    optimizer = trainops.AdamW(ema.model.parameters(), ema=ema)
    optimizer.step()
    copied(ema).update()
    twin, twin_optimizer = copied((ema, optimizer))
    twin_optimizer.step()
    with pytest.raises(RuntimeError, match=r"leave out ema\.update"):
        twin.update()


@interpreted(
    lambda arguments, dtype, shadow: (
        arguments is STEPS["clipped"] or (dtype == torch.float32 and "gradless" in arguments)
    )
)
@over("arguments", STEPS)
@over_averages
def test_fused_is_step_then_update(target, dtype, shadow, arguments):
    check_fused(target, lambda: make_net(dtype, target.device), 4, shadow=shadow, **arguments)


@interpreted(lambda change: change in SOME_CHANGES)
@over("change", CHANGES)
def test_fused_follows_changes(target, change):
    check_fused(target, lambda: make_net(device=target.device), change=change)


@interpreted(lambda shadow, **_: shadow is None)
@over_layouts
@over_two_averages
def test_fused_takes_any_layout(target, dtype, shadow, layout):
    check_fused(target, lambda: Single(layout(randn((6, 7, 8, 9), dtype, target.device))), shadow=shadow)


def test_fused_takes_tied_and_complex(target):
    check_fused(target, lambda: Tied().to(target.device))
    check_fused(target, lambda: Single(torch.randn(33, 31, dtype=torch.complex64, device=target.device)))


SKIPS = {
    "nan": ({"skip_nonfinite": True}, NAN, None),
    "inf": ({"skip_nonfinite": True, "max_grad_norm": 0.5}, INF, None),
    "found_inf": ({}, 1.0, 1.0),  # as a GradScaler tells
}


@interpreted(lambda dtype, shadow, **_: dtype == torch.float32 or shadow == torch.float32)
@over(("options", "value", "found_inf"), SKIPS)
@over_averages
def test_a_skipped_step_is_silent(target, dtype, shadow, options, value, found_inf):
    model = make_net(dtype, target.device)
    ema = moved(model, target, shadow)
    inside = [p for p in model.parameters() if p is not model.elsewhere]
    optimizer = trainops.AdamW(inside, ema=ema, backend=target.backend, **options)
    for skipped in (False, True, False):
        wander([*model.buffers(), model.elsewhere])
        for p in inside:
            p.grad = torch.randn_like(p) if p.requires_grad else None
        if skipped:
            model.scale.grad.fill_(value)
        if found_inf is not None:
            optimizer.grad_scale = torch.ones((), device=target.device)
            optimizer.found_inf = torch.full((), found_inf if skipped else 0.0, device=target.device)
        before, average_before = snapshot(model), snapshot(ema.module)
        optimizer.step()
        assert same_tensors(model, before) == skipped
        assert same_tensors(ema.module, average_before) == skipped
    assert optimizer.skipped_steps == 1
    assert ema.step == 6


@interpreted(lambda dtype, **_: dtype == torch.float32)
@pytest.mark.parametrize("fused", [False, True], ids=["update", "step"])
@over_averages
def test_autograd_notices_a_moved_average(target, dtype, shadow, fused):
    model = make_net(dtype, target.device)
    ema = moved(model, target, shadow)
    optimizer = trainops.AdamW(model.parameters(), ema=ema if fused else None, backend=target.backend)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        weight = ema.module.linear.weight
        output = (weight * torch.randn_like(weight, requires_grad=True)).sum()
        optimizer.step() if fused else ema.update()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()


def test_subclasses_do_their_own_arithmetic():
    calls = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    average = torch.zeros(3).as_subclass(Logged)
    trainops.ema_update_([average], [torch.ones(3)], 0.5)
    assert "lerp" in calls
    assert average.tolist() == [0.5] * 3
