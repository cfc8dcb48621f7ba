"""DropPath forward: timm's numbers from the same seed, and its residual add, for all dtypes, shapes and layouts."""

import math

import pytest
import torch
from contract import same_bits
from controls import must_fail
from drop_path_controls import two_dtypes, wrong_forward
from drop_path_formulas import (
    LAYER_SCALES,
    LAYOUTS,
    SOME_LAYER_SCALES,
    assert_equal,
    assert_same_bits,
    operands,
    seeded,
    timm_drop_path,
    timm_drop_path_add,
    with_broken_dropped_samples,
    with_specials,
)
from targets import INTERPRETER, REFERENCE, thorough

import trainops

pytestmark = pytest.mark.usefixtures("kernels_for_small_tensors")

# At 0.5 nothing is rounded: the mask is 2.
DROP_PROBS = [0.1, 0.3, 0.5, 1.0]
RANKS = [(64,), (16, 7), (8, 5, 33), (6, 3, 9, 5), (6, 2, 3, 2, 7)]

# Nothing, one element, samples of several chunks, channels that fill a tile of 1024 elements unevenly or exceed it.
ODD_SHAPES = [(0,), (0, 5), (4, 0, 3), (1,), (1025,), (3, 70001), (5, 7), (4, 11, 300), (3, 3, 1500), (3, 1025)]

MIXED_DTYPES = [
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, torch.float32),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float16),
    (torch.float64, torch.float32, torch.float32),
    (torch.float32, torch.float64, torch.float32),
    (torch.float32, torch.float32, torch.float64),
]

FAULTS = ["nothing", "last_element", "last_sample", "unscaled", "of_another_seed", "leaking"]
NARROW = [torch.bfloat16, torch.float16]

scaling = pytest.mark.parametrize("scale_by_keep", [True, False], ids=["scaled", "unscaled"])
some_scales = pytest.mark.parametrize("scale_shape", SOME_LAYER_SCALES.values(), ids=SOME_LAYER_SCALES)
faults = pytest.mark.parametrize("fault", FAULTS)


def generator_state(device):
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()


def check_drop_path(target, x, drop_prob, scale_by_keep=True):
    """timm's bits and strides, and its random numbers."""
    ours = seeded(trainops.drop_path, x, drop_prob, True, scale_by_keep, backend=target.backend)
    our_state = generator_state(target.device)
    timms = seeded(timm_drop_path, x, drop_prob, True, scale_by_keep)
    assert torch.equal(our_state, generator_state(target.device))
    assert ours.stride() == timms.stride()
    assert_same_bits(ours, timms)


def check_add(target, residual, branch, drop_prob=0.3, training=True, scale_by_keep=True, layer_scale=None):
    """The values, the dtype and the strides of PyTorch's ``residual + drop_path(branch * layer_scale)``."""
    args = (residual, branch, drop_prob, training, scale_by_keep, layer_scale)
    ours = seeded(trainops.drop_path_add, *args, backend=target.backend)
    timms = seeded(timm_drop_path_add, *args)
    assert ours.dtype == timms.dtype
    assert ours.stride() == timms.stride()
    assert_equal(ours, timms)


@thorough(lambda target, scale_by_keep, **_: target == INTERPRETER and not scale_by_keep)
@scaling
@pytest.mark.parametrize("shape", RANKS, ids=lambda shape: f"rank{len(shape)}")
def test_drop_path_is_timms(target, dtype, shape, scale_by_keep):
    x = with_specials(torch.randn(shape, device=target.device).to(dtype))
    for drop_prob in DROP_PROBS:
        check_drop_path(target, x, drop_prob, scale_by_keep)


@pytest.mark.parametrize(("drop_prob", "training"), [(0.0, True), (0.5, False), (1.0, False), (0.0, False)])
def test_drop_path_returns_its_input_where_nothing_can_drop(target, drop_prob, training):
    x = torch.randn(3, 2, device=target.device)
    state = generator_state(target.device)
    assert trainops.drop_path(x, drop_prob, training, backend=target.backend) is x
    out = trainops.drop_path_add(x, x, drop_prob, training, backend=target.backend)
    assert same_bits(out, x + x)
    assert torch.equal(state, generator_state(target.device))


