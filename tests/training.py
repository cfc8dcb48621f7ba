"""Models of parameters alone, gradients for them, and steps of an optimizer that are held to the contract."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from contract import assert_contract, exact
from exact import adam_step, adamw_step, clip_coefficient, ema, norm, sgd_step, trained

import trainops

# Of AdamW.
OPTIONS = {
    "plain": {},
    "no_decay": {"weight_decay": 0.0},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "amsgrad_maximize": {"amsgrad": True, "maximize": True},
    "low_betas": {"betas": (0.3, 0.4), "eps": 1e-4, "weight_decay": 0.3},
    "zero_betas": {"betas": (0.0, 0.0), "eps": 1e-3},
}

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
OF_ADAM = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
OF_SGD = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


class Rule(NamedTuple):
    """An optimizer: our class, PyTorch's, the step in extended precision, and the names that this takes."""

    ours: type
    torchs: type
    step: Callable
    states: tuple[str, ...]
    settings: tuple[str, ...]


ADAMW = Rule(trainops.AdamW, torch.optim.AdamW, adamw_step, MOMENTS, OF_ADAM)
ADAM = Rule(trainops.Adam, torch.optim.Adam, adam_step, MOMENTS, OF_ADAM)
SGD = Rule(trainops.SGD, torch.optim.SGD, sgd_step, ("momentum_buffer",), OF_SGD)
RULES = (ADAMW, ADAM, SGD)


class Model(torch.nn.Module):
    """Parameters and nothing else."""

    def __init__(self, tensors):
        super().__init__()
        self.params = torch.nn.ParameterList(torch.nn.Parameter(x) for x in tensors)


def at_offset(x, offset):
    """A copy of ``x`` that begins so many elements into aligned memory."""
    return torch.cat((x.new_zeros(offset), x.flatten()))[offset:].view(x.shape)


def randn(shape, dtype, device):
    return torch.randn(shape, dtype=torch.float64, device=device).to(dtype)


def with_grads(grads):
    """Parameters that have these very gradients."""
    params = [torch.nn.Parameter(torch.zeros(g.shape, dtype=g.dtype, device=g.device)) for g in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def make_model(shapes, dtype, device):
    return Model([torch.randn(shape, device=device).to(dtype) for shape in shapes])


def twins(shapes, dtype, device):
    ours, torchs = make_model(shapes, dtype, device), make_model(shapes, dtype, device)
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs


def make_grads(shapes, dtype, device, steps):
    """Gradients that grow and shrink, so that clipping and AMSGrad have something to do."""
    scales = [1.0 + 0.9 * np.sin(i) for i in range(steps)]
    return [[(scale * torch.randn(shape, device=device)).to(dtype) for shape in shapes] for scale in scales]


def set_grads(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()


def run(optimizer, params, grads, after=lambda: None):
    for step_grads in grads:
        set_grads(params, step_grads)
        optimizer.step()
        after()


def snapshot(model, optimizer, ema):
    """Everything that a skipped step must leave as it was."""
    states = [optimizer.state[p] for p in model.params]
    every = [*model.params, *(value for state in states for value in state.values()), *ema.module.params]
    return [x.detach().clone() for x in every]


@functools.cache
def problem(shapes, dtype, steps):
    """The same parameters and gradients for every backend."""
    generator = torch.Generator().manual_seed(len(shapes) + steps)
    scales = [1.0 + 0.9 * np.sin(i) for i in range(steps)]
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return params, [[(s * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes] for s in scales]


@functools.cache
def solution(shapes, dtype, steps, max_norm, options, rule):
    """What the problem comes to exactly, and with PyTorch's implementation: parameters and states."""
    params, grads = problem(shapes, dtype, steps)
    model = Model([x.clone() for x in params])
    optimizer = rule.torchs(model.parameters(), foreach=False, **dict(options))
    for step_grads in grads:
        set_grads(model.params, step_grads)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    torchs = [{"param": p.detach(), **optimizer.state[p]} for p in model.params]
    return trained(rule.step, rule.states, params, grads, max_norm, **dict(options)), torchs


def check_steps(target, dtype, shapes, options, steps=1, max_norm=None, rule=ADAMW):
    """Hold steps of an optimizer to the contract: in 16 bits each by itself, else all together."""
    shapes = tuple(shapes)
    params, grads = problem(shapes, dtype, steps)
    model = Model([x.to(target.device, copy=True) for x in params])
    optimizer = rule.ours(model.parameters(), max_grad_norm=max_norm, backend=target.backend, **options)
    grads = [[grad.to(target.device) for grad in step_grads] for step_grads in grads]
    if dtype in (torch.float32, torch.float64):
        run(optimizer, model.params, grads)
        true, torchs = solution(shapes, dtype, steps, max_norm, tuple(options.items()), rule)
        for i, p in enumerate(model.params):
            ours = {"param": p.detach(), **optimizer.state[p]}
            for name, result in true[i].items():
                assert_contract(ours[name], result, torchs[i][name], f"{name} {i}")
    else:
        for step_grads in grads:
            set_grads(model.params, step_grads)
            check_one_step(optimizer)
    assert all(optimizer.state[p]["step"] == steps for p in model.params)
    return optimizer


def check_one_step(optimizer):
    """Take a step; hold all that it writes to the contract, from what was stored before it."""
    rule = next(rule for rule in RULES if type(optimizer) is rule.ours)
    rows = [(group, p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    averages = {}
    if optimizer.ema is not None:
        averages = dict(zip(optimizer.ema.model.parameters(), optimizer.ema.module.parameters(), strict=True))
        decay = optimizer.ema.decay_at(optimizer.ema.step + 1)
    grads = [exact(p.grad) for _, p in rows]
    coefficient = clip_coefficient(norm(grads), optimizer.max_grad_norm)
    stored = []
    for _, p in rows:
        state = optimizer.state.get(p) or {}
        zeros = np.zeros(p.shape, np.longdouble)
        moments = [exact(state[name]) if name in state else zeros for name in rule.states]
        average = exact(averages[p]) if p in averages else None
        stored.append((exact(p), moments, int(state.get("step", 0)) + 1, average))
    optimizer.step()
    for i, ((group, p), grad, (param, moments, step, average)) in enumerate(zip(rows, grads, stored, strict=True)):
        settings = {name: group[name] for name in rule.settings}
        results = rule.step(param, grad, *moments, step, coefficient=coefficient, **settings)
        ours = {"param": p, **optimizer.state[p]}
        for name, result in results.items():
            assert_contract(ours[name], result, what=f"{name} {i}, step {step}")
        if average is not None:
            moved = ema(average, exact(p), decay)  # towards the weight as it is stored
            assert_contract(averages[p], moved, what=f"average {i}, step {step}")
