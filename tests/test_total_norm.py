"""A norm that an optimizer is given, the process group it asks, its settings in groups, and state without a step."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from contract import same_bits

import trainops
from trainops import own_settings


def made(seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (5, 3)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params, trainops.AdamW(params, lr=0.1, **options)


def test_the_norm_of_both_clips_two_optimizers_as_one(target):
    options = {"max_grad_norm": 0.1, "backend": target.backend}

    def placed():
        params, _ = made()
        return [torch.nn.Parameter(p.detach().to(target.device)) for p in params], [
            p.grad.to(target.device) for p in params
        ]

    together, grads = placed()
    apart, _ = placed()
    one = trainops.AdamW(together, lr=0.1, **options)
    two = [trainops.AdamW([p], lr=0.1, **options) for p in apart]
    for p, q, grad in zip(together, apart, grads, strict=True):
        p.grad, q.grad = grad, grad
    one.step()
    norm = trainops.get_total_norm([p.grad for p in apart], backend=target.backend)
    for optimizer in two:
        optimizer.step(total_norm=norm)
        assert same_bits(optimizer.grad_norm, norm)
        assert optimizer.grad_norms is None
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())
    before = [p.detach().clone() for p in apart]
    two[0].step(total_norm=float(norm))  # a number; and clipped by it, not by its own
    assert not same_bits(apart[0].detach(), before[0])


def test_a_norm_that_is_not_finite_skips_all_that_take_it():
    for norm in (float("nan"), float("inf"), torch.tensor([float("inf")])):
        params, optimizer = made(skip_nonfinite=True)
        before = [p.detach().clone() for p in params]
        optimizer.step(total_norm=norm)
        assert optimizer.skipped_steps == 1
        assert all(map(same_bits, (p.detach() for p in params), before))


def test_a_given_norm_is_scaled_as_the_gradients_are():
    params, optimizer = made(max_grad_norm=0.1)
    expected, of_expected = made(max_grad_norm=0.1)
    of_expected.step()
    for p in params:
        p.grad *= 8.0
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    optimizer.step(total_norm=trainops.get_total_norm([p.grad for p in params]))
    torch.testing.assert_close(optimizer.grad_norm, of_expected.grad_norm)
    for p, true in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), true.detach())
    optimizer.step(total_norm=torch.tensor(float("inf")))  # an overflow in the other's gradients
    assert optimizer.skipped_steps == 1


def test_a_norm_of_no_use_is_an_error_that_changes_nothing():
    params, optimizer = made(max_grad_norm=0.1)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"total_norm must be one number.*\(2,\)"):
        optimizer.step(total_norm=torch.ones(2))
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0, total_norm=1.0)
    _, plain = made()
    with pytest.raises(ValueError, match="no use without max_grad_norm, skip_nonfinite or spike_guard"):
        plain.step(total_norm=1.0)
    assert not optimizer.state
    assert all(map(same_bits, (p.detach() for p in params), before))


def test_what_is_no_process_group_is_an_error():
    for wrong in (3, [0, 1], True):
        with pytest.raises(TypeError, match="norm_group must be a process group"):
            made(norm_group=wrong)
        with pytest.raises(TypeError, match="norm_group must be a process group"):
            trainops.get_total_norm(torch.ones(2), norm_group=wrong)
    params, optimizer = made(norm_group="world", max_grad_norm=1.0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="has not been initialized"):
        optimizer.step()
    assert not optimizer.state
    assert all(map(same_bits, (p.detach() for p in params), before))
    assert optimizer.norm_group == "world"
    assert "norm_group: world" in repr(optimizer)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied._norm_group == "world"
    optimizer.norm_group = None
    optimizer.step()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_a_rank_outside_of_the_group_is_told():
    with pytest.raises(ValueError, match="this rank is not in norm_group"):
        made(norm_group=torch.distributed.GroupMember.NON_GROUP_MEMBER)


def test_groups_may_repeat_what_the_constructor_is_given():
    """As ZeroRedundancyOptimizer does, which writes it again at every step."""
    settings = {"max_grad_norm": 0.5, "skip_nonfinite": True, "norm_group": None, "ema": None, "backend": None}
    params, _ = made()
    group = {"params": params, **settings}
    optimizer = trainops.AdamW([group], **settings)
    assert not optimizer.param_groups[0].keys() & settings.keys()
    assert group.keys() >= settings.keys()
    optimizer.param_groups[0].update(settings)
    assert not optimizer.state_dict()["param_groups"][0].keys() & set(own_settings.OWN_SETTINGS)
    for name in ("max_grad_norm", "backend"):
        with pytest.raises(ValueError, match=f"{name} is a setting of the optimizer, not of a group"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], name: settings[name]})
        with pytest.raises(ValueError, match=f"{name} is a setting of the optimizer, not of a group"):
            trainops.AdamW([{**group, name: "other"}], **settings)
    ema = trainops.EMA(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"call ema\.update\(\) after it"):
        trainops.AdamW([{"params": list(ema.model.parameters()), "ema": ema}], ema=ema)


@pytest.mark.parametrize(
    "options", [{}, {"master": "split", "state_dtype": torch.bfloat16}, {"amsgrad": True}], ids=str
)
def test_state_before_the_first_step_is_that_which_the_step_would_make(options):
    params = [torch.nn.Parameter(torch.randn(5).bfloat16()), torch.nn.Parameter(torch.ones(2).bfloat16(), False)]
    optimizer = trainops.AdamW(params, lr=0.1, **options)
    before = params[0].detach().clone()
    optimizer.init_state()
    state = {name: x.clone() for name, x in optimizer.state[params[0]].items()}
    assert same_bits(params[0].detach(), before)
    assert params[1] not in optimizer.state
    assert all((x == 0).all() for x in state.values())
    stepped = trainops.AdamW([torch.nn.Parameter(before.clone())], lr=0.1, **options)
    stepped.param_groups[0]["params"][0].grad = torch.ones_like(before)
    stepped.step()
    its = next(iter(stepped.state.values()))
    assert {n: (x.dtype, x.shape) for n, x in its.items()} == {n: (x.dtype, x.shape) for n, x in state.items()}
    params[0].grad = torch.ones_like(before)
    optimizer.step()
    kept = {name: x.clone() for name, x in optimizer.state[params[0]].items()}
    assert all(same_bits(x, kept[name]) for name, x in its.items())
    optimizer.init_state()  # what is there stays
    assert all(same_bits(x, kept[name]) for name, x in optimizer.state[params[0]].items())


def test_statistics_joined_by_hand_are_not_rounded(target):
    """The norms that ranks join have the dtype of scalars, also of float32 tensors."""
    kernels = trainops.adapters.select(target.backend, target.device)
    x = torch.full((3,), 1 / 3, device=target.device)
    total, norms = kernels.reduce("l2_norm", [x], unrounded=True)
    assert norms.dtype == torch.float64
    assert norms.item() == pytest.approx(float(x[0]) * 3**0.5, rel=3e-8)
    assert norms.item() != norms.float().item()
    assert SimpleNamespace(total=total.item()).total == pytest.approx(norms.item(), rel=1e-7)
