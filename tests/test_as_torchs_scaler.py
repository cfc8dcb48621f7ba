"""What PyTorch's own tests ask of a GradScaler: loops with our class and with PyTorch's do the same.

``test_grad_scaler.py`` has who unscales.
"""

import copy
from functools import partial

import pytest
import torch
from as_torchs import check
from targets import over
from torch import nn

import trainops

PLAIN = {
    "default": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "amsgrad": {"fused": True, "amsgrad": True},
    "tensor_lr": {"lr": torch.tensor(0.1)},
}
OURS = {
    "skip": {"skip_nonfinite": True},
    "clip": {"max_grad_norm": 1e9},
    "skip_and_clip": {"skip_nonfinite": True, "max_grad_norm": 1e9},
    "fused_and_skip": {"fused": True, "skip_nonfinite": True},
}


def unscale_and_clip(scaler, optimizer, params):
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(params, 0.05)


def unscale_twice(scaler, optimizer, params):
    scaler.unscale_(optimizer)
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        return str(error)


def replace_gradients(scaler, optimizer, params):
    scaler.unscale_(optimizer)
    for p in params:
        p.grad = p.grad.clone()


def change_the_learning_rate(scaler, optimizer, params):
    optimizer.param_groups[0]["lr"] *= 0.5


def penalise(scaler, loss, params):
    """A loss that has the norm of its own gradient in it."""
    grads = torch.autograd.grad(scaler.scale(loss), params, create_graph=True)
    return loss + sum((g / scaler.get_scale()).square().sum() for g in grads).sqrt()


def train(cls, options, before_step=lambda *_: None, loss=lambda scaler, loss, params: loss, every=1, written=True):
    """Four batches, of which the third overflows; with ``written``, the gradients that are left behind count, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    params = list(model.parameters())
    own = ("skip_nonfinite", "max_grad_norm") if cls is torch.optim.AdamW else ()
    options = {name: value for name, value in copy.deepcopy(options).items() if name not in own}
    optimizer = cls(params, **{"lr": 0.1} | options)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=1)
    log = []
    for i in range(4 * every):
        batch, target = torch.randn(8, 8), torch.randn(8, 8)
        error = nn.functional.mse_loss(model(batch), target)
        scaler.scale(loss(scaler, error, params) / every).backward()
        if (i + 1) % every:
            continue
        if i // every == 2:
            params[2].grad.fill_(float("inf"))
        log += [before_step(scaler, optimizer, params), scaler.step(optimizer)]
        scaler.update()
        log.append(scaler.get_scale())
        grads = [p.grad.clone() for p in params if i // every != 2 and written]
        optimizer.zero_grad()
        log.append(grads)
    return [log, params, optimizer.state_dict()["state"], hasattr(optimizer, "grad_scale"), scaler.state_dict()]


LOOPS = {
    "plain": {},
    "unscale_and_clip": {"before_step": unscale_and_clip},
    "unscale_twice": {"before_step": unscale_twice},
    "replaced_gradients": {"before_step": replace_gradients},
    "learning_rate": {"before_step": change_the_learning_rate},
    "penalty": {"loss": penalise},
    "accumulation": {"every": 2},
}


@over("loop", LOOPS)
@over("options", PLAIN)
def test_training_under_a_scaler(options, loop):
    check(partial(train, options=options, **loop))


@over("loop", LOOPS)
@over("options", OURS)
def test_parameters_and_scales_under_a_scaler_with_settings_of_ours(options, loop):
    """Ours do not write the gradients; everything else is the training with PyTorch's class."""
    check(partial(train, options=options, written=False, **loop))


def two_optimizers(cls):
    """Of which one is unscaled by hand, and the other overflows."""
    torch.manual_seed(0)
    models = [nn.Linear(4, 4) for _ in range(2)]
    optimizers = [cls(models[0].parameters(), lr=0.1), cls(models[1].parameters(), lr=0.2, fused=True)]
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=1)
    for i in range(3):
        x = torch.randn(5, 4)
        scaler.scale((models[0](x) * models[1](x)).sum()).backward()
        if i == 1:
            models[1].weight.grad.fill_(float("inf"))
        scaler.unscale_(optimizers[0])
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
    return [[list(model.parameters()) for model in models], scaler.state_dict()]


def one_step(cls, grad, enabled=True, steps=1, closure=None, **options):
    param = nn.Parameter(torch.ones(2, 2, dtype=torch.float32 if grad is None else grad.dtype))
    param.grad = grad
    optimizer = cls([param], **options)
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    scaler.scale(torch.ones(()))
    for _ in range(steps):
        scaler.step(optimizer, **({} if closure is None else {"closure": closure}))
    return param


STEPS = {
    "disabled": {"grad": torch.ones(2, 2), "enabled": False},
    "no_gradient": {"grad": None},
    "no_gradient_fused": {"grad": None, "fused": True},
    "float16": {"grad": torch.ones(2, 2).half()},
    "step_twice": {"grad": torch.ones(2, 2), "steps": 2},
    "step_twice_fused": {"grad": torch.ones(2, 2), "steps": 2, "fused": True},
    "closure": {"grad": torch.ones(2, 2), "closure": lambda: 1.0, "fused": True},
}


@over("arguments", STEPS)
def test_one_step_under_a_scaler(arguments):
    grad = arguments["grad"]
    check(lambda cls: one_step(cls, **arguments | {"grad": None if grad is None else grad.clone()}))


def test_two_optimizers_under_one_scaler():
    check(two_optimizers)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["default", "fused"])
def test_the_scaler_hands_its_scale_to_a_fused_step_of_a_subclass(options):
    def seen(cls):
        class Looking(cls):
            def step(self, closure=None):
                self.seen = [getattr(self, "grad_scale", "none"), getattr(self, "found_inf", "none")]

        model = nn.Linear(2, 2)
        optimizer = Looking(model.parameters(), **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.step(optimizer)
        return optimizer.seen

    check(seen)
    assert trainops.AdamW([nn.Parameter(torch.ones(1))], **options)._step_supports_amp_scaling == bool(options)
