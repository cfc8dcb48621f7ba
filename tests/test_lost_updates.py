"""`lost_updates()`: what a step leaves as it is, although the rule moves it."""

import pytest
import torch
from training import ADAM, ADAMW, RULES, SGD, make_model, set_grads

import trainops

SHAPES = ((33, 31), (127,), (), (0,))
OPTIONS = {ADAMW: {"weight_decay": 0.1}, ADAM: {"weight_decay": 0.1}, SGD: {"momentum": 0.9, "weight_decay": 0.1}}
LR = {torch.bfloat16: 3e-3, torch.float16: 3e-4, torch.float32: 1e-7}  # such that some are lost


def made(rule, dtype, **options):
    """An optimizer in the middle of training, whose parameters have gradients."""
    torch.manual_seed(0)
    model = make_model(SHAPES, dtype, "cpu")
    optimizer = rule.ours(model.parameters(), lr=0.01, **OPTIONS[rule], **options)
    for _ in range(3):
        set_grads(model.params, [torch.randn(shape).to(dtype) for shape in SHAPES])
        optimizer.step()
    set_grads(model.params, [torch.randn(shape).to(dtype) for shape in SHAPES])
    optimizer.param_groups[0]["lr"] = LR[dtype]
    return optimizer, list(model.params)


def everything(optimizer, params):
    state = [x for p in params for x in optimizer.state[p].values()]
    return [x.detach().clone() for x in (*params, *(p.grad for p in params), *state)]


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", LR, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.ours.__name__)
def test_they_are_what_the_next_step_loses(rule, dtype, max_grad_norm):
    """PyTorch's class takes it in float64, from the same state."""
    optimizer, params = made(rule, dtype, max_grad_norm=max_grad_norm)
    before = everything(optimizer, params)
    shares = optimizer.lost_updates()
    assert shares.dtype == torch.float32
    after = everything(optimizer, params)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))

    wide = [torch.nn.Parameter(p.detach().double()) for p in params]
    exact = rule.torchs(wide, lr=LR[dtype], **OPTIONS[rule], foreach=False)
    for p, twin in zip(params, wide, strict=True):
        twin.grad = p.grad.double()
        exact.state[twin] = {key: x.clone() if key == "step" else x.double() for key, x in optimizer.state[p].items()}
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(wide, max_grad_norm)
    exact.step()
    for share, p, twin in zip(shares.tolist(), params, wide, strict=True):
        lost = (twin != p.detach().double()) & (twin.to(dtype) == p)
        assert share == pytest.approx(lost.double().mean().item() if p.numel() else 0.0, abs=1e-6)
    assert 0.01 < shares[0] < 0.99


def test_a_stall_and_its_cure():
    """Steps of 1e-4 move no bfloat16 weight near 1, and every master."""
    for master, expected in ((None, 1.0), ("split", 0.0)):
        param = torch.nn.Parameter(torch.linspace(1.0, 1.9, 500).bfloat16())
        optimizer = trainops.AdamW([param], lr=1e-4, weight_decay=0.0, master=master)
        param.grad = torch.ones_like(param)
        assert optimizer.lost_updates().tolist() == [expected]
        assert not optimizer.state
        optimizer.step()
        assert optimizer.lost_updates().tolist() == [expected]


def test_only_parameters_with_gradients_count():
    optimizer, params = made(ADAMW, torch.bfloat16)
    params[0].grad = None
    assert optimizer.lost_updates().shape == (3,)
    optimizer.zero_grad()
    assert optimizer.lost_updates().shape == (0,)


def test_other_layouts_and_complex_numbers():
    weights = [torch.rand(6, 4).t().bfloat16(), torch.rand(5, 3)[:, ::2], torch.rand(7, dtype=torch.complex64)]
    params = [torch.nn.Parameter(1 + x + 1j if x.is_complex() else 1 + x) for x in weights]
    optimizer = trainops.AdamW(params, lr=1e-9, weight_decay=0.0)
    set_grads(params, [torch.full_like(p, 1 + 1j) if p.is_complex() else torch.ones_like(p) for p in params])
    assert optimizer.lost_updates().tolist() == [1.0] * 3
    optimizer.param_groups[0]["lr"] = 1.0
    assert optimizer.lost_updates().tolist() == [0.0] * 3


def test_sparse_gradients_are_refused():
    param = torch.nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        trainops.SGD([param], lr=0.1).lost_updates()


def test_what_the_rule_leaves_is_not_lost():
    param = torch.nn.Parameter(torch.ones(4).bfloat16())
    param.grad = torch.tensor([0.0, 0.0, 1e-4, 1.0]).bfloat16()
    assert trainops.SGD([param], lr=0.1).lost_updates().tolist() == [0.25]
