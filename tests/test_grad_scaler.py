"""GradScaler: with PyTorch's arguments alone, the optimizer does what PyTorch's class does with them."""

import copy
import pickle

import pytest
import torch
from contract import same_bits
from torch import nn

import trainops

SCALE = 1024.0

# PyTorch's arguments. Its fused AdamW unscales inside step(); the others leave it to the scaler.
TORCHS = {
    "default": {},
    "fused": {"fused": True},
    "not_fused": {"fused": False},
    "foreach": {"foreach": True},
    "differentiable": {"differentiable": True},
}

# Ours, and whether step() unscales with them.
OURS = {
    "max_grad_norm": ({"max_grad_norm": 1.0}, True),
    "skip_nonfinite": ({"skip_nonfinite": True}, True),
    "fused_and_clipping": ({"fused": True, "max_grad_norm": 1.0}, True),
    "backend": ({"backend": "reference"}, False),
}


def scaled_step(optimizer, params, loss=lambda p: (2 * p).sum()):
    """One step under a scaler. Returns whether the scaler saw that it was skipped, and its new scale."""
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(sum(map(loss, params))).backward()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    scaler.step(optimizer)
    scaler.update()
    return len(calls), scaler.get_scale()


def pair():
    torch.manual_seed(0)
    return [[nn.Parameter(torch.ones(33)), nn.Parameter(torch.ones(4, 3).to(torch.bfloat16))] for _ in range(2)]


# A differentiable step takes no leaves.
@pytest.mark.parametrize("options", [x for x in TORCHS.values() if "differentiable" not in x], ids=str)
@pytest.mark.parametrize("overflows", [False, True], ids=["", "overflow"])
def test_gradients_calls_and_steps_are_torchs(options, overflows):
    def loss(p):
        return (2 * p).sum() * (float("inf") if overflows else 1.0)

    results = []
    for make, params in zip((trainops.AdamW, torch.optim.AdamW), pair(), strict=True):
        if options.get("fused"):
            params = params[:1]  # PyTorch's fused step on a CPU takes no bfloat16 beside float32 states
        optimizer = make(params, lr=0.1, **options)
        outcome = scaled_step(optimizer, params, loss)
        assert not overflows or outcome[1] == SCALE / 2
        results.append((outcome, [p.grad for p in params], [p.detach() for p in params], len(optimizer.state)))
    ours, torchs = results
    assert ours[0] == torchs[0]
    assert all(map(same_bits, ours[1], torchs[1]))
    for p, q in zip(ours[2], torchs[2], strict=True):
        torch.testing.assert_close(p, q)
        assert overflows == torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("options", TORCHS.values(), ids=TORCHS)
def test_who_unscales_is_torchs_and_survives_copies(options):
    params = [nn.Parameter(torch.ones(3))]
    expected = getattr(torch.optim.AdamW(params, **options), "_step_supports_amp_scaling", False)
    check_survives(trainops.AdamW(params, **options), expected)
    model = nn.Linear(2, 2)
    if not options.get("differentiable"):
        check_survives(trainops.AdamW(model.parameters(), ema=trainops.EMA(model), **options), expected)


@pytest.mark.parametrize(("options", "expected"), OURS.values(), ids=OURS)
def test_who_unscales_with_our_settings(options, expected):
    check_survives(trainops.AdamW([nn.Parameter(torch.ones(3))], **options), expected)


def check_survives(optimizer, expected):
    assert optimizer._step_supports_amp_scaling is expected
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other._step_supports_amp_scaling is expected
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._step_supports_amp_scaling is expected


def test_the_setting_follows_what_is_changed_between_steps():
    optimizer = trainops.AdamW([nn.Parameter(torch.ones(3))])
    optimizer.max_grad_norm = 1.0
    assert optimizer._step_supports_amp_scaling
    optimizer.max_grad_norm = None
    assert not optimizer._step_supports_amp_scaling
    optimizer.skip_nonfinite = True
    optimizer._step_supports_amp_scaling = False  # as people do by hand
    for _ in range(2):
        assert not optimizer._step_supports_amp_scaling
        optimizer.load_state_dict(optimizer.state_dict())
    assert not pickle.loads(pickle.dumps(optimizer))._step_supports_amp_scaling


@pytest.mark.parametrize("options", [{"max_grad_norm": 1e9}, {"skip_nonfinite": True}], ids=["clip", "skip"])
def test_settings_of_ours_read_the_gradients_and_do_not_rewrite_them(options):
    p = nn.Parameter(torch.ones(3))
    assert scaled_step(trainops.AdamW([p], lr=0.1, **options), [p])[0] == 1
    assert torch.equal(p.grad, torch.full_like(p, 2 * SCALE))
    q = nn.Parameter(torch.ones(3))
    scaled_step(torch.optim.AdamW([q], lr=0.1), [q])
    torch.testing.assert_close(p, q)


def test_a_step_that_a_scaler_leaves_out_moves_no_average():
    model = nn.Linear(2, 2)
    ema = trainops.EMA(model, 0.5)
    optimizer = trainops.AdamW(model.parameters(), lr=0.1, ema=ema)
    params = list(model.parameters())
    assert scaled_step(optimizer, params, lambda p: (p * float("inf")).sum())[0] == 0
    assert ema.step == 0
    assert scaled_step(optimizer, params)[0] == 1
    assert ema.step == 1
