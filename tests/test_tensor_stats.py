"""Statistics of tensors: the numbers on every backend, against exact ones, and how parts of them join."""

import importlib
import math

import numpy as np
import pytest
import torch
from contract import DTYPES, exact
from exact import magnitudes
from process_groups import forks, on_ranks
from targets import INTERPRETER, interpreted, over, over_kernels

import trainops
from trainops import TensorStats, reference_statistics, tensor_stats
from trainops.statistics import STATISTICS

# Of float32 and 16 bits; what float64 loses is far less.
SHARE = 2.0**-20


def exact_stats(x):
    """Each statistic in extended precision; and the mean of the magnitudes, which bounds what sums may lose."""
    every = exact(x).ravel()
    x = every[np.isfinite(every)]
    some = len(x) > 0
    nan = np.longdouble(np.nan)
    return {
        "min": x.min() if some else nan,
        "max": x.max() if some else nan,
        "mean": x.mean() if some else nan,
        "std": np.sqrt(((x - x.mean()) ** 2).mean()) if some else nan,
        "l1_norm": np.abs(x).sum(),
        "l2_norm": np.sqrt((x**2).sum()),
        "amax": np.abs(x).max(initial=0),
        "zeros": (x == 0).sum(),
        "nonfinite": len(every) - len(x),
        "numel": len(every),
    }, (np.abs(x).mean() if some else 0.0)


def assert_stats(stats, tensors):
    assert len(stats) == len(tensors)
    for i, x in enumerate(tensors):
        true, magnitude = exact_stats(x)
        share = 2.0**-45 if x.dtype in (torch.float64, torch.complex128) else SHARE
        allowed = {
            "mean": share * magnitude,
            "std": share * (true["std"] + magnitude),
            "l1_norm": share * true["l1_norm"],
            "l2_norm": share * true["l2_norm"],
        }
        for name in STATISTICS:
            got, expected = getattr(stats, name)[i].item(), true[name]
            if math.isnan(expected):
                assert math.isnan(got), (name, i)
            else:
                assert abs(got - expected) <= allowed.get(name, 0), (name, i, got, expected)


def exact_histogram(x):
    found = magnitudes(x) if not x.is_complex() else np.abs(exact(x)).ravel()
    found = found[np.isfinite(found) & (found > 0)]
    bins = np.clip(np.frexp(found)[1] - 1 + 127, 0, TensorStats.bins - 1)
    return np.bincount(bins.ravel(), minlength=TensorStats.bins)


def random_tensors(target, dtype, shapes):
    return [torch.randn(shape).to(dtype).to(target.device) for shape in shapes]


@interpreted(lambda dtype, shapes: dtype in (torch.float32, torch.bfloat16) or shapes == "mixed")
def test_match_exact_ones(target, dtype, shapes):
    tensors = random_tensors(target, dtype, shapes)
    stats = tensor_stats(tensors, histogram=True, backend=target.backend)
    assert_stats(stats, tensors)
    for i, x in enumerate(tensors):
        assert (stats.histogram[i].cpu().numpy() == exact_histogram(x)).all()


AWKWARD = {
    "tiny": lambda: torch.randn(5000) * 1e-23,
    "subnormal": lambda: torch.randn(5000) * 1e-40,
    "large": lambda: torch.randn(5000) * 1e30,
    "largest": lambda: torch.tensor([3e38, -3e38, 3e38] * 1000),
    "far_from_zero": lambda: 1000.0 + torch.randn(70001),
    "one_outlier": lambda: torch.cat([torch.randn(4097) * 1e-3, torch.tensor([1e4])]),
    "first_is_an_outlier": lambda: torch.cat([torch.tensor([1e4]), torch.randn(70001) * 1e-3]),
    "constant": lambda: torch.full((4099,), 0.1),
    "zeros": lambda: torch.zeros(2050),
    "negative_zero": lambda: torch.tensor([-0.0, 0.0, 1.0]),
    "non_finite": lambda: torch.cat([torch.randn(9000), torch.tensor([math.inf, -math.inf, math.nan, 2.0])]),
    "only_non_finite": lambda: torch.full((33,), math.nan),
    "two_scales": lambda: torch.cat([torch.randn(66000) * 1e-22, torch.randn(66000)]),
}


@over("make", AWKWARD)
@interpreted(lambda make, **_: True)
def test_awkward_numbers(target, make):
    tensors = [make().to(target.device), torch.ones(3, device=target.device)]
    stats = tensor_stats(tensors, True, backend=target.backend)
    assert_stats(stats, tensors)
    for i, x in enumerate(tensors):
        assert (stats.histogram[i].cpu().numpy() == exact_histogram(x)).all()


def test_a_difference_of_squares_would_not_do(target):
    """A control of the bound on deviations: the textbook's other formula in float32, which it must reject."""
    x = 1000.0 + torch.randn(70001)
    rows = reference_statistics.rows_of([x], False)[0]
    rows[0, reference_statistics.M2] = (x.square().sum() - x.sum().square() / len(x)).item()
    with pytest.raises(AssertionError):
        assert_stats(TensorStats(rows), [x])


