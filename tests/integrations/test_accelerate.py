"""Accelerate: what a script needs nothing for, and skipped steps that only the optimizer knows of."""

import pytest
import torch
from torch import nn

import trainops
from trainops.integrations import unwrap

accelerate = pytest.importorskip("accelerate")
skips = pytest.importorskip("trainops.integrations.accelerate")

PLAIN = [{}, {"foreach": True}, {"fused": False}]
OURS = [{"fused": True}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}]


def prepare(options, scaler=True, kind=trainops.AdamW):
    """A model, its optimizer and a schedule that halves at each step, as Accelerate prepares them."""
    accelerator = accelerate.Accelerator(cpu=True)
    if scaler:
        accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=1024.0
        )  # what mixed_precision="fp16" has on a GPU
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = kind(model.parameters(), lr=1.0, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return accelerator, *accelerator.prepare(model, optimizer, schedule)


def step(accelerator, model, optimizer, schedule, overflow=False):
    optimizer.zero_grad()
    accelerator.backward(model(torch.full((2, 4), float("inf") if overflow else 1.0)).sum())
    optimizer.step()
    schedule.step()
    return optimizer.step_was_skipped


@pytest.mark.parametrize("options", PLAIN, ids=str)
def test_with_pytorchs_arguments_a_skipped_step_is_seen_as_with_pytorchs_class(options):
    for kind in (trainops.AdamW, torch.optim.AdamW):
        prepared = prepare(options, kind=kind)
        assert [step(*prepared, overflow=x) for x in (False, True, False)] == [False, True, False]
        assert prepared[-1].get_last_lr() == [0.25]


@pytest.mark.parametrize("options", OURS, ids=str)
def test_a_step_that_the_optimizer_skips_is_seen(options):
    prepared = prepare(options)
    skips.see_skipped_steps(prepared[0])
    skips.see_skipped_steps(prepared[0])  # a second call changes nothing
    assert [step(*prepared, overflow=x) for x in (False, True, True, False)] == [False, True, True, False]
    assert prepared[-1].get_last_lr() == [0.25]
    assert prepared[0].optimizer_step_was_skipped is False
    assert unwrap(prepared[2]).skipped_steps == 2


def test_a_step_is_seen_that_is_skipped_without_a_scaler():
    prepared = prepare({"skip_nonfinite": True}, scaler=False)
    skips.see_skipped_steps(prepared[0])
    assert [step(*prepared, overflow=x) for x in (True, False)] == [True, False]
    assert prepared[-1].get_last_lr() == [0.5]


def test_other_optimizers_are_left_alone():
    prepared = prepare({}, kind=torch.optim.AdamW)
    skips.see_skipped_steps(prepared[0])
    assert type(prepared[2]) is accelerate.optimizer.AcceleratedOptimizer


def test_accelerates_clipping_is_that_of_pytorchs_class():
    weights = []
    for kind in (trainops.AdamW, torch.optim.AdamW):
        accelerator, model, optimizer, schedule = prepare({}, scaler=False, kind=kind)
        for x in (1.0, 2.0):
            optimizer.zero_grad()
            accelerator.backward(model(torch.full((2, 4), x)).square().sum())
            norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
            assert norm > 0.1
            optimizer.step()
            schedule.step()
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights)


def test_an_average_is_saved_and_loaded_with_the_state(tmp_path):
    accelerator, model, optimizer, schedule = prepare({"max_grad_norm": 1.0}, scaler=False)
    ema = trainops.EMA(accelerator.unwrap_model(model), 0.5)
    unwrap(optimizer).ema = ema
    accelerator.register_for_checkpointing(ema)
    step(accelerator, model, optimizer, schedule)
    step(accelerator, model, optimizer, schedule)
    accelerator.save_state(str(tmp_path))
    saved = {name: p.clone() for name, p in ema.module.named_parameters()}
    step(accelerator, model, optimizer, schedule)
    assert ema.step == 3
    assert not torch.equal(saved["weight"], ema.module.weight)
    accelerator.load_state(str(tmp_path))
    assert ema.step == 2
    assert all(torch.equal(p, saved[name]) for name, p in ema.module.named_parameters())
    step(accelerator, model, optimizer, schedule)
    assert ema.step == 3
