"""Clipping as torch.nn.utils does it: everything that a caller may pass, and which backend serves it."""

import importlib
import inspect
import math

import pytest
import torch
from contract import same_bits
from targets import over
from torch.nn import utils as torch_utils
from training import with_grads

import trainops


@pytest.mark.parametrize(
    "name", ["clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_"], ids=str
)
def test_signature_is_torchs(name):
    if not hasattr(torch_utils, name):
        pytest.skip("this PyTorch does not have it")
    torchs = inspect.signature(getattr(torch_utils, name)).parameters.values()
    ours = inspect.signature(getattr(trainops, name)).parameters.values()
    positional = [(p.name, p.default) for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [(p.name, p.default) for p in torchs]
    own = ["norm_group", "backend"] if name in ("clip_grad_norm_", "get_total_norm") else ["backend"]
    assert [(p.name, p.default) for p in ours if p.kind is p.KEYWORD_ONLY] == [(added, None) for added in own]


CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "generator": lambda params: (p for p in params),
    "dict_values": lambda params: dict(enumerate(params)).values(),
    "one_tensor": lambda params: params[0],
    "parameter_list": torch.nn.ParameterList,
    "with_gradless": lambda params: [
        torch.nn.Parameter(torch.zeros(2)),
        *params,
        torch.nn.Parameter(torch.zeros(())),
    ],
}
CALLS = {
    "clip_grad_norm_": lambda module, params, **kw: module.clip_grad_norm_(params, 0.5, **kw),
    "inf_norm": lambda module, params, **kw: module.clip_grad_norm_(params, 0.5, "inf", **kw),
    "all_arguments": lambda module, params, **kw: module.clip_grad_norm_(params, 1, 1, True, False, **kw),
    "foreach": lambda module, params, **kw: module.clip_grad_norm_(params, max_norm=0.5, foreach=True, **kw),
    "clip_grad_value_": lambda module, params, **kw: module.clip_grad_value_(params, 0.5, **kw),
    "clip_grads_with_norm_": lambda module, params, **kw: module.clip_grads_with_norm_(
        params, 0.5, torch.tensor(3.0), **kw
    ),
}
over_calls = over("call", CALLS)


@over("container", CONTAINERS)
@over_calls
def test_takes_what_torch_takes(target, call, container):
    grads = [torch.randn(shape, device=target.device) for shape in [(7, 5), (), (127,)]]
    ours, torchs = with_grads([g.clone() for g in grads]), with_grads(grads)
    result = call(trainops, container(ours), backend=target.backend)
    torch.testing.assert_close(result, call(torch_utils, container(torchs)))
    for p, q in zip(ours, torchs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_get_total_norm_takes_a_tensor_and_a_generator(target):
    ones = torch.ones(4, device=target.device)
    assert trainops.get_total_norm(ones, backend=target.backend) == 2.0
    assert trainops.get_total_norm((ones for _ in range(4)), backend=target.backend) == 4.0


@pytest.mark.parametrize("params", [[], (), [torch.nn.Parameter(torch.ones(2))]], ids=["list", "tuple", "gradless"])
def test_nothing_to_clip(target, params):
    zero = torch.tensor(0.0)
    assert same_bits(trainops.clip_grad_norm_(params, 1.0, backend=target.backend), zero)
    assert same_bits(trainops.get_total_norm([], error_if_nonfinite=True, backend=target.backend), zero)
    assert trainops.clip_grads_with_norm_(params, 1.0, zero, backend=target.backend) is None
    assert trainops.clip_grad_value_(params, 1.0, backend=target.backend) is None


def test_an_empty_generator_warns_where_torch_warns(target, recwarn):
    norm = trainops.clip_grad_norm_((p for p in ()), 1.0, backend=target.backend)
    expected = torch_utils.clip_grad_norm_((p for p in ()), 1.0)
    assert same_bits(norm, expected)
    ours, torchs = recwarn.list
    assert str(ours.message) == str(torchs.message)
    assert ours.category is torchs.category
    assert ours.filename == torchs.filename == __file__
    recwarn.clear()
    trainops.clip_grads_with_norm_((p for p in ()), 1.0, norm, backend=target.backend)
    torch_utils.clip_grads_with_norm_((p for p in ()), 1.0, norm)
    trainops.get_total_norm((p for p in ()), backend=target.backend)
    assert not recwarn.list


SPARSE = {
    "coalesced": lambda: torch.eye(3).to_sparse(),
    "uncoalesced": lambda: torch.sparse_coo_tensor([[0, 0, 2], [1, 1, 0]], [1.0, 2.0, 3.0], (3, 3)),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
}


def outcome(call, module, params, **kwargs):
    """What a call returns and leaves in the gradients, or the type of what it raises."""
    try:
        result = call(module, params, **kwargs)
    except Exception as error:
        return type(error)
    return result, [p.grad.to_dense() for p in params]


@pytest.mark.filterwarnings("ignore:Sparse")
@over("sparse", SPARSE)
@over_calls
def test_sparse_is_torchs(target, call, sparse):
    def params():
        grad = sparse()
        like = grad if grad.layout is torch.sparse_csr else torch.zeros(3, 3)
        param = torch.nn.Parameter(like.clone())
        param.grad = grad
        return [param, *with_grads([torch.ones(2)])]

    ours, torchs = outcome(call, trainops, params(), backend=target.backend), outcome(call, torch_utils, params())
    if isinstance(torchs, type):
        assert ours is torchs
    else:
        torch.testing.assert_close(ours, torchs)


@over_calls
def test_autograd_notices(target, call):
    (param,) = with_grads([torch.randn(127, device=target.device)])
    saver = torch.randn(127, device=target.device, requires_grad=True)
    product = (saver * param.grad).sum()
    call(trainops, [param], backend=target.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@over_calls
def test_gradients_with_a_graph(target, call):
    (param,) = with_grads([2 * torch.randn(127, device=target.device, requires_grad=True)])
    before = param.grad.detach().clone()
    call(trainops, [param], backend=target.backend)
    assert param.grad.abs().sum() < before.abs().sum()


# The choice of a backend.

CPU = trainops.backends()["cpu"]


@over_calls
def test_unknown_backend_changes_nothing(call, monkeypatch):
    (param,) = with_grads([torch.randn(127)])
    before = param.grad.clone()
    names = ".*".join(trainops.backends())
    with pytest.raises(ValueError, match=f"nonsense.*{names}"):
        call(trainops, [param], backend="nonsense")
    monkeypatch.setenv("TRAINOPS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=f"nonsense.*{names}"):
        call(trainops, [param])
    assert same_bits(param.grad, before)


@pytest.mark.skipif(not CPU.available, reason=f"backend cpu: {CPU.reason}")
@pytest.mark.parametrize(
    ("argument", "variable", "chosen"),
    [("reference", None, True), (None, "reference", True), ("cpu", "reference", False), ("reference", "cpu", True)],
)
def test_the_argument_decides_before_the_variable(monkeypatch, argument, variable, chosen):
    reference, calls = importlib.import_module("trainops.adapters.pytorch"), []
    monkeypatch.setattr(reference, "reduce", lambda *args: calls.append(args) or (torch.tensor(1.0), None))
    if variable is not None:
        monkeypatch.setenv("TRAINOPS_BACKEND", variable)
    assert math.isfinite(trainops.get_total_norm([torch.ones(3)], backend=argument))
    assert bool(calls) == chosen