@thorough(lambda scale_by_keep, scale_shape, **_: not scale_by_keep and scale_shape not in (None, (7,)))
@scaling
@pytest.mark.parametrize("scale_shape", LAYER_SCALES.values(), ids=LAYER_SCALES)
def test_drop_path_add_is_timms(target, dtype, scale_shape, scale_by_keep):
    residual, branch, layer_scale = operands(dtype, target.device, scale_shape)
    for drop_prob, training in [(0.0, True), (0.3, False), *((drop_prob, True) for drop_prob in DROP_PROBS)]:
        check_add(target, residual, branch, drop_prob, training, scale_by_keep, layer_scale)


def mixed_operands(device, dtypes, scale_shape):
    return (x.to(dtype) for x, dtype in zip(operands(torch.float32, device, scale_shape), dtypes, strict=True))


@pytest.mark.parametrize("scale_shape", [(7,), (1, 5, 1, 1), ()], ids=["last_dim", "channels", "scalar"])
@pytest.mark.parametrize("dtypes", MIXED_DTYPES, ids=str)
def test_mixed_dtypes_are_promoted_as_by_pytorch(target, dtypes, scale_shape):
    residual, branch, layer_scale = mixed_operands(target.device, dtypes, scale_shape)
    for training in (True, False):
        check_add(target, residual, branch, 0.1, training)
        check_add(target, residual, branch, 0.1, training, True, layer_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_shapes(target, dtype, shape):
    residual, branch, layer_scale = operands(dtype, target.device, shape[-1:], shape)
    check_add(target, residual, branch)
    check_add(target, residual, branch, layer_scale=layer_scale)
    check_drop_path(target, branch, 0.5)


def few_layouts(target, layout, **_):
    """Who takes what is decided in one place for all backends, and the reference serves the rest."""
    return target == INTERPRETER and layout not in ("contiguous", "channels_last", "unaligned")


@thorough(few_layouts)
@some_scales
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_kept_as_by_pytorch(target, layout, scale_shape):
    residual, branch, layer_scale = operands(torch.float32, target.device, scale_shape)
    branch = LAYOUTS[layout](branch)
    for residual_layout in LAYOUTS.values():
        check_add(target, residual_layout(residual), branch, layer_scale=layer_scale)
    check_drop_path(target, branch, 0.3)


def test_channels_last_3d(target):
    residual, branch, layer_scale = operands(torch.float32, target.device, (1, 3, 1, 1, 1), (4, 3, 5, 6, 2))
    residual, branch = (x.contiguous(memory_format=torch.channels_last_3d) for x in (residual, branch))
    check_add(target, residual, branch)
    check_add(target, residual, branch, layer_scale=layer_scale)


def test_lazily_negated(target):
    # A single element counts as contiguous whatever its stride.
    x = torch.complex(*torch.tensor([[0.0], [-3.0]], device=target.device)).conj().imag
    assert x.is_neg()
    check_drop_path(target, x, 0.1)
    check_add(target, x, x, 0.1)
    check_add(target, torch.ones_like(x), x, 0.1)


@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.9])
def test_rate_and_expectation(target, drop_prob):
    samples = 20_000
    kept = trainops.drop_path(torch.ones(samples, 3, device=target.device), drop_prob, True, backend=target.backend)
    assert torch.equal(kept[:, 0], kept[:, 2])
    # Six standard deviations of a binomial distribution.
    bound = 6 * math.sqrt(drop_prob * (1 - drop_prob) / samples)
    assert abs((kept[:, 0] == 0).double().mean().item() - drop_prob) < bound
    assert abs(kept.double().mean().item() - 1) < bound / (1 - drop_prob)


def check_dropped_samples(target, residual, branch, layer_scale):
    """The branch of a dropped sample has no effect, and its residual stays as it is."""
    dropped, broken = with_broken_dropped_samples(branch)
    options = {"layer_scale": layer_scale, "backend": target.backend}
    ours, expected = (seeded(trainops.drop_path_add, residual, x, 0.5, True, **options) for x in (broken, branch))
    assert_equal(ours, expected)
    assert_same_bits(ours[dropped], residual[dropped])


@some_scales
def test_a_dropped_samples_branch_is_of_no_effect(target, dtype, scale_shape):
    check_dropped_samples(target, *operands(dtype, target.device, scale_shape))


