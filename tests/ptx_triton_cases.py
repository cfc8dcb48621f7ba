"""Tests of the ops once more, with Triton's kernels executed as PTX. test_ptx_triton.py runs them.

In a process of their own, with ``TRITON_INTERPRET=0``: ``python -m pytest tests/ptx_triton_cases.py``. A report of
what was launched, and of barriers without which all went well, is written to the file that TRAINOPS_PTX_REPORT names.
"""

import importlib
import json
import os
from pathlib import Path

import exact
import norms
import pytest
import test_adamw
import test_adamw_types
import test_codes
import test_drop_path_gradients
import test_drop_path_rows
import test_ema_fused
import test_grad_scale
import test_masters
import test_stochastic_averages
import test_stochastic_rounding
import torch
from contract import assert_contract, same_bits
from ptx.triton_driver import WithoutBarriers, through_ptx
from ptx_fixtures import OPS, once_more
from targets import INTERPRETER, thorough
from test_cuda import MIXED
from training import ADAMW, RULES, SGD, at_offset

import trainops
from benchmarks import triton_variants
from trainops.adapters import select

MORE = {
    test_adamw_types: ["a_step_of_any_types_is_exact"],
    test_codes: ["backends_have_the_same_codes", "backends_have_the_same_codes_of_second_moments"],
    test_drop_path_gradients: ["gradients_of_mixed_dtypes"],
    test_drop_path_rows: ["rows_of_the_branch", "rows_of_the_gradient"],
    test_ema_fused: ["fused_is_step_then_update"],
    test_grad_scale: ["a_grad_scale_is_taken_out"],
}
globals().update(once_more(OPS, MORE))

ARCHITECTURE = int(os.environ.get("TRAINOPS_PTX_ARCHITECTURE", "80"))
SEED = int(os.environ.get("TRAINOPS_PTX_SEED", "0"))


@pytest.fixture(scope="session")
def machine():
    takes_out = "TRAINOPS_PTX_BARRIERS" in os.environ
    with through_ptx(ARCHITECTURE, WithoutBarriers if takes_out else None) as (machine, launches):
        yield machine, launches
    if path := os.environ.get("TRAINOPS_PTX_REPORT"):
        Path(path).write_text(json.dumps([description(launches, key) for key in launches.kernels]))


def description(launches, key):
    """A kernel's name, the types of its arguments, its constants, and the barriers that were of no use."""
    source = launches.kernels[key].src
    constants = {source.fn.arg_names[place[0]]: str(value) for place, value in source.constants.items()}
    unnoticed = [site[2:] for site in launches.unnoticed.get(key, [])]
    return [launches.kernels[key].name, source.signature, constants, unnoticed]


@pytest.fixture(autouse=True)
def active(machine, request):
    """Barriers are taken out in the tests that take every path between them."""
    machine, launches = machine
    launches.is_on = "rounds" in request.node.name
    with machine.schedule(resident=4, seed=SEED, races=True):
        yield


@pytest.fixture(params=[INTERPRETER], ids=["triton-ptx"])
def target(request):
    return request.param


# Several rounds of every loop, with and without a mask: barriers stand between rounds.

LONG = (3, 1025)  # three blocks of the narrowest type, and three elements
PLACES = {"aligned": 0, "unaligned": 1}
over_places = pytest.mark.parametrize("place", PLACES)


def long(dtype, place, scale=1.0):
    return at_offset((scale * torch.randn(LONG, dtype=torch.float64)).to(dtype), PLACES[place])


@over_places
def test_rounds_of_adamw(target, dtype, place, monkeypatch):
    monkeypatch.setattr(test_adamw_types, "SHAPES", (LONG,))
    test_adamw_types.check_types(target, (dtype,) * 5, PLACES[place] == 0)


@thorough(test_adamw_types.is_no_sample)
@test_adamw_types.over_types
@over_places
def test_rounds_of_adamw_of_any_types(target, types, place, monkeypatch):
    monkeypatch.setattr(test_adamw_types, "SHAPES", (LONG,))
    test_adamw_types.check_types(target, types, PLACES[place] == 0)


@pytest.mark.parametrize("master", [None, "split"])
@over_places
def test_rounds_of_codes(target, place, master):
    how = {"shapes": (LONG,), "offset": PLACES[place], "state_dtype": "int8", "amsgrad": True, "master": master}
    dtype = torch.float32 if master is None else torch.bfloat16
    test_codes.check_steps(target, ADAMW, dtype, 2, **how)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@over_places
