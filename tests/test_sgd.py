"""SGD: the numbers for all options, the first step of its momentum, and states of PyTorch's class."""

import pytest
import torch
from controls import CONTROLS, leaving, must_fail, of_groups
from targets import REFERENCE, interpreted
from training import SGD, check_one_step, check_steps, make_grads, make_model, run, set_grads, twins

import trainops

SHAPES = ((33, 31), (127,))
LR = 0.1

OPTIONS = {
    "plain": {},
    "penalty": {"weight_decay": 0.3},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.3},
    "nesterov_maximize": {"momentum": 0.9, "nesterov": True, "maximize": True},
    "maximize_penalty": {"maximize": True, "weight_decay": 0.3},
}
WITH_MOMENTUM = [name for name, options in OPTIONS.items() if "momentum" in options]


@interpreted(lambda dtype, options, steps: steps == 3)
@pytest.mark.parametrize("steps", [3, 100])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_matches_exact_for_all_options(target, dtype, options, steps):
    check_steps(target, dtype, SHAPES, {"lr": LR} | options, steps, rule=SGD)


@interpreted(lambda dtype: dtype in (torch.float32, torch.bfloat16))
def test_clipping_comes_before_the_penalty(target, dtype):
    options = {"lr": LR} | OPTIONS["dampening"]
    check_steps(target, dtype, SHAPES, options, 3, max_norm=0.5, rule=SGD)


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS.keys())
def test_a_wrong_step_is_noticed(dtype, control):
    must_fail(control, check_steps, REFERENCE, dtype, SHAPES, {"lr": LR}, rule=SGD)


@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_a_buffer_that_stays_is_noticed(dtype, name):
    options = {"lr": LR} | OPTIONS[name]
    kept = lambda: leaving(slice(None), "momentum_buffer")  # noqa: E731
    must_fail(kept, check_steps, REFERENCE, dtype, SHAPES, options, 2, rule=SGD)


WRONG = [
    ("penalty", {"weight_decay": 0.31}),
    ("momentum", {"momentum": 0.91}),
    ("momentum", {"nesterov": True}),
    ("dampening", {"dampening": 0.0}),
    ("dampening", {"dampening": 0.41}),
    ("nesterov", {"nesterov": False}),
    ("nesterov_maximize", {"maximize": False}),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG, ids=str)
def test_wrong_settings_are_noticed(dtype, name, wrong):
    options = {"lr": LR} | OPTIONS[name]
    must_fail(lambda: of_groups(**wrong), check_steps, REFERENCE, dtype, SHAPES, options, 3, rule=SGD)


def test_without_a_penalty_the_parameter_is_not_looked_at(target):
    param = torch.nn.Parameter(torch.full((40,), torch.inf, device=target.device))
    param.grad = torch.ones_like(param)
    optimizer = trainops.SGD([param], momentum=0.9, backend=target.backend)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], param.grad)


def test_a_skipped_step_leaves_the_first_one_to_come(target):
    """With dampening, the first gradient that counts fills the buffer as it is."""
    model = make_model(SHAPES, torch.float32, target.device)
    optimizer = trainops.SGD(
        model.parameters(), lr=LR, momentum=0.9, dampening=0.4, skip_nonfinite=True, backend=target.backend
    )
    grads = make_grads(SHAPES, torch.float32, target.device, 3)
    bad = [g.clone() for g in grads[0]]
    bad[1][5] = torch.nan
    set_grads(model.params, bad)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for step_grads in grads:
        set_grads(model.params, step_grads)
        check_one_step(optimizer)


def test_momentum_may_begin_and_end_at_any_step(target):
    """As in PyTorch: the buffer begins with the first gradient that it sees, and waits while there is no momentum."""
    ours, torchs = twins(SHAPES, torch.float32, target.device)
    optimizers = [trainops.SGD(ours.parameters(), lr=LR, dampening=0.4, backend=target.backend)]
    optimizers.append(torch.optim.SGD(torchs.parameters(), lr=LR, dampening=0.4))
    for momentum in (0.0, 0.9, 0.9, 0.0, 0.9):
        grads = make_grads(SHAPES, torch.float32, target.device, 1)
        for optimizer, model in zip(optimizers, (ours, torchs), strict=True):
            optimizer.param_groups[0]["momentum"] = momentum
            run(optimizer, model.params, grads)
    for a, b in zip(ours.params, torchs.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [0, 2])
