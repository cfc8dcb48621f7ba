"""What PyTorch's own tests ask of an optimizer's arguments and steps: our class and PyTorch's do the same."""

from functools import partial

import pytest
import torch
from as_torchs import check, one_param, train
from targets import over
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

# Arguments. PyTorch's messages are ours.

PARAM = nn.Parameter(torch.ones(2))
BAD = {
    "beta": lambda cls: cls([PARAM], betas=(1.0, 0.0)),
    "decay": lambda cls: cls([PARAM], weight_decay=-1),
    "tensor_lr_and_foreach": lambda cls: cls([PARAM], lr=torch.tensor(0.1), foreach=True),
    "lr_of_two_elements": lambda cls: cls([PARAM], lr=torch.ones(2)),
    "tensor_betas_and_foreach": lambda cls: cls([PARAM], betas=(torch.tensor(0.9), torch.tensor(0.9)), foreach=True),
    "one_tensor_beta": lambda cls: cls([PARAM], betas=(0.9, torch.tensor(0.9))),
    "fused_and_foreach": lambda cls: cls([PARAM], fused=True, foreach=True),
    "fused_and_differentiable": lambda cls: cls([PARAM], fused=True, differentiable=True),
    "no_params": lambda cls: cls([]),
    "a_tensor": lambda cls: cls(PARAM),
    "no_tensors": lambda cls: cls([1, 2]),
    "a_set": lambda cls: cls([{"params": {PARAM}}]),
    "no_leaf": lambda cls: cls([PARAM * 2]),
    "some_named": lambda cls: cls([("a", PARAM), nn.Parameter(torch.ones(1))]),
    "in_two_groups": lambda cls: cls([{"params": [PARAM]}, {"params": [PARAM]}]),
    "added_twice": lambda cls: cls([PARAM]).add_param_group({"params": [PARAM]}),
    "twice_in_a_group": lambda cls: len(cls([PARAM, PARAM]).param_groups),  # a warning
    "groups_of_another_number": lambda cls: cls([PARAM]).load_state_dict({"state": {}, "param_groups": []}),
    "groups_of_another_size": lambda cls: cls([PARAM]).load_state_dict(train(cls)[1].state_dict()),
    "scheduler_that_resumes": lambda cls: lr_scheduler.StepLR(cls([PARAM]), 1, last_epoch=3),
}


@over("case", BAD)
def test_bad_arguments_raise_what_torchs_do(case):
    check(case)


def positional(cls):
    param, _ = one_param(cls)
    optimizer = cls([param], 0.1, (0.8, 0.9), 1e-6, 0.2, True)
    optimizer.step()
    return [param, optimizer.state_dict()]


def numbers_of_other_types(cls):
    param, optimizer = one_param(cls, lr=1, betas=[0, 0], eps=1, weight_decay=0)
    optimizer.step()
    return [param, optimizer.state_dict()]


def tensor_lr(cls, shape, make_scheduler):
    """The tensor stays the same one, whatever a scheduler does."""
    lr = torch.full(shape, 0.1)
    param, optimizer = one_param(cls, lr=lr)
    scheduler = make_scheduler(optimizer)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    return [param, optimizer.param_groups[0]["lr"] is lr, optimizer.state_dict()]


SCHEDULERS = {
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5),
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, base_momentum=0.8, step_size_up=2),
    "swa": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, 0.5),
}


@over("make_scheduler", SCHEDULERS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_learning_rate_in_a_tensor(shape, make_scheduler):
    check(partial(tensor_lr, shape=shape, make_scheduler=make_scheduler))


# Steps.


def without_gradients(cls):
    return train(cls, steps=0)[1].step()


def zero_gradients(cls):
    model, optimizer = train(cls, weight_decay=0.0, steps=0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return [list(model.parameters()), optimizer.state_dict()]


def steps_in_the_backward_pass(cls):
    params = [nn.Parameter(torch.full((2,), float(i))) for i in (1, 2)]
    optimizers = {p: cls([p], lr=0.1) for p in params}
    for p in params:
        p.register_post_accumulate_grad_hook(lambda p: (optimizers[p].step(), optimizers[p].zero_grad()))
    sum((p * p).sum() for p in params).backward()
    return [params, [p.grad for p in params]]


def closure_modes(cls):
    """A closure is run with gradients, wherever step() is called."""
    param, optimizer = one_param(cls)
    modes = []
    with torch.no_grad():
        result = optimizer.step(lambda: modes.append(torch.is_grad_enabled()) or 3.0)
    return [modes, result, torch.is_grad_enabled(), param]


def closure_that_raises(cls):
    one_param(cls)[1].step(lambda: {}["missing"])


def in_inference_mode(cls):
    param, optimizer = one_param(cls)
    with torch.inference_mode():
        optimizer.step()
    return [param, optimizer.state[param]["exp_avg"].is_inference()]


def with_other_defaults(cls):
    model, optimizer = train(cls, steps=0)
    with torch.device("meta"):
        return go_on_with_ones(model, optimizer)


def go_on_with_ones(model, optimizer):
    for p in model.parameters():
        p.grad = torch.ones(p.shape, dtype=p.dtype, device="cpu")
    optimizer.step()
    return [list(model.parameters()), optimizer.state_dict()]


def every_hook(cls):
    _, optimizer = one_param(cls)
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    return calls


def hook_that_replaces_the_closure(cls):
    _, optimizer = one_param(cls)
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, lambda: 2.0), {}))
    return [optimizer.step(lambda: 1.0), optimizer.step(closure=lambda: 1.0)]


def subclass(cls):
    class Counting(cls):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            return super().step(closure)

    param, optimizer = one_param(Counting)
    hooked = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    optimizer.step()
    return [param, optimizer.calls, hooked]


def name_in_profiles(cls):
    _, optimizer = one_param(cls)
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    return sorted(event.key for event in profile.key_averages() if event.key.startswith("Optimizer"))


def scheduler_too_early(cls):
    _, optimizer = one_param(cls)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    scheduler.step()
    optimizer.step()
    scheduler.step()


STEPS = [
    positional,
    numbers_of_other_types,
    without_gradients,
    zero_gradients,
    steps_in_the_backward_pass,
    closure_modes,
    closure_that_raises,
    in_inference_mode,
    with_other_defaults,
    every_hook,
    hook_that_replaces_the_closure,
    subclass,
    name_in_profiles,
    scheduler_too_early,
]


@over("case", {case.__name__: case for case in STEPS})
def test_steps_are_torchs(case):
    check(case)
