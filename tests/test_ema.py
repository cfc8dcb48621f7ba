"""ema_update_: numbers, dtypes, layouts, infinities, and input that makes no sense."""

import copy
import itertools

import pytest
import torch
from contract import DTYPES, assert_contract, exact, same_bits, same_values
from controls import CONTROLS, must_fail, truncated, wrong_decay
from exact import ema as exact_ema
from models import over_averages, over_layouts
from targets import INTERPRETER, REFERENCE, interpreted, over
from torch import nn
from training import randn

import trainops

INF, NAN = float("inf"), float("nan")
MOVING_DECAYS = [0.0, 0.3, 0.9, 0.9999]
over_decays = pytest.mark.parametrize("decay", [*MOVING_DECAYS, 1.0])
over_moving_decays = pytest.mark.parametrize("decay", MOVING_DECAYS)


def far_away(shape, dtype, target, decay):
    """A tensor so far from normal numbers that averages of these move by several units in the last place."""
    return (0.4 / (1 - decay) + randn(shape, torch.float64, target.device)).to(dtype)


def far_apart(shapes, average_dtype, dtype, target, decay=0.9):
    """Averages, and tensors for them to follow."""
    averages = [randn(shape, average_dtype, target.device) for shape in shapes]
    return averages, [far_away(shape, dtype, target, decay) for shape in shapes]


def check_update(target, averages, tensors, decay):
    torchs = copy.deepcopy(averages)
    true = [exact_ema(exact(average), exact(x), decay) for average, x in zip(averages, tensors, strict=True)]
    trainops.ema_update_(averages, tensors, decay, backend=target.backend)
    torch._foreach_lerp_(torchs, [x.to(y.dtype) for x, y in zip(tensors, torchs, strict=True)], 1 - decay)
    for i, average in enumerate(averages):
        assert_contract(average, true[i], torchs[i], f"average {i}")


def test_matches_exact_for_all_shapes(target, dtype, shapes):
    check_update(target, *far_apart(shapes, dtype, dtype, target), 0.9)


@interpreted(lambda dtypes, decay: dtypes[0] == dtypes[1] or decay == 0.9)
@over_moving_decays
@pytest.mark.parametrize("dtypes", [*zip(DTYPES, DTYPES, strict=True), *itertools.permutations(DTYPES, 2)], ids=str)
def test_matches_exact_for_all_decays_and_dtypes(target, dtypes, decay):
    shapes = [(33, 31), (), (0,), (1025,)]
    averages, tensors = far_apart(shapes, *dtypes, target, decay)
    check_update(target, averages, tensors, decay)


