"""Clipping by norm and by value: numbers, layouts and non-finite gradients."""

import copy
import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from contract import DTYPES, assert_contract, exact, real, same_bits, same_values
from controls import CONTROLS, must_fail, truncated, wrong_norm
from exact import clip_coefficient
from norms import assert_norm, exact_norm, torch_norm
from targets import REFERENCE, interpreted, over, over_kernels, thorough
from torch.nn import utils as torch_utils
from training import randn, with_grads

import trainops

INF, NAN = float("inf"), float("nan")
KERNEL_NORM_TYPES = [2.0, 1.0, INF]
NORM_TYPES = [*KERNEL_NORM_TYPES, 0.5, 3.0]  # the latter are PyTorch's

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


over_layouts = over("layout", LAYOUTS)
over_norm_types = pytest.mark.parametrize("norm_type", NORM_TYPES)


class Solution(NamedTuple):
    """What gradients are clipped to, exactly and by PyTorch."""

    bound: float
    norm: np.longdouble
    torchs_norm: torch.Tensor
    grads: list
    torchs: list


def solve(grads, norm_type, max_norm):
    """Clip to a multiple of the norm."""
    true_norm = exact_norm(grads, norm_type)
    bound = max_norm * float(true_norm)
    coefficient = clip_coefficient(true_norm, bound)
    torchs = with_grads(copy.deepcopy(grads))
    # PyTorch has no inf-norm of empty tensors.
    torch_utils.clip_grad_norm_([p for p in torchs if p.numel()], bound, norm_type)
    true = [exact(g) * coefficient for g in grads]
    return Solution(bound, true_norm, torch_norm(grads, norm_type), true, [real(p.grad) for p in torchs])


@functools.lru_cache(maxsize=256)
def solved(shapes, dtype, norm_type):
    """Gradients of such shapes, and what they are clipped to: the same for every backend."""
    torch.default_generator.manual_seed(1)
    grads = [randn(shape, dtype, "cpu") for shape in shapes]
    return grads, solve(grads, norm_type, 0.3)


def check_clip(target, grads, norm_type=2.0, max_norm=0.3, solution=None):
    """Clip ``grads`` to a multiple of their norm, and hold both norm and gradients to the contract."""
    solution = solution or solve(grads, norm_type, max_norm)
    params = with_grads(grads)
    total = trainops.clip_grad_norm_(params, solution.bound, norm_type, backend=target.backend)
    wide = torch.float64 if any(g.dtype in (torch.float64, torch.complex128) for g in grads) else torch.float32
    assert total.dtype == wide
    assert total.device == grads[0].device
    assert_contract(total, solution.norm, solution.torchs_norm.to(total), f"norm of order {norm_type}")
    ours, torchs, true = [real(p.grad) for p in params], solution.torchs, solution.grads
    if len(ours) > 10 and len({x.shape for x in ours}) == 1:
        # Many small tensors are taken as one: PyTorch's largest error in five elements is a matter of luck.
        ours, torchs, true = [torch.stack(ours)], [torch.stack(torchs)], [np.stack(true)]
    for i, (x, y, true_grad) in enumerate(zip(ours, torchs, true, strict=True)):
        assert_contract(x, true_grad, y, f"gradient {i}, norm of order {norm_type}")


def check_shapes(target, dtype, norm_type, shapes=((33, 31), (127,))):
    grads, solution = solved(tuple(shapes), dtype, norm_type)
    check_clip(target, [g.to(target.device, copy=True) for g in grads], norm_type, solution=solution)


def is_pytorchs(target, norm_type, **_):
    """Other orders than the kernels' are left to PyTorch, whatever the backend."""
    return norm_type not in KERNEL_NORM_TYPES and target.backend not in ("reference", "cpu")


@thorough(is_pytorchs)
@over_norm_types
def test_matches_exact_for_all_shapes(target, dtype, shapes, norm_type):
    check_shapes(target, dtype, norm_type, shapes)


@pytest.mark.parametrize("control", [*CONTROLS.values(), wrong_norm], ids=[*CONTROLS, "wrong_norm"])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_a_wrong_clip_is_noticed(dtype, norm_type, control):
    must_fail(control, check_shapes, REFERENCE, dtype, norm_type)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_truncation_is_noticed(narrow):
    must_fail(truncated, check_shapes, REFERENCE, narrow, 2.0)


@over("max_norm", MAX_NORMS)
def test_matches_exact_for_all_max_norms(target, dtype, max_norm):
    check_clip(target, [randn(shape, dtype, target.device) for shape in [(33, 31), (127,)]], max_norm=max_norm)


@over_layouts
def test_matches_exact_for_all_layouts(target, dtype, layout):
    whole = randn((6, 7, 8, 9), dtype, target.device)
    view = layout(whole)
    for norm_type in KERNEL_NORM_TYPES:
        norm = trainops.get_total_norm([view], norm_type, backend=target.backend)
        assert_norm(target, norm, [view], norm_type, str(norm_type))
    outside = whole.clone()
    layout(outside).zero_()
    check_clip(target, [view, randn((5,), dtype, target.device)])
    view.zero_()
    assert same_bits(whole, outside), "elements outside the view were written"


@thorough(is_pytorchs)
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


def test_an_infinite_part_of_a_complex_number_leaves_the_other_part_alone(target):
    [param] = with_grads([torch.tensor([complex(torch.inf, 3.0), 4.0], device=target.device)])
    trainops.clip_grads_with_norm_(param, 1.0, torch.tensor(2.0, device=target.device), backend=target.backend)
    expected = torch.tensor([[torch.inf, 1.5], [2.0, 0.0]], device=target.device)
    torch.testing.assert_close(torch.view_as_real(param.grad), expected)


@pytest.mark.parametrize("size", [1, 2, 127])
@over_norm_types
def test_matches_exact_for_lazily_negated(target, norm_type, size):
    negated = torch.randn(size, dtype=torch.complex64, device=target.device).conj().imag
    assert negated.is_neg()
    check_clip(target, [negated, torch.randn(5, device=target.device)], norm_type)


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


@thorough(is_pytorchs)
@over_norm_types
def test_norm_of_expanded(target, dtype, norm_type):
    tensors = [randn((7, 1), dtype, target.device).expand(7, 9), randn((), dtype, target.device).expand(33)]
    norm = trainops.get_total_norm(tensors, norm_type, backend=target.backend)
    assert_norm(target, norm, tensors, norm_type)


SPLITS = {
    "even": lambda x: x.split(1000),
    "uneven": lambda x: x.tensor_split([1, 4, 64, 8192]),
    "many": lambda x: [*x[:300].split(1), x[300:]],
}


@thorough(is_pytorchs)
@interpreted(lambda dtype, split, **_: dtype == torch.float32 or split is not SPLITS["many"])
@over("split", SPLITS)
@over_norm_types
def test_norm_is_invariant_under_splitting(target, dtype, norm_type, split):
    whole = randn((10_001,), dtype, target.device)
    for tensors in ([whole], split(whole)):
        norm = trainops.get_total_norm(tensors, norm_type, backend=target.backend)
        assert_norm(target, norm, tensors, norm_type)


@interpreted(lambda dtype, **_: dtype == torch.bfloat16)
@over_kernels
@pytest.mark.parametrize("norm_type", KERNEL_NORM_TYPES)
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
@pytest.mark.parametrize("norm_type", KERNEL_NORM_TYPES)
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