def test_rounds_of_norms(target, dtype, norm_type, place):
    """Of numbers whose squares and sums float32 does not hold: those are summed up once more."""
    x = long(dtype, place, {torch.float64: 1e100, torch.float16: 3e4}.get(dtype, 1e38))
    if dtype == torch.float16:
        x[1, 7] = float("inf")
    got = trainops.get_total_norm([x], norm_type, backend=target.backend)
    true = exact.norm([exact.exact(x)], norm_type)
    assert_contract(got, true, torch.linalg.vector_norm(x.double(), norm_type).to(got.dtype), str(norm_type))


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_rounds_of_norms_in_every_type(target, norm_type):
    """The same values give the same bits, though threads take other elements of other types."""
    tensors = [norms.in_every_type(3 * 1025) for _ in range(10)]
    expected = norms.reduced(target, tensors, norm_type)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for offset in PLACES.values():
            placed = [at_offset(x.to(dtype), offset) for x in tensors]
            assert all(map(same_bits, norms.reduced(target, placed, norm_type), expected))


@over_places
def test_rounds_of_scaling_and_clamping(target, dtype, place):
    x = long(dtype, place)
    p = torch.nn.Parameter(torch.zeros_like(x))
    p.grad = at_offset(x, PLACES[place])
    trainops.clip_grads_with_norm_([p], 0.5, torch.tensor(1.0), backend=target.backend)
    true = exact.exact(x) * exact.clip_coefficient(exact.ONE, 0.5)
    assert_contract(p.grad, true)
    p.grad = at_offset(x, PLACES[place])
    trainops.clip_grad_value_([p], 0.5, backend=target.backend)
    assert torch.equal(p.grad, x.clamp(-0.5, 0.5))


@pytest.mark.parametrize("dtypes", [*[(x, x) for x in test_adamw_types.DTYPES], *[x[:2] for x in MIXED]], ids=str)
@over_places
def test_rounds_of_ema(target, dtypes, place):
    average, param = long(dtypes[0], place), long(dtypes[1], place)
    true = exact.ema(exact.exact(average), exact.exact(param), 0.9)
    trainops.ema_update_([average], [param], 0.9, backend=target.backend)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    test_adamw_types.assert_stored(average, true, wide, "average")


# Chunks in one sample and chunks of two, in units of eight elements and of one.
DROP_PATH = {"packs": (3, 43, 304), "one_by_one": (3, 41, 301)}