def test_unaligned_and_strided(target):
    x = torch.randn(3001, device=target.device)
    tensors = [x[1:], x[3:].bfloat16()[1:], x[:3000].view(30, 100).t(), x[::3], torch.randn(2, 3, 4, 4).to(x)]
    tensors[-1] = tensors[-1].to(memory_format=torch.channels_last)
    tensors.append(torch.randn(50, dtype=torch.complex64).to(target.device))
    stats = tensor_stats(tensors, True, backend=target.backend)
    assert_stats(stats, tensors)


@over_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_types_that_hold_a_number_agree(target, dtype):
    x = torch.randn(9001).to(dtype).to(target.device)
    one, other = (tensor_stats(y, backend=target.backend).rows for y in (x, x.float()))
    assert torch.equal(one, other)


def test_parts_join(target, dtype):
    whole = torch.randn(10007).to(dtype).to(target.device)
    parts = [tensor_stats(x, True, backend=target.backend) for x in whole.split([7, 3000, 0, 7000])]
    joined, total = parts[0].merge(*parts[1:]), tensor_stats([whole], True, backend=target.backend)
    assert_stats(joined, [whole])
    assert torch.equal(joined.histogram, total.histogram)
    every = tensor_stats(list(whole.split([7, 3000, 7000])), True, backend=target.backend).total()
    assert_stats(every, [whole])
    assert torch.equal(every.histogram, total.histogram)


def shards_of_ranks(rank, ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(5)
    tensors = [torch.randn(7, 5), torch.randn(33) + 100, torch.randn(3, 2), torch.randn(9)]
    own = [x[rank::ranks] for x in tensors]
    assert_stats(tensor_stats(own).over(), tensors)
    mesh = init_device_mesh("cpu", (ranks,))
    placements = [[Shard(0)], [Shard(0)], [Replicate()]]
    sharded = [distribute_tensor(x, mesh, at) for x, at in zip(tensors, placements, strict=False)]
    for found in (sharded, [*sharded, tensors[3]]):
        stats = tensor_stats(found, True)
        assert_stats(stats, tensors[: len(found)])
        for i, x in enumerate(tensors[: len(found)]):
            assert (stats.histogram[i].numpy() == exact_histogram(x)).all()


@forks
def test_two_ranks_equal_one_process(tmp_path):
    on_ranks(2, tmp_path, shards_of_ranks, 2)


def test_to_dict_has_flat_names():
    stats = tensor_stats([torch.tensor([3.0, -4.0]), torch.zeros(2)])
    found = stats.to_dict(["a", "b"], "grad/")
    assert found["grad/l2_norm/a"] == 5.0
    assert found["grad/amax/a"] == 4.0
    assert found["grad/zeros/b"] == 2.0
    assert set(stats.to_dict()) == {f"{name}/{i}" for name in STATISTICS for i in range(2)}
    with pytest.raises(ValueError, match="1 names for 2 tensors"):
        stats.to_dict(["a"])


def test_bad_input():
    with pytest.raises(TypeError, match=r"tensors\[1\] must be dense"):
        tensor_stats([torch.ones(2), torch.ones(2, dtype=torch.int64)])
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    for x in (nested, torch.ones(2, device="meta"), torch.ones(2).to(torch.float8_e4m3fn)):
        with pytest.raises(TypeError, match=r"tensors\[1\] is nested, without memory or of less than 16 bits"):
            tensor_stats([torch.ones(2), x])
    with pytest.raises(TypeError, match=r"tensors\[0\] must be a tensor"):
        tensor_stats([1.0])
    with pytest.raises(ValueError, match="do not belong together"):
        tensor_stats([torch.ones(2)]).merge(tensor_stats([torch.ones(2)] * 2))
    with pytest.raises(ValueError, match="only some"):
        tensor_stats([torch.ones(2)]).merge(tensor_stats([torch.ones(2)], True))
    with pytest.raises(ValueError, match="unknown backend"):
        tensor_stats([torch.ones(2)], backend="gpu")
    nothing = tensor_stats([], True)
    assert len(nothing) == 0
    assert nothing.total().numel.tolist() == [0]
    assert nothing.to_dict() == {}


def test_dtypes_are_those_of_the_contract():
    assert len(DTYPES) >= 4
    assert trainops.tensor_stats is tensor_stats


def test_tensors_of_several_devices_keep_their_order():
    """Parts that were measured apart, as on several devices, are put back in order."""
    tensors = [torch.full((i + 1,), float(i)) for i in range(5)]
    indices = [0, 2, 4, 1, 3]
    parts = [tensor_stats([tensors[i] for i in part], True) for part in (indices[:3], indices[3:])]
    together = trainops.statistics._in_order(parts, indices)
    assert_stats(together, tensors)
    assert torch.equal(together.histogram, tensor_stats(tensors, True).histogram)


@over_kernels
def test_many_chunks_with_means_of_their_own(target, monkeypatch):
    """More than a block of a kernel joins at a time."""
    numel = 1_200_000
    if target.backend == "triton":
        monkeypatch.setattr(importlib.import_module("trainops.triton_kernels._common"), "MOMENTS_BLOCK", 2)
        numel = 5 * 8192 if target == INTERPRETER else numel
    x = (torch.linspace(-3, 5, numel) + 0.1 * torch.randn(numel)).to(target.device)
    assert_stats(tensor_stats([x], backend=target.backend), [x])
