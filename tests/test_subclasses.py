"""Subclasses of tensors, and modes that want to see operations: there we do what PyTorch does, in its operations."""

import copy

import pytest
import torch
from operations import FunctionCalls, Operations
from targets import over
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

import trainops

SHAPES = [(3,), (4, 5), (20000,)]

SETTINGS = {
    "torch's": {},
    "fused": {"fused": True},
    "clipping": {"max_grad_norm": 0.5},
    "skipping": {"max_grad_norm": 0.5, "skip_nonfinite": True},
}


class Wrapper(torch.Tensor):
    """Has no memory of its own, but a tensor that has."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda x: x.inner, (args, kwargs or {}))
        out = function(*args, **kwargs)
        return tree_map_only(torch.Tensor, cls, out)


def params_with_grads(cls=torch.Tensor, device="cpu"):
    torch.manual_seed(0)
    params = [nn.Parameter(wrap(cls, torch.randn(shape, device=device))) for shape in SHAPES]
    for p in params:
        p.grad = wrap(cls, torch.randn(p.shape, device=device))
    return params


def wrap(cls, x):
    return x if cls is torch.Tensor else cls(x)


def values(tensors):
    return [x.detach().inner if isinstance(x, Wrapper) else x.detach() for x in tensors]


def assert_close(got, expected):
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def take_steps(cls, params, steps=3, **settings):
    optimizer = cls(params, lr=0.1, **settings)
    for _ in range(steps):
        optimizer.step()
    return optimizer


@over("settings", SETTINGS)
def test_wrappers_are_stepped(settings):
    wrappers, plain = params_with_grads(Wrapper), params_with_grads()
    optimizer = take_steps(trainops.AdamW, wrappers, **settings)
    expected = take_steps(trainops.AdamW, plain, **settings)
    assert_close(values(wrappers), values(plain))
    for name in ("exp_avg", "exp_avg_sq"):
        assert all(isinstance(state[name], Wrapper) for state in optimizer.state.values())
        assert_close(
            values(optimizer.state[p][name] for p in wrappers), values(expected.state[p][name] for p in plain)
        )
    if "max_grad_norm" in settings:
        assert_close(values([optimizer.grad_norm]), [expected.grad_norm])


@over("fused", {"": False, "fused": True})
def test_with_torchs_arguments_wrappers_meet_torchs_operations(fused):
    ours, torchs = params_with_grads(Wrapper), params_with_grads(Wrapper)
    take_steps(trainops.AdamW, ours, fused=fused)
    take_steps(torch.optim.AdamW, torchs, fused=fused)
    assert all(map(torch.equal, values(ours), values(torchs)))


def test_an_average_of_wrappers_beside_plain_tensors():
    model = nn.ParameterList([*params_with_grads(Wrapper)[:2], *params_with_grads()[2:]])
    twin = nn.ParameterList(params_with_grads())
    emas = [trainops.EMA(m, 0.5) for m in (model, twin)]
    for ema, m in zip(emas, (model, twin), strict=True):
        for p in m:
            p.grad = torch.ones_like(p)
        take_steps(trainops.AdamW, list(m), ema=ema)
        assert ema.step == 3
    assert_close(values(emas[0].module), values(emas[1].module))
    emas = [copy.deepcopy(ema) for ema in emas]
    for ema in emas:
        ema.update()
    assert_close(values(emas[0].module), values(emas[1].module))


def test_clipping_of_wrappers():
    wrappers, plain = params_with_grads(Wrapper), params_with_grads()
    norms = [trainops.clip_grad_norm_(params, 0.5) for params in (wrappers, plain)]
    assert_close(values(norms[:1]), norms[1:])
    assert_close(values(p.grad for p in wrappers), [p.grad for p in plain])


def fake_params(mode):
    with mode:
        return params_with_grads()


@over(
    "settings", {"": {}, "foreach": {"foreach": True}, "amsgrad": {"amsgrad": True}, "decay": {"weight_decay": 0.0}}
)
def test_fake_parameters_are_stepped(settings):
    params = fake_params(FakeTensorMode())
    optimizer = take_steps(trainops.AdamW, params, **settings)
    assert all(type(optimizer.state[p]["exp_avg"]) is FakeTensor for p in params)


@over("settings", SETTINGS)
def test_under_fake_tensors_everything_is_fake(settings):
    with FakeTensorMode():
        params = params_with_grads()
        optimizer = take_steps(trainops.AdamW, params, **settings)
        trainops.ema_update_([p.grad for p in params], params, 0.5)
        norm = trainops.clip_grad_norm_(params, 0.5)
        trainops.clip_grad_value_(params, 0.5)
    assert all(type(optimizer.state[p]["exp_avg"]) is FakeTensor for p in params)
    assert type(norm) is FakeTensor
    if "max_grad_norm" in settings:
        assert type(optimizer.grad_norm) is FakeTensor


def test_meta_parameters():
    """As with PyTorch's class: they are stepped, but there is no fused step."""
    params = params_with_grads(device="meta")
    assert take_steps(trainops.AdamW, params).state[params[0]]["exp_avg"].is_meta
    for cls, settings in [(torch.optim.AdamW, {}), (trainops.AdamW, {}), (trainops.AdamW, {"max_grad_norm": 0.5})]:
        optimizer = cls(params, fused=True, **settings)
        with pytest.raises(RuntimeError, match=r"`fused=True` requires .*meta"):
            optimizer.step()
        assert cls is torch.optim.AdamW or not optimizer.state


