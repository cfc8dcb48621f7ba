"""Clipping by norm and by value: numbers, layouts, non-finite gradients, and all that torch.nn.utils takes."""

import copy
import importlib
import inspect
import math

import numpy as np
import pytest
import torch
from contract import DTYPES, assert_contract, exact, same_bits
from targets import TARGETS, Target
from torch.nn import utils as torch_utils

import trainops

INF, NAN = float("inf"), float("nan")
NORM_TYPES = [2.0, 1.0, INF, 0.5, 3.0]

# What is clipped to, as a multiple of the norm.
MAX_NORMS = {"below": 0.3, "above": 3.0, "zero": 0.0, "inf": INF}

# Views of a tensor of shape (6, 7, 8, 9): unaligned, in another order of dimensions, with gaps.
LAYOUTS = {f"offset_{i}": lambda x, i=i: x.flatten()[i:] for i in (1, 2, 3, 5, 8)} | {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.flatten(1).t(),
    "permuted": lambda x: x.permute(3, 1, 0, 2),
    "every_other": lambda x: x[..., ::2],
    "first_three": lambda x: x[..., :3],
    "one_column": lambda x: x[..., 5],
}


def over(name, table):
    return pytest.mark.parametrize(name, table.values(), ids=table.keys())


KERNELS = [target for target in TARGETS if target.backend != "reference"]
over_kernels = pytest.mark.parametrize("target", KERNELS, indirect=True, ids="-".join)
over_layouts = over("layout", LAYOUTS)
over_norm_types = pytest.mark.parametrize("norm_type", NORM_TYPES)


def randn(shape, dtype, device):
    return torch.randn(shape, dtype=torch.float64, device=device).to(dtype)