@pytest.mark.parametrize("layer_scale", [None, torch.tensor([math.inf])], ids=["no_scale", "infinite_scale"])
def test_a_dropped_sample_is_its_residual_to_the_bit(target, layer_scale):
    residual = torch.full((8, 3), -0.0, device=target.device)
    layer_scale = None if layer_scale is None else layer_scale.to(target.device)
    out = trainops.drop_path_add(residual, residual + 1, 1.0, True, True, layer_scale, backend=target.backend)
    assert same_bits(out, residual)


# Controls: what the checks above must notice.


@two_dtypes
@thorough(lambda drop_prob, **_: drop_prob == 0.5)
@faults
@pytest.mark.parametrize("drop_prob", [0.3, 0.5])
@pytest.mark.parametrize("shape", RANKS, ids=lambda shape: f"rank{len(shape)}")
def test_a_wrong_drop_path_is_noticed(dtype, shape, drop_prob, fault):
    x = with_specials(torch.randn(shape).to(dtype))
    must_fail(lambda: wrong_forward(fault), check_drop_path, REFERENCE, x, drop_prob)


@two_dtypes
@thorough(lambda drop_prob, **_: drop_prob == 0.5)
@faults
@pytest.mark.parametrize("drop_prob", [0.3, 0.5])
@pytest.mark.parametrize("scale_shape", LAYER_SCALES.values(), ids=LAYER_SCALES)
def test_a_wrong_add_is_noticed(dtype, scale_shape, drop_prob, fault):
    residual, branch, layer_scale = operands(dtype, "cpu", scale_shape)
    args = (REFERENCE, residual, branch, drop_prob)
    must_fail(lambda: wrong_forward(fault), check_add, *args, layer_scale=layer_scale)


@faults
@pytest.mark.parametrize("shape", [x for x in ODD_SHAPES if math.prod(x) > 1], ids=str)
def test_a_wrong_add_is_noticed_for_odd_shapes(shape, fault):
    residual, branch, layer_scale = operands(torch.bfloat16, "cpu", shape[-1:], shape)
    must_fail(lambda: wrong_forward(fault), check_add, REFERENCE, residual, branch, layer_scale=layer_scale)
    must_fail(lambda: wrong_forward(fault), check_drop_path, REFERENCE, branch, 0.5)


@faults
@pytest.mark.parametrize("dtypes", MIXED_DTYPES, ids=str)
def test_a_wrong_add_of_mixed_dtypes_is_noticed(dtypes, fault):
    residual, branch, layer_scale = mixed_operands("cpu", dtypes, (7,))
    must_fail(lambda: wrong_forward(fault), check_add, REFERENCE, residual, branch, 0.1, layer_scale=layer_scale)


@two_dtypes
@pytest.mark.parametrize("scale_shape", [shape for shape in LAYER_SCALES.values() if shape is not None], ids=str)
def test_a_forgotten_layer_scale_is_noticed(dtype, scale_shape):
    residual, branch, layer_scale = operands(dtype, "cpu", scale_shape)
    must_fail(
        lambda: wrong_forward("no_layer_scale"), check_add, REFERENCE, residual, branch, layer_scale=layer_scale
    )


@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("scale_shape", LAYER_SCALES.values(), ids=LAYER_SCALES)
def test_truncation_is_noticed(narrow, scale_shape):
    residual, branch, layer_scale = operands(narrow, "cpu", scale_shape)
    for scale_by_keep in (True, False):
        must_fail(
            lambda: wrong_forward("truncated"),
            check_add,
            REFERENCE,
            residual,
            branch,
            scale_by_keep=scale_by_keep,
            layer_scale=layer_scale,
        )
    must_fail(lambda: wrong_forward("truncated"), check_drop_path, REFERENCE, branch, 0.3)


@pytest.mark.parametrize("layout", ["channels_last", "permuted"])
def test_another_layout_is_noticed(layout):
    x = LAYOUTS[layout](operands(torch.float32, "cpu")[0])
    must_fail(lambda: wrong_forward("contiguous"), check_drop_path, REFERENCE, x, 0.3)


@two_dtypes
@pytest.mark.parametrize("fault", ["leaking", "of_another_seed"])
@some_scales
def test_a_dropped_sample_that_has_an_effect_is_noticed(dtype, scale_shape, fault):
    must_fail(lambda: wrong_forward(fault), check_dropped_samples, REFERENCE, *operands(dtype, "cpu", scale_shape))