def test_state_dicts_go_both_ways(target, momentum, steps):
    ours, torchs = twins(SHAPES, torch.float32, target.device)
    options = {"lr": LR, "momentum": momentum, "dampening": 0.4 if momentum else 0.0}
    optimizers = [trainops.SGD(ours.parameters(), backend=target.backend, **options)]
    optimizers.append(torch.optim.SGD(torchs.parameters(), **options))
    first, second = (make_grads(SHAPES, torch.float32, target.device, n) for n in (steps, 2))
    for optimizer, model in zip(optimizers, (ours, torchs), strict=True):
        run(optimizer, model.params, first)
    dicts = [optimizer.state_dict() for optimizer in optimizers]
    for optimizer, other, model in zip(optimizers, reversed(dicts), (ours, torchs), strict=True):
        optimizer.load_state_dict(other)
        run(optimizer, model.params, second)
    for a, b in zip(ours.params, torchs.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_sparse_gradients_are_left_to_torch(target, momentum):
    results = []
    for cls, options in ((torch.optim.SGD, {}), (trainops.SGD, {"backend": target.backend})):
        param = torch.nn.Parameter(torch.ones(4, 3, device=target.device))
        optimizer = cls([param], lr=LR, momentum=momentum, **options)
        for row in (1, 2):
            indices = torch.tensor([[row]], device=target.device)
            values = torch.ones(1, 3, device=target.device)
            param.grad = torch.sparse_coo_tensor(indices, values, (4, 3), check_invariants=False)
            optimizer.step()
        if not momentum:  # else PyTorch has a sparse buffer, to which it adds nothing dense
            param.grad = torch.ones_like(param)
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


def test_sparse_gradients_cannot_be_clipped(target):
    param = torch.nn.Parameter(torch.ones(4, 3, device=target.device))
    param.grad = torch.zeros(4, 3, device=target.device).to_sparse()
    with pytest.raises(RuntimeError, match="SGD does not support sparse gradients"):
        trainops.SGD([param], lr=LR, max_grad_norm=1.0, backend=target.backend).step()


def test_split_masters_have_the_bits_of_float32(target):
    if target.backend == "foreach":
        pytest.skip("foreach serves masters by the specification")
    narrow = make_model(SHAPES, torch.bfloat16, target.device)
    wide = make_model(SHAPES, torch.float32, target.device)
    wide.load_state_dict(narrow.state_dict())
    options = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1, "backend": target.backend}
    optimizer = trainops.SGD(narrow.parameters(), master="split", state_dtype=torch.float32, **options)
    theirs = trainops.SGD(wide.parameters(), **options)
    for grads in make_grads(SHAPES, torch.bfloat16, target.device, 5):
        set_grads(narrow.params, grads)
        set_grads(wide.params, [g.float() for g in grads])
        optimizer.step()
        theirs.step()
    for name, weight in optimizer.float32_state_dict(narrow).items():
        assert torch.equal(weight, wide.state_dict()[name])


def test_is_torchs_class_and_takes_its_positions():
    model = make_model(SHAPES, torch.float32, "cpu")
    optimizer = trainops.SGD(model.parameters(), 0.1, 0.9, 0.0, 0.2, True, max_grad_norm=1.0)
    assert isinstance(optimizer, torch.optim.SGD)
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
    assert [optimizer.param_groups[0][name] for name in names] == [0.1, 0.9, 0.0, 0.2, True]
    with pytest.raises(ValueError, match="Nesterov momentum requires a momentum"):
        trainops.SGD(model.parameters(), nesterov=True)
