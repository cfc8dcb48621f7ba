"""Adam: the numbers for all options, against PyTorch's class, and what its decay means."""

import pytest
import torch
from controls import CONTROLS, must_fail, of_groups
from targets import REFERENCE, interpreted
from training import ADAM, check_steps, make_grads, make_model, run, twins

import trainops

SHAPES = ((33, 31), (127,))
LR = 0.05  # large, so that a step moves 16-bit weights by several units in the last place

OPTIONS = {
    "plain": {},
    "penalty": {"weight_decay": 0.3},
    "amsgrad_penalty": {"amsgrad": True, "weight_decay": 0.3},
    "maximize_penalty": {"maximize": True, "weight_decay": 0.3},
    "low_betas": {"betas": (0.3, 0.4), "eps": 1e-4, "weight_decay": 0.04},
}


@interpreted(lambda dtype, options, steps: steps == 1)
@pytest.mark.parametrize("steps", [1, 100])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_matches_exact_for_all_options(target, dtype, options, steps):
    check_steps(target, dtype, SHAPES, {"lr": LR} | options, steps, rule=ADAM)


@interpreted(lambda dtype: dtype in (torch.float32, torch.bfloat16))
def test_the_penalty_is_added_after_clipping(target, dtype):
    check_steps(target, dtype, SHAPES, {"lr": LR, "weight_decay": 0.3}, 3, max_norm=0.5, rule=ADAM)


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS.keys())
def test_a_wrong_step_is_noticed(dtype, control):
    must_fail(control, check_steps, REFERENCE, dtype, SHAPES, {"lr": LR}, rule=ADAM)


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.0}, {"weight_decay": 0.31}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_wrong_penalty_is_noticed(dtype, wrong, max_norm):
    options = {"lr": LR, "weight_decay": 0.3}
    must_fail(lambda: of_groups(**wrong), check_steps, REFERENCE, dtype, SHAPES, options, 2, max_norm, ADAM)


def test_without_a_penalty_an_infinite_parameter_leaves_its_moments_finite(target):
    param = torch.nn.Parameter(torch.full((40,), torch.inf, device=target.device))
    param.grad = torch.ones_like(param)
    optimizer = trainops.Adam([param], backend=target.backend)
    optimizer.step()
    assert torch.isfinite(optimizer.state[param]["exp_avg"]).all()


def test_decoupled_decay_is_adamws(target, dtype):
    models = twins(SHAPES, dtype, target.device)
    grads = make_grads(SHAPES, dtype, target.device, 3)
    options = {"lr": LR, "weight_decay": 0.3, "backend": target.backend}
    run(trainops.AdamW(models[0].parameters(), **options), models[0].params, grads)
    run(trainops.Adam(models[1].parameters(), decoupled_weight_decay=True, **options), models[1].params, grads)
    assert all(map(torch.equal, *(model.params for model in models)))


def test_groups_must_agree_on_the_kind_of_decay():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "decoupled_weight_decay": True}]
    with pytest.raises(ValueError, match="decoupled_weight_decay must be the same for all groups"):
        trainops.Adam(groups)
    optimizer = trainops.Adam([params[0]])
    with pytest.raises(ValueError, match="decoupled_weight_decay"):
        optimizer.add_param_group(groups[1])
    assert len(optimizer.param_groups) == 1
    optimizer.load_state_dict(torch.optim.Adam([params[1]], decoupled_weight_decay=True).state_dict())
    assert optimizer.rule == "adamw"


def test_state_dicts_go_both_ways(target):
    ours, torchs = twins(SHAPES, torch.float32, target.device)
    first, second = (make_grads(SHAPES, torch.float32, target.device, 2) for _ in range(2))
    options = {"lr": LR, "weight_decay": 0.3}
    optimizers = [trainops.Adam(ours.parameters(), backend=target.backend, **options)]
    optimizers.append(torch.optim.Adam(torchs.parameters(), **options))
    for optimizer, model in zip(optimizers, (ours, torchs), strict=True):
        run(optimizer, model.params, first)
    dicts = [optimizer.state_dict() for optimizer in optimizers]
    for optimizer, other, model in zip(optimizers, reversed(dicts), (ours, torchs), strict=True):
        optimizer.load_state_dict(other)
        run(optimizer, model.params, second)
    for a, b in zip(ours.params, torchs.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_is_torchs_class_and_takes_its_positions():
    model = make_model(SHAPES, torch.float32, "cpu")
    optimizer = trainops.Adam(model.parameters(), 0.1, (0.8, 0.9), 1e-6, 0.2, True, max_grad_norm=1.0)
    assert isinstance(optimizer, torch.optim.Adam)
    group = optimizer.param_groups[0]
    assert [group[x] for x in ("lr", "betas", "eps", "weight_decay", "amsgrad")] == [0.1, (0.8, 0.9), 1e-6, 0.2, True]
    assert optimizer.max_grad_norm == 1.0