def with_grads(grads):
    """Parameters that have these very gradients."""
    params = [torch.nn.Parameter(torch.zeros(g.shape, dtype=g.dtype, device=g.device)) for g in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def parts(x):
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x.resolve_neg()


def magnitudes(x):
    true = exact(parts(x))
    return np.hypot(true[..., 0], true[..., 1]) if x.is_complex() else np.abs(true)


def exact_norm(tensors, norm_type=2.0):
    every = np.concatenate([magnitudes(x).ravel() for x in tensors])
    if norm_type == INF:
        return every.max(initial=np.longdouble(0))
    return (every ** np.longdouble(norm_type)).sum() ** (1 / np.longdouble(norm_type))


def torch_norm(tensors, norm_type=2.0):
    """What ``torch.nn.utils.get_total_norm`` computes."""
    norms = [torch.linalg.vector_norm(x, norm_type) for x in tensors]
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def check_clip(target, grads, norm_type=2.0, max_norm=0.3):
    """Clip ``grads`` to a multiple of their norm, and hold both norm and gradients to the contract."""
    true_norm = exact_norm(grads, norm_type)
    bound = max_norm * float(true_norm)
    coefficient = min(np.longdouble(1), bound / (true_norm + np.longdouble(1e-6)))
    true_grads = [exact(parts(g)) * coefficient for g in grads]
    torchs = with_grads(copy.deepcopy(grads))
    # PyTorch has no inf-norm of empty tensors.
    expected = torch_utils.clip_grad_norm_([p for p in torchs if p.numel()], bound, norm_type)
    params = with_grads(grads)
    norm = trainops.clip_grad_norm_(params, bound, norm_type, backend=target.backend)
    wide = torch.float64 if any(g.dtype in (torch.float64, torch.complex128) for g in grads) else torch.float32
    assert norm.dtype == wide
    assert norm.device == grads[0].device
    assert_contract(norm, true_norm, expected.to(norm), f"norm of order {norm_type}")
    ours, theirs = ([parts(p.grad) for p in tensors] for tensors in (params, torchs))
    if len(ours) > 10 and target == Target("triton", "cpu"):
        # Of few tensors of five elements, taken as one: PyTorch's largest error in five is a matter of luck.
        ours, theirs, true_grads = [torch.stack(ours)], [torch.stack(theirs)], [np.stack(true_grads)]
    for i, (x, y, true) in enumerate(zip(ours, theirs, true_grads, strict=True)):
        assert_contract(x, true, y, f"gradient {i}, norm of order {norm_type}")


def test_matches_exact_for_all_shapes(target, dtype, shapes):
    for norm_type in NORM_TYPES:
        check_clip(target, [randn(shape, dtype, target.device) for shape in shapes], norm_type)


@over("max_norm", MAX_NORMS)
def test_matches_exact_for_all_max_norms(target, dtype, max_norm):
    check_clip(target, [randn(shape, dtype, target.device) for shape in [(33, 31), (127,)]], max_norm=max_norm)


@over_layouts
def test_matches_exact_for_all_layouts(target, dtype, layout):
    whole = randn((6, 7, 8, 9), dtype, target.device)
    view = layout(whole)
    for norm_type in NORM_TYPES:
        norm = trainops.get_total_norm([view], norm_type, backend=target.backend)
        assert_contract(norm, exact_norm([view], norm_type), torch_norm([view], norm_type).to(norm), str(norm_type))
    outside = whole.clone()
    layout(outside).zero_()
    check_clip(target, [view, randn((5,), dtype, target.device)])
    view.zero_()
    assert same_bits(whole, outside), "elements outside the view were written"


@over_norm_types
def test_matches_exact_for_mixed_dtypes(target, norm_type):
    for dtypes in (DTYPES, [torch.float16, torch.bfloat16], [torch.bfloat16, torch.float32]):
        check_clip(target, [randn((127,), dtype, target.device) for dtype in [*dtypes, *dtypes]], norm_type)


@pytest.mark.parametrize("conjugated", [False, True], ids=["plain", "conjugated"])
@pytest.mark.parametrize("complex_dtype", [torch.complex64, torch.complex128], ids=["complex64", "complex128"])
@over_norm_types
def test_matches_exact_for_complex(target, norm_type, complex_dtype, conjugated):
    grads = [torch.randn(shape, dtype=complex_dtype, device=target.device) for shape in [(33, 31), (127,), (1,), ()]]
    grads.append(torch.randn(5, device=target.device))
    check_clip(target, [g.conj() for g in grads] if conjugated else grads, norm_type)


@pytest.mark.parametrize("size", [1, 2, 127])
@over_norm_types
def test_matches_exact_for_lazily_negated(target, norm_type, size):
    negated = torch.randn(size, dtype=torch.complex64, device=target.device).conj().imag
    assert negated.is_neg()
    check_clip(target, [negated, torch.randn(5, device=target.device)], norm_type)


def same_values(a, b):
    """Same bits, but for what a NaN carries."""
    return same_bits(*(torch.where(x.isnan(), NAN, x) for x in (a, b)))


def test_clip_grad_value_is_torchs_for_all_shapes(target, dtype, shapes):
    ours = with_grads([randn(shape, dtype, target.device) for shape in shapes])
    torchs = with_grads([p.grad.clone() for p in ours])
    trainops.clip_grad_value_(ours, 0.5, backend=target.backend)
    torch_utils.clip_grad_value_(torchs, 0.5)
    assert all(same_bits(p.grad, q.grad) for p, q in zip(ours, torchs, strict=True))


@over_layouts
def test_clip_grad_value_is_torchs_for_all_layouts(target, dtype, layout):
    ours = randn((6, 7, 8, 9), dtype, target.device)
    torchs = ours.clone()
    views = layout(ours), layout(torchs)
    trainops.clip_grad_value_(with_grads(views[:1]), 0.5, backend=target.backend)
    torch_utils.clip_grad_value_(with_grads(views[1:]), 0.5)
    assert same_bits(*views)
    assert same_bits(ours, torchs)


@pytest.mark.parametrize("clip_value", [0.5, 0.1, 0.3, 0.0, -0.0, 1e4, 1e-9, INF, -1.0, NAN])
def test_clip_grad_value_is_torchs_for_all_values(target, dtype, clip_value):
    values = [0.0, -0.0, 0.1, -0.1, 0.3, -0.3, 0.5, -0.5, 0.4999, 3.0, -3.0, INF, -INF, NAN]
    grads = [torch.tensor(values, device=target.device).to(dtype), randn((127,), dtype, target.device)]
    ours, torchs = with_grads([g.clone() for g in grads]), with_grads(grads)
    trainops.clip_grad_value_(ours, clip_value, backend=target.backend)
    torch_utils.clip_grad_value_(torchs, clip_value)
    assert all(same_values(p.grad, q.grad) for p, q in zip(ours, torchs, strict=True))


@over_norm_types
def test_norm_of_expanded(target, dtype, norm_type):
    tensors = [randn((7, 1), dtype, target.device).expand(7, 9), randn((), dtype, target.device).expand(33)]
    norm = trainops.get_total_norm(tensors, norm_type, backend=target.backend)
    assert_contract(norm, exact_norm(tensors, norm_type), torch_norm(tensors, norm_type).to(norm))


SPLITS = {
    "even": lambda x: x.split(1000),
    "uneven": lambda x: x.tensor_split([1, 4, 64, 8192]),
    "many": lambda x: [*x[:300].split(1), x[300:]],
}


@over("split", SPLITS)
@over_norm_types
def test_norm_is_invariant_under_splitting(target, dtype, norm_type, split):
    whole = randn((10_001,), dtype, target.device)
    norm = trainops.get_total_norm([whole], norm_type, backend=target.backend)
    norm_of_pieces = trainops.get_total_norm(split(whole), norm_type, backend=target.backend)
    torchs = torch_norm(split(whole), norm_type).to(norm)
    assert_contract(norm_of_pieces, exact_norm([whole], norm_type), torchs)
    if target in KERNELS and norm_type in (2.0, 1.0, INF):
        # Sums are accumulated in float64.
        rtol = {torch.float32: torch.finfo(torch.float32).eps, torch.float64: 1e-14}[norm.dtype]
        torch.testing.assert_close(norm_of_pieces, norm, rtol=rtol, atol=0.0)


@over_kernels
@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF])  # other orders are PyTorch's
def test_norm_has_the_same_bits_in_every_run(target, dtype, norm_type):
    grads = [randn(shape, dtype, target.device) for shape in [(3, 70001), (127,), (), (200_000,)]]
    threads = torch.get_num_threads()
    try:
        norms = []
        for count in (1, 2, 1, 2):
            torch.set_num_threads(count)
            norms += [trainops.get_total_norm(grads, norm_type, backend=target.backend) for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(norm, norms[0]) for norm in norms)


