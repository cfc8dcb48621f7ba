"""A loss scale is taken out of everything that a step makes of its gradients, and of the norms that it reports."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from contract import same_bits
from controls import STEP_CONTROLS, kernels, must_fail
from targets import INTERPRETER, REFERENCE, thorough
from training import make_grads, make_model, set_grads, snapshot

import trainops

SHAPES = ((33, 31), (), (0,), (9001,))
SCALE = 1024.0  # a power of two, which no rounding knows of

# What a step does with the norm.
OPTIONS = {
    "plain": {},
    "clip": {"max_grad_norm": 0.5},
    "skip": {"skip_nonfinite": True},
    "clip_and_skip": {"max_grad_norm": 0.5, "skip_nonfinite": True},
}


def check_scale(target, options, scale):
    """A step with a scale has the bits of one without, on gradients that are so much smaller."""
    results = []
    (grads,) = make_grads(SHAPES, torch.float32, target.device, 1)
    for factor in (1.0, SCALE):
        torch.manual_seed(0)
        model = make_model(SHAPES, torch.float32, target.device)
        ema = trainops.EMA(model, 0.9, update_after_step=-2, backend=target.backend)
        optimizer = trainops.AdamW(model.parameters(), lr=0.1, ema=ema, backend=target.backend, **options)
        before = [p.detach().clone() for p in model.params]
        set_grads(model.params, [factor * grad for grad in grads])
        if factor != 1.0:
            optimizer.grad_scale, optimizer.found_inf = scale, torch.zeros_like(scale)
        optimizer.step()
        assert not any(map(same_bits, model.params[:2], before))
        measured = [optimizer.grad_norm, optimizer.grad_norms] if options else []
        results.append([*measured, *snapshot(model, optimizer, ema)])
        assert optimizer.skipped_steps == 0
    assert all(map(same_bits, *results))


@thorough(lambda target, kind, shape, **_: target == INTERPRETER and (kind == torch.float64) != (shape == (1,)))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-element"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_a_grad_scale_is_taken_out(target, options, kind, shape):
    check_scale(target, options, torch.full(shape, SCALE, dtype=kind, device=target.device))


# Controls: what the check must notice.


def with_control(change):
    """A fault: a step is told something else of the scale."""

    def update(rule, groups, control, *args, right=kernels.update):
        return right(rule, groups, change(control), *args)

    return mock.patch.object(kernels, "update", update)


def of_results(change):
    """A fault: a step reports other norms."""

    def update(rule, groups, control, *args, right=kernels.update):
        result = right(rule, groups, control, *args)
        return result if control.grad_scale is None else change(result)

    return mock.patch.object(kernels, "update", update)


def times(result, name):
    norm = getattr(result, name)
    return result._replace(**{name: None if norm is None else SCALE * norm})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_wrong_scale_is_noticed(options):
    scale = torch.tensor(SCALE)
    check_scale(REFERENCE, options, scale)

    def ignored():
        return with_control(lambda control: replace(control, grad_scale=None))

    def squared():
        return with_control(lambda control: replace(control, grad_scale=control.grad_scale and scale * scale))

    for fault in (STEP_CONTROLS["nothing"], ignored, squared):
        must_fail(fault, check_scale, REFERENCE, options, scale)
    if options:
        for name in ("total_norm", "norms"):
            must_fail(lambda name=name: of_results(lambda x: times(x, name)), check_scale, REFERENCE, options, scale)