@pytest.mark.parametrize("average_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_averages_of_float64_are_rounded_once(target, average_dtype):
    """The arithmetic is in float64 where either is, so that nothing is lost before the rounding."""
    (average,), (x,) = far_apart([(1025,)], average_dtype, torch.float64, target)
    true = exact_ema(exact(average), exact(x), 0.9).value
    trainops.ema_update_([average], [x], 0.9, backend=target.backend)
    expected = torch.from_numpy(true.astype("float64"))
    torch.testing.assert_close(average.cpu(), expected.to(average_dtype), rtol=0, atol=0)


def test_matches_exact_for_several_dtypes_at_once(target):
    averages, tensors = ([randn((127,), dtype, target.device) for dtype in 2 * DTYPES] for _ in range(2))
    check_update(target, averages, tensors[::-1], 0.9)


@over_layouts
def test_matches_exact_for_all_layouts(target, dtype, layout):
    whole, tensor = (randn((6, 7, 8, 9), dtype, target.device) for _ in range(2))
    outside = whole.clone()
    layout(outside).zero_()
    check_update(target, [layout(whole)], [layout(tensor)], 0.9)
    check_update(target, [layout(whole)], [layout(tensor).contiguous()], 0.9)
    check_update(target, [layout(whole).contiguous()], [layout(tensor)], 0.9)
    layout(whole).zero_()
    assert same_bits(whole, outside), "elements outside the view were written"


def check_many_updates(target, dtype, shadow, decay, steps=100):
    """In 16 bits each by itself, else all together."""
    ours = randn((33, 31), shadow or dtype, target.device)
    torchs, followed = ours.clone(), [far_away((33, 31), dtype, target, decay) for _ in range(steps)]
    average = exact(ours)
    for x in followed:
        if ours.dtype.itemsize == 2:
            average = exact(ours)
        average = exact_ema(average, exact(x), decay)
        trainops.ema_update_([ours], [x], decay, backend=target.backend)
        if ours.dtype.itemsize == 2:
            assert_contract(ours, average)
        torchs.lerp_(x.to(ours.dtype), 1 - decay)
        average = average.value
    assert_contract(ours, average, torchs)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
@over_averages
def test_matches_exact_after_many_steps(target, dtype, shadow, decay):
    check_many_updates(target, dtype, shadow, decay, steps=100 if target != INTERPRETER else 20)


# Controls: what the checks above must notice.


def check_shape(target, dtype, average_dtype, decay):
    averages, tensors = far_apart([(33, 31)], average_dtype, dtype, target, decay)
    check_update(target, averages, tensors, decay)


UPDATE_CONTROLS = CONTROLS | {"wrong_decay": wrong_decay}


@over_moving_decays
@pytest.mark.parametrize(("average_dtype", "dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@over("control", UPDATE_CONTROLS)
def test_a_wrong_update_is_noticed(dtype, average_dtype, decay, control):
    must_fail(control, check_shape, REFERENCE, dtype, average_dtype, decay)


@pytest.mark.parametrize("average_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truncation_is_noticed(dtype, average_dtype):
    must_fail(truncated, check_shape, REFERENCE, dtype, average_dtype, 0.9)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
@over_averages
@over("control", UPDATE_CONTROLS)
def test_many_wrong_updates_are_noticed(dtype, shadow, control, decay):
    must_fail(control, check_many_updates, REFERENCE, dtype, shadow, decay)


def every_pair(dtype, device):
    """Each value with each: two tensors."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 3e4, -3e4, 1e-40, INF, -INF, NAN], device=device).to(dtype)
    extremes = torch.finfo(dtype).max * torch.tensor([1.0, -1.0], dtype=torch.float64, device=device)
    values = torch.cat([values, extremes.to(dtype)])
    return values.repeat_interleave(len(values)), values.repeat(len(values))


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_both_ends_are_exact(target, dtype, decay):
    average, x = every_pair(dtype, target.device)
    expected = [x, average.clone()][int(decay)]
    trainops.ema_update_([average], [x], decay, backend=target.backend)
    assert same_values(average, expected)


@over_decays
def test_equal_values_stay(target, dtype, decay):
    average = every_pair(dtype, target.device)[0]
    x = average.clone()
    trainops.ema_update_([average], [x], decay, backend=target.backend)
    assert same_values(average, x)


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_non_finite_is_torchs(target, dtype, decay):
    average, x = every_pair(dtype, target.device)
    unequal = average != x  # equal infinities are NaN in PyTorch
    average, x = average[unequal], x[unequal]
    torchs = average.clone()
    trainops.ema_update_([average], [x], decay, backend=target.backend)
    torch._foreach_lerp_([torchs], [x], 1 - decay)
    torch.testing.assert_close(average, torchs, equal_nan=True)


@pytest.mark.parametrize("conjugated", [*itertools.product([False, True], repeat=2)], ids=str)
def test_complex(target, conjugated):
    pair = torch.randn(2, 127, dtype=torch.complex64, device=target.device)
    average, x = (z.conj() if lazily else z for z, lazily in zip(pair, conjugated, strict=True))
    expected = average.resolve_conj().clone().lerp_(x, 0.1)
    trainops.ema_update_([average], [x], 0.9, backend=target.backend)
    torch.testing.assert_close(average.resolve_conj(), expected)


@pytest.mark.parametrize("size", [1, 127])
def test_lazily_negated(target, size):
    average, x = torch.randn(2, size, dtype=torch.complex64, device=target.device).conj().imag
    assert average.is_neg()
    check_update(target, [average], [x], 0.9)


def test_takes_iterables_and_nothing(target):
    average = torch.zeros(3, device=target.device)
    trainops.ema_update_(iter([average]), (torch.ones_like(x) for x in [average]), 0.75, backend=target.backend)
    assert average.tolist() == [0.25] * 3
    assert trainops.ema_update_([], [], 0.5, backend=target.backend) is None


F, N = torch.ones(3), torch.ones(3, dtype=torch.int64)
BAD_UPDATES = {
    "decay_below": ([F], -0.1, r"decay must be in \[0, 1\], got -0.1"),
    "decay_above": ([F], 1.1, r"decay must be in \[0, 1\], got 1.1"),
    "decay_nan": ([F], NAN, r"decay must be in \[0, 1\], got nan"),
    "decay_inf": ([F], INF, r"decay must be in \[0, 1\], got inf"),
    "shorter": ([], 0.5, "2 averages for 0 tensors"),
    "longer": ([F, F, F], 0.5, "2 averages for 3 tensors"),
    "shape": ([F, torch.ones(4)], 0.5, r"tensor 1 has shape \(4,\), but its average has shape \(3,\)"),
    "broadcastable": ([F, torch.ones(1, 3)], 0.5, r"tensor 1 has shape \(1, 3\)"),
    "two_shapes": ([torch.ones(()), torch.ones(4)], 0.5, r"tensor 0 has shape \(\)"),
    "integers": ([F, N], 0.5, "tensor 1 is torch.int64, but its average is torch.float32"),
    "booleans": ([F, N.bool()], 0.5, "tensor 1 is torch.bool"),
    "complex": ([F, F.to(torch.complex64)], 0.5, "tensor 1 is torch.complex64, but its average is torch.float32"),
    "device": ([F, F.to("meta")], 0.5, "tensor 1 is on meta, but its average on"),
}


@over(("tensors", "decay", "message"), BAD_UPDATES)
def test_bad_update_changes_nothing(target, tensors, decay, message):
    averages = [torch.zeros(3, device=target.device) for _ in range(2)]
    tensors = [x if x.is_meta else x.to(target.device) for x in tensors]
    with pytest.raises(ValueError, match=message):
        trainops.ema_update_(averages, tensors, decay, backend=target.backend)
    assert all(same_bits(x, torch.zeros(3)) for x in averages)


def test_averages_of_integers_are_refused(target):
    with pytest.raises(ValueError, match=r"tensor 0 is torch\.int64; averages are of floating-point numbers"):
        trainops.ema_update_([N.clone()], [N], 0.5, backend=target.backend)


@pytest.mark.parametrize("averages", [[], [F]], ids=["empty", "one"])
def test_unknown_backend_changes_nothing(monkeypatch, averages):
    averages = [x.clone() for x in averages]
    with pytest.raises(ValueError, match=f"nonsense.*{'.*'.join(trainops.backends())}"):
        trainops.ema_update_(averages, [2 * x for x in averages], 0.5, backend="nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        trainops.EMA(nn.Linear(2, 2), backend="nonsense")
    monkeypatch.setenv("TRAINOPS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        trainops.ema_update_([F.clone()], [2 * F], 0.5)
    assert all(same_bits(x, F) for x in averages)