@over_kernels
def test_norm_is_the_same_wherever_the_memory_begins(target, dtype):
    values = randn((2048,), dtype, target.device)
    aligned = trainops.get_total_norm([values], backend=target.backend)
    for offset in range(1, 9):
        moved = torch.empty(len(values) + offset, dtype=dtype, device=target.device)[offset:].copy_(values)
        assert same_bits(trainops.get_total_norm([moved], backend=target.backend), aligned)


@over_kernels
@pytest.mark.parametrize(
    ("large_dtype", "large"),
    [(torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float16, 6e4), (torch.float32, 1e-30)],
    ids=str,
)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF])
def test_squares_do_not_overflow(target, norm_type, large_dtype, large):
    grads = [torch.full((1025,), large, dtype=large_dtype, device=target.device) for _ in range(2)]
    norm = trainops.get_total_norm(grads, norm_type, backend=target.backend)
    assert norm.item() == pytest.approx(float(exact_norm(grads, norm_type)), rel=1e-6)
    trainops.clip_grad_norm_(with_grads(grads), 0.5 * norm.item(), norm_type, backend=target.backend)
    if large > 1.0:
        torch.testing.assert_close(grads[0], torch.full_like(grads[0], 0.5 * large))


@pytest.mark.parametrize("max_norm", [1e6, INF])
def test_coefficient_of_one_keeps_every_bit(target, dtype, max_norm):
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1.0, -3e4], device=target.device).to(dtype)
    params = with_grads([special, randn((127,), dtype, target.device), randn((9, 2), dtype, target.device)[:, 0]])
    before = [p.grad.clone() for p in params]
    trainops.clip_grad_norm_(params, max_norm, backend=target.backend)
    assert all(same_bits(p.grad, old) for p, old in zip(params, before, strict=True))