def step_once(optimizer):
    def act():
        optimizer.step()
        return [x for state in optimizer.state.values() for x in state.values()]

    return act


def update_once(ema):
    def act():
        ema.update()
        return list(ema.module.parameters())

    return act


def averaged_model(params):
    ema = trainops.EMA(nn.ParameterList(params), 0.5)
    ema.step = 1
    for p in params:
        p.data.add_(1.0)
    return ema


# By the operation that each must show. A function of parameters makes one without arguments, which returns tensors.
ACTS = {
    "step": ("lerp", lambda params: step_once(take_steps(trainops.AdamW, params))),
    "first step": ("lerp", lambda params: step_once(trainops.AdamW(params))),
    "asked for": ("lerp", lambda params: step_once(trainops.AdamW(params, backend="cpu"))),
    "clipping step": (
        "linalg_vector_norm",
        lambda params: step_once(take_steps(trainops.AdamW, params, max_grad_norm=1)),
    ),
    "update": ("lerp", lambda params: update_once(averaged_model(params))),
    "ema_update_": ("lerp", lambda params: lambda: trainops.ema_update_([p.grad for p in params], params, 0.5)),
    "norm": ("linalg_vector_norm", lambda params: lambda: [trainops.get_total_norm([p.grad for p in params])]),
    "clip": ("copy", lambda params: lambda: [trainops.clip_grad_norm_(params, 0.5)]),
    "value": ("clamp", lambda params: lambda: trainops.clip_grad_value_(params, 0.5)),
}


@pytest.mark.parametrize("mode", [Operations, FunctionCalls])
@over("case", ACTS)
def test_a_mode_sees_operations(case, mode):
    operation, make_act = case
    watched, alone = params_with_grads(), params_with_grads()
    act, expected = make_act(watched), make_act(alone)()
    with mode() as seen:
        got = act()
    assert operation in seen.names
    tensors = [
        [*params, *[p.grad for p in params], *(out or [])] for params, out in ((watched, got), (alone, expected))
    ]
    assert_close(*map(values, tensors))


@over("settings", SETTINGS)
def test_a_step_can_be_traced(settings):
    """make_fx records a step, which then takes the same step from other values."""
    params = params_with_grads()
    optimizer = take_steps(trainops.AdamW, params, 1, **settings)
    states = [dict(optimizer.state[p]) for p in params]

    def step(params, grads, states):
        optimizer.param_groups[0]["params"] = params
        optimizer.state.clear()
        for p, grad, state in zip(params, grads, states, strict=True):
            p.grad, optimizer.state[p] = grad, dict(state)
        optimizer.step()
        return params

    def arguments(factor):
        tensors = [p.detach().clone() for p in params], [factor * p.grad for p in params]
        return *tensors, [{name: x.clone() for name, x in state.items()} for state in states]

    traced = make_fx(step)(*arguments(1.0))
    assert_close(traced(*arguments(2.0)), step(*arguments(2.0)))
    assert not torch.equal(traced(*arguments(-1.0))[0], step(*arguments(2.0))[0])


def test_clipping_can_be_traced():
    grads = [p.grad for p in params_with_grads()]
    traced = make_fx(lambda grads: trainops.get_total_norm(grads))(grads)
    others = [2 * grad for grad in grads]
    torch.testing.assert_close(traced(others), trainops.get_total_norm(others))