@pytest.mark.parametrize(
    "dtypes", [*[(x, x) for x in test_adamw_types.DTYPES], (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("layer_scaled", [False, True])
@pytest.mark.parametrize("shape", DROP_PATH.values(), ids=DROP_PATH)
def test_rounds_of_drop_path(target, shape, layer_scaled, dtypes):
    rest, branch, layer_scale = test_drop_path_gradients.operands(dtypes[0], target.device, shape[-1:], shape)
    branch = branch.to(dtypes[1])
    test_drop_path_gradients.check_gradients(target, rest, branch, layer_scale if layer_scaled else None, 0.5)
    mask = torch.tensor([2.0, 0.0, 2.0], dtype=dtypes[1])[:, None, None]
    assert torch.equal(select(target.backend, target.device).drop_path(branch, mask, None, None, None), branch * mask)


@pytest.mark.parametrize("layer_scaled", [False, True])
@pytest.mark.parametrize("shape", DROP_PATH.values(), ids=DROP_PATH)
def test_rounds_of_drop_path_of_rows(target, shape, layer_scaled, dtype):
    how = (shape, "contiguous", (dtype,) * 3)
    test_drop_path_rows.check_rows_of_the_branch(target, *how, layer_scaled)
    for branch_given, scaled in test_drop_path_rows.BACKWARDS:
        if scaled == layer_scaled:
            test_drop_path_rows.check_rows_of_the_gradient(target, *how, branch_given, scaled)


# What the ops' tests have not of the variants that benchmarks/triton_variants.py lists


def over_variants(kernel):
    return pytest.mark.parametrize(
        "variant", [x for x in triton_variants.variants() if x.kernel == kernel], ids=lambda variant: variant.label
    )


def types_of(variant, *names):
    """The types of columns, None for those that are absent."""
    types = [variant.constants[f"{name}_TYPE"] for name in names]
    return [None if x is None else getattr(torch, x[1:]) for x in types]


def check_codes(target, variant, rule):
    """Two steps of a variant with 8-bit state."""
    states = [None if x is None else "int8" if x.itemsize == 1 else x for x in types_of(variant, "STATE0", "STATE1")]
    param, average, master, third = types_of(variant, "PARAM", "AVERAGE", "MASTER", "STATE2")
    options = {"momentum": 0.9} if rule is SGD else {"amsgrad": third is not None}
    options |= {"state_dtype": states[0] if states[1] in (states[0], None) else tuple(states), "skip_nonfinite": True}
    options |= {"average": average, "master": None if master is None else "split"}
    options |= {"stochastic_rounding": variant.constants["STOCHASTIC"] > 0}
    test_codes.check_steps(target, rule, param, 2, (LONG,), **options)


@over_variants("update")
def test_every_update(target, variant, monkeypatch):
    """With a step that may be skipped, as in all variants."""
    rule = next(rule for rule in RULES if rule.ours.__name__.lower() == variant.label.partition(",")[0])
    if variant.constants["CODES"]:
        check_codes(target, variant, rule)
        return
    if variant.constants["STOCHASTIC"]:
        state, average = types_of(variant, "STATE0", "AVERAGE")
        options = {"state_dtype": state, "average": average, "skip_nonfinite": True}
        test_stochastic_rounding.check_neighbours(target, rule, 2, (LONG,), **options)
        return
    param, master = types_of(variant, "PARAM", "MASTER")
    if master is not None:
        monkeypatch.setattr(test_masters, "SHAPES", (LONG,))
        kind = "split" if master == torch.int16 else "float32", param
        amsgrad = variant.constants["STATE2_TYPE"] is not None
        test_masters.check_as_float32(target, kind, 2, amsgrad=amsgrad, skip_nonfinite=True)
        return
    types = types_of(variant, "PARAM", "STATE0", "STATE1", "STATE2", "AVERAGE")
    test_adamw_types.check_types(target, types, True, skip_nonfinite=True)


@over_variants("ema")
def test_every_ema(target, variant):
    """The same for a step that is skipped, and one that could have been."""
    if variant.constants["SEED"] is not None:
        test_stochastic_averages.check_neighbours(target, 0.9, types_of(variant, "TENSOR")[0], (LONG,))
        return
    average, param = (torch.randn(9001, dtype=torch.float64).to(x) for x in types_of(variant, "AVERAGE", "TENSOR"))
    results = [average.clone() for _ in range(3)]
    for result, skip in zip(results, (None, torch.tensor(False), torch.tensor(True)), strict=True):
        select(target.backend, target.device).ema_([result], [param], 0.9, skip)
    assert not same_bits(results[0], average)
    assert same_bits(results[0], results[1])
    assert same_bits(results[2], average)


def test_a_known_norm(target, monkeypatch):
    """As where parameters lie on several devices: PyTorch takes the norm."""
    monkeypatch.setattr("trainops.optimizer.all_plain", lambda _: False)
    test_grad_scale.check_scale(target, test_grad_scale.OPTIONS["clip_and_skip"], torch.tensor(test_grad_scale.SCALE))


def test_rows_of_the_gradient_of_a_narrower_branch(target):
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    test_drop_path_rows.check_rows_of_the_gradient(target, (12, 50, 24), "contiguous", dtypes, True, True)


# What must be noticed


def test_the_count_of_skipped_steps_without_its_barrier(target):
    """All threads of `plan` load the count, and one stores it."""
    plan = importlib.import_module("trainops.triton_kernels").update.plan
    source = plan.src
    assert source.count("tl.debug_barrier()") == 1
    plan._unsafe_update_src(source.replace("tl.debug_barrier()", "pass"))
    plan.device_caches.clear()
    try:
        with pytest.raises(RuntimeError, match=r"plan: race in global memory: .*update\.py"):
            test_adamw.test_a_skipped_step_changes_no_bit(target, torch.float32, float("nan"), "both")
    finally:
        plan._unsafe_update_src(source)
        plan.device_caches.clear()
    test_adamw.test_a_skipped_step_changes_no_bit(target, torch.float32, float("nan"), "both")