def test_the_two_halves_make_the_whole(target, dtype, shapes):
    whole = with_grads([randn(shape, dtype, target.device) for shape in shapes])
    halves = with_grads([p.grad.clone() for p in whole])
    norm = trainops.clip_grad_norm_(whole, 0.5, backend=target.backend)
    total_norm = trainops.get_total_norm([p.grad for p in halves], backend=target.backend)
    assert trainops.clip_grads_with_norm_(halves, 0.5, total_norm, backend=target.backend) is None
    assert same_bits(norm, total_norm)
    assert all(same_bits(p.grad, q.grad) for p, q in zip(whole, halves, strict=True))


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_a_gradient_given_twice_is_clipped_twice(target, strided):
    grads = [torch.randn(127, 2, device=target.device)[:, 0] if strided else torch.randn(127, device=target.device)]
    (p,), (q,) = with_grads(grads), with_grads(copy.deepcopy(grads))
    norm = trainops.clip_grad_norm_([p, p], 0.5, backend=target.backend)
    torch.testing.assert_close(norm, torch_utils.clip_grad_norm_([q, q], 0.5))
    torch.testing.assert_close(p.grad, q.grad)


# Non-finite gradients.

NON_FINITE = {"inf": [INF], "minus_inf": [-INF], "nan": [NAN], "inf_nan": [INF, NAN], "nan_inf": [NAN, INF]}
over_non_finite = over("values", NON_FINITE)


def non_finite_grads(values, dtype, device):
    """Gradients of which the last but one holds ``values``."""
    grads = [randn(shape, dtype, device) for shape in [(3,), (1025,), (7, 5)]]
    grads[1][100 : 100 + len(values)] = torch.tensor(values)
    return grads


@over_non_finite
def test_non_finite_is_torchs(target, dtype, values):
    for norm_type in NORM_TYPES:
        ours = with_grads(non_finite_grads(values, dtype, target.device))
        torchs = with_grads(copy.deepcopy([p.grad for p in ours]))
        norm = trainops.clip_grad_norm_(ours, 0.5, norm_type, backend=target.backend)
        torch.testing.assert_close(norm, torch_utils.clip_grad_norm_(torchs, 0.5, norm_type).to(norm), equal_nan=True)
        for p, q in zip(ours, torchs, strict=True):
            torch.testing.assert_close(p.grad, q.grad, equal_nan=True)


@over_norm_types
@over_non_finite
def test_error_if_nonfinite_changes_nothing(target, norm_type, values):
    params = with_grads(non_finite_grads(values, torch.float32, target.device))
    before, versions = copy.deepcopy([p.grad for p in params]), [p.grad._version for p in params]
    with pytest.raises(RuntimeError, match=f"norm of order {norm_type} .* is non-finite") as ours:
        trainops.clip_grad_norm_(params, 0.5, norm_type, True, backend=target.backend)
    assert all(same_bits(p.grad, old) for p, old in zip(params, before, strict=True))
    assert [p.grad._version for p in params] == versions
    with pytest.raises(RuntimeError) as alone:
        trainops.get_total_norm([p.grad for p in params], norm_type, True, backend=target.backend)
    with pytest.raises(RuntimeError) as torchs:
        torch_utils.clip_grad_norm_(params, 0.5, norm_type, True)
    assert str(ours.value) == str(alone.value) == str(torchs.value)


# Everything that a caller may pass.


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
    assert [(p.name, p.default) for p in ours if p.kind is p.KEYWORD_ONLY] == [("backend", None)]


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


@pytest.mark.parametrize(
    ("argument", "variable", "chosen"),
    [("reference", None, True), (None, "reference", True), ("cpu", "reference", False), ("reference", "cpu", True)],
)
def test_the_argument_decides_before_the_variable(monkeypatch, argument, variable, chosen):
    if not (found := trainops.backends()["cpu"]).available:
        pytest.skip(f"backend cpu: {found.reason}")
    reference, calls = importlib.import_module("trainops.backends.reference"), []
    monkeypatch.setattr(reference, "grad_norms", lambda *args: calls.append(args) or (torch.tensor(1.0), None))
    if variable is not None:
        monkeypatch.setenv("TRAINOPS_BACKEND", variable)
    assert math.isfinite(trainops.get_total_norm([torch.ones(3)], backend=argument))
    assert bool(calls) == chosen
