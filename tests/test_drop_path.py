"""DropPath: timm's numbers from the same seed, its residual add, and what autograd and compilers make of it."""

import copy
import functools
import importlib
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from contract import assert_contract, exact, same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import trainops
from trainops import reference
from trainops.backends import select

DROP_PROBS = [0.0, 0.1, 0.5, 1.0]
RANKS = [(64,), (16, 7), (8, 5, 33), (6, 3, 9, 5), (6, 2, 3, 2, 7)]
SHAPE = (8, 5, 6, 7)
LAYER_SCALES = {
    "no_scale": None,
    "last_dim": (7,),
    "channels": (1, 5, 1, 1),
    "one": (1,),
    "scalar": (),
    "per_sample": (8, 1, 1, 1),
    "full": SHAPE,
}
SOME_LAYER_SCALES = {name: LAYER_SCALES[name] for name in ("no_scale", "last_dim", "channels")}
OPERANDS = ("residual", "branch", "layer_scale")

# Nothing, one element, samples of several chunks, channels that fill a tile of 1024 elements unevenly or exceed it.
ODD_SHAPES = [(0,), (0, 5), (4, 0, 3), (1,), (1025,), (3, 70001), (5, 7), (4, 11, 300), (2, 3, 1500), (3, 1025)]

# Samples of one position and of many, channels that are no power of two, more than a program takes, one and none.
LAYER_SCALED_SHAPES = [
    (0, 5),
    (4, 0, 8),
    (4, 3, 0),
    (1, 1),
    (3, 7, 1),
    (700, 8),
    (16, 50, 24),
    (2, 9, 9, 96),
    (5, 3, 130),
    (2, 3, 1500),
]

# Shapes of a residual and a branch that broadcast, in either direction.
BROADCASTS = [
    ((4, 3), (1, 3)),
    ((4, 3, 5), (3, 5)),
    ((4, 5), (4, 1)),
    ((1, 6, 5), (4, 1, 1)),
    ((5,), (4, 3, 5)),
    ((4, 1, 5), (4, 3, 5)),
    ((), (4, 3)),
]

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "gaps": lambda x: torch.stack((x, x), -1)[..., 0],
    "unaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "expanded": lambda x: x[:, :, :1].expand(x.shape),
    "one_sample": lambda x: x[:1].expand(x.shape),
}


def timm_drop_path(x, drop_prob=0.0, training=False, scale_by_keep=True):
    """The body of timm/layers/drop.py."""
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
    if keep_prob > 0.0 and scale_by_keep:
        mask.div_(keep_prob)
    return x * mask


def timm_drop_path_add(residual, branch, drop_prob=0.0, training=False, scale_by_keep=True, layer_scale=None):
    branch = branch if layer_scale is None else branch * layer_scale
    return residual + timm_drop_path(branch, drop_prob, training, scale_by_keep)


def seeded(function, *args, **kwargs):
    torch.manual_seed(7)
    return function(*args, **kwargs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_forward_mode_and_tracers_see_the_formula():
    x = torch.randn(6, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        for out, most in (
            (trainops.drop_path(dual, 0.5, True), 2.0),
            (trainops.drop_path_add(x, dual, 0.5, True), 2.0),
        ):
            tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
            assert set(tangent.unique().tolist()) <= {0.0, most}
    traced = torch.jit.trace(lambda a, b: trainops.drop_path_add(a, b, 0.5, True), (x, x), check_trace=False)
    assert "empty_like" not in str(traced.graph)
    assert set((traced(x, x) / x).round().unique().tolist()) <= {1.0, 3.0}


@pytest.mark.parametrize("layer_scale", [None, torch.tensor([math.inf])], ids=["no_scale", "infinite_scale"])
def test_a_dropped_sample_is_its_residual_to_the_bit(target, layer_scale):
    residual = torch.full((8, 3), -0.0, device=target.device)
    layer_scale = None if layer_scale is None else layer_scale.to(target.device)
    out = trainops.drop_path_add(residual, residual + 1, 1.0, True, True, layer_scale, backend=target.backend)
    assert same_bits(out, residual)


def generator_state(device):
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()


def with_specials(x):
    """``x`` with zeros of both signs, infinities and NaN in it."""
    for i, value in enumerate((0.0, -0.0, math.inf, -math.inf, math.nan)):
        x.view(-1)[i::11] = value
    return x


def same_bits_but_nan(a, b):
    """As ``same_bits``; but every NaN is as good as any other: PyTorch's own depends on its vector width."""
    return same_bits(*(x.masked_fill(x.isnan(), math.nan) for x in (a, b)))


def operands(dtype, device, scale_shape=None, shape=SHAPE):
    residual, branch = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return residual, branch, None if scale_shape is None else torch.randn(scale_shape, device=device).to(dtype)


def with_broken_dropped_samples(branch):
    """Which samples ``seeded`` drops at a rate of 0.5, and ``branch`` with NaN and infinity in those."""
    dropped = (seeded(timm_drop_path, torch.ones_like(branch), 0.5, True) == 0).flatten(1).all(1)
    assert 0 < dropped.sum() < len(dropped)
    broken = branch.clone()
    broken[dropped] = math.nan
    broken[dropped, 0] = math.inf
    return dropped, broken


def assert_is_timms(backend, residual, branch, drop_prob=0.5, training=True, scale_by_keep=True, layer_scale=None):
    """The values, the dtype and the strides of PyTorch's ``residual + drop_path(branch * layer_scale)``."""
    args = (residual, branch, drop_prob, training, scale_by_keep, layer_scale)
    ours = seeded(trainops.drop_path_add, *args, backend=backend)
    torchs = seeded(timm_drop_path_add, *args)
    assert ours.dtype == torchs.dtype
    assert ours.stride() == torchs.stride()
    assert torch.equal(ours, torchs)


@pytest.mark.parametrize("scale_by_keep", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("shape", RANKS, ids=lambda shape: f"rank{len(shape)}")
def test_drop_path_is_timms(target, dtype, shape, scale_by_keep):
    x = with_specials(torch.randn(shape, device=target.device).to(dtype))
    for drop_prob in DROP_PROBS:
        ours = seeded(trainops.drop_path, x, drop_prob, True, scale_by_keep, backend=target.backend)
        our_state = generator_state(target.device)
        torchs = seeded(timm_drop_path, x, drop_prob, True, scale_by_keep)
        assert torch.equal(our_state, generator_state(target.device))
        assert same_bits_but_nan(ours, torchs)


@pytest.mark.parametrize(("drop_prob", "training"), [(0.0, True), (0.5, False), (1.0, False), (0.0, False)])
def test_drop_path_returns_its_input_where_nothing_can_drop(target, drop_prob, training):
    x = torch.randn(3, 2, device=target.device)
    state = generator_state(target.device)
    assert trainops.drop_path(x, drop_prob, training, backend=target.backend) is x
    trainops.drop_path_add(x, x, drop_prob, training, backend=target.backend)
    assert torch.equal(state, generator_state(target.device))


@pytest.mark.parametrize("scale_by_keep", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("scale_shape", LAYER_SCALES.values(), ids=LAYER_SCALES)
def test_drop_path_add_is_timms(target, dtype, scale_shape, scale_by_keep):
    residual, branch, layer_scale = operands(dtype, target.device, scale_shape)
    for drop_prob, training in itertools.product(DROP_PROBS, (True, False)):
        assert_is_timms(target.backend, residual, branch, drop_prob, training, scale_by_keep, layer_scale)


@pytest.mark.parametrize("scale_shape", [(7,), (1, 5, 1, 1), ()], ids=["last_dim", "channels", "scalar"])
@pytest.mark.parametrize(
    ("residual_dtype", "branch_dtype", "scale_dtype"),
    [
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
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_mixed_dtypes_are_promoted_as_by_pytorch(target, residual_dtype, branch_dtype, scale_dtype, scale_shape):
    residual, branch, layer_scale = operands(torch.float32, target.device, scale_shape)
    residual, branch, layer_scale = residual.to(residual_dtype), branch.to(branch_dtype), layer_scale.to(scale_dtype)
    for training in (True, False):
        assert_is_timms(target.backend, residual, branch, 0.1, training)
        assert_is_timms(target.backend, residual, branch, 0.1, training, True, layer_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_shapes(target, dtype, shape):
    residual, branch, layer_scale = operands(dtype, target.device, shape[-1:], shape)
    assert_is_timms(target.backend, residual, branch)
    assert_is_timms(target.backend, residual, branch, layer_scale=layer_scale)
    ours = seeded(trainops.drop_path, branch, 0.5, True, backend=target.backend)
    assert same_bits(ours, seeded(timm_drop_path, branch, 0.5, True))


@pytest.mark.parametrize("scale_shape", SOME_LAYER_SCALES.values(), ids=SOME_LAYER_SCALES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_are_kept_as_by_pytorch(target, layout, scale_shape):
    residual, branch, layer_scale = operands(torch.float32, target.device, scale_shape)
    branch = layout(branch)
    for residual_layout in LAYOUTS.values():
        assert_is_timms(target.backend, residual_layout(residual), branch, layer_scale=layer_scale)
    ours = seeded(trainops.drop_path, branch, 0.5, True, backend=target.backend)
    torchs = seeded(timm_drop_path, branch, 0.5, True)
    assert ours.stride() == torchs.stride()
    assert torch.equal(ours, torchs)


def test_channels_last_3d(target):
    residual, branch, layer_scale = operands(torch.float32, target.device, (1, 3, 1, 1, 1), (4, 3, 5, 6, 2))
    residual, branch = (x.contiguous(memory_format=torch.channels_last_3d) for x in (residual, branch))
    assert_is_timms(target.backend, residual, branch)
    assert_is_timms(target.backend, residual, branch, layer_scale=layer_scale)


def test_lazily_negated(target):
    # A single element counts as contiguous whatever its stride.
    x = torch.complex(*torch.tensor([[0.0], [-3.0]], device=target.device)).conj().imag
    assert x.is_neg()
    for ours, timms, args in (
        (trainops.drop_path, timm_drop_path, (x,)),
        (trainops.drop_path_add, timm_drop_path_add, (x, x)),
        (trainops.drop_path_add, timm_drop_path_add, (torch.ones_like(x), x)),
    ):
        expected = seeded(timms, *args, 0.1, True)
        assert torch.equal(seeded(ours, *args, 0.1, True, backend=target.backend), expected)


def installed(name):
    """A package that works, or the test is skipped."""
    return pytest.importorskip(name, exc_type=(ImportError, RuntimeError))  # the latter where it is built for CUDA


def test_timm_itself():
    timm = installed("timm.layers")
    x = torch.randn(16, 7)
    assert same_bits(seeded(trainops.drop_path, x, 0.3, True), seeded(timm.drop_path, x, 0.3, True))
    assert same_bits(seeded(trainops.DropPath(0.3), x), seeded(timm.DropPath(0.3), x))
    assert repr(trainops.DropPath(0.3)) == repr(timm.DropPath(0.3))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_in_a_model_of_timm(monkeypatch, training):
    vision_transformer = installed("timm.models.vision_transformer")

    def build():
        torch.manual_seed(0)
        size = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
        return vision_transformer.VisionTransformer(**size, init_values=0.1, drop_path_rate=0.4).train(training)

    timms = build()
    monkeypatch.setattr(vision_transformer, "DropPath", trainops.DropPath)
    ours = build()
    assert sum(isinstance(module, trainops.DropPath) for module in ours.modules()) == 4  # the first block has none
    assert repr(ours) == repr(timms)
    images = torch.randn(16, 3, 32, 32)
    for our, expected in zip(*(run_block(model, model, images) for model in (ours, timms)), strict=True):
        assert torch.equal(our, expected)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("drop_prob", [0.0, 0.3, 1.0])
def test_torchvision_itself(mode, drop_prob):
    torchvisions = installed("torchvision.ops").StochasticDepth(drop_prob, mode)
    x = torch.randn(16, 7)
    ours = trainops.DropPath(drop_prob)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = torchvisions(x)
        torch.manual_seed(seed)
        assert same_bits(ours(x) if mode == "row" else ours(x[None])[0], expected)
    assert torch.equal(ours.eval()(x), torchvisions.eval()(x))


@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.9])
def test_rate_and_expectation(target, drop_prob):
    samples = 20_000
    kept = trainops.drop_path(torch.ones(samples, 3, device=target.device), drop_prob, True, backend=target.backend)
    assert torch.equal(kept[:, 0], kept[:, 2])
    # Six standard deviations of a binomial distribution.
    bound = 6 * math.sqrt(drop_prob * (1 - drop_prob) / samples)
    assert abs((kept[:, 0] == 0).double().mean().item() - drop_prob) < bound
    assert abs(kept.double().mean().item() - 1) < bound / (1 - drop_prob)


@pytest.mark.parametrize("scale_shape", SOME_LAYER_SCALES.values(), ids=SOME_LAYER_SCALES)
def test_a_dropped_samples_branch_is_of_no_effect(target, dtype, scale_shape):
    residual, branch, layer_scale = operands(dtype, target.device, scale_shape)
    dropped, broken = with_broken_dropped_samples(branch)
    ours, expected = (
        seeded(trainops.drop_path_add, residual, x, 0.5, True, layer_scale=layer_scale, backend=target.backend)
        for x in (broken, branch)
    )
    assert torch.equal(ours, expected)
    assert same_bits(ours[dropped], residual[dropped])


@pytest.mark.parametrize("scale_shape", SOME_LAYER_SCALES.values(), ids=SOME_LAYER_SCALES)
def test_a_dropped_samples_branch_is_of_no_effect_on_gradients(target, dtype, scale_shape):
    residual, branch, layer_scale = operands(dtype, target.device, scale_shape)
    grad = torch.randn_like(residual)

    def add(*args, **kwargs):
        return trainops.drop_path_add(*args, **kwargs, backend=target.backend)

    _, broken = with_broken_dropped_samples(branch)
    ours, expected = (gradients(add, (residual, x, layer_scale), grad) for x in (broken, branch))
    for name, our, without in zip(OPERANDS, ours, expected, strict=False):
        assert torch.equal(our, without), name


def gradients(add, inputs, grad):
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    residual, branch, layer_scale = inputs
    out = seeded(add, residual, branch, 0.5, True, layer_scale=layer_scale)
    return torch.autograd.grad(out, [x for x in inputs if x is not None], grad.to(out.dtype))


def sum_to(x, shape):
    """``x``, an array, summed over what was repeated to make it of an array of ``shape``."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(i for i, size in enumerate(shape) if size == 1), keepdims=True).reshape(shape)


def check_gradients(target, residual, branch, layer_scale):
    product = branch if layer_scale is None else branch * layer_scale
    mask = seeded(timm_drop_path, torch.ones_like(product), 0.5, True)
    out_dtype, out_shape = (residual + product).dtype, torch.broadcast_shapes(residual.shape, branch.shape)
    grad = torch.randn(out_shape, device=target.device).to(out_dtype)

    def ours(*args, **kwargs):
        return trainops.drop_path_add(*args, **kwargs, backend=target.backend)

    inputs = (residual, branch, layer_scale)
    results = [gradients(add, inputs, grad) for add in (ours, timm_drop_path_add)]
    of_sum, kept = exact(grad), exact(grad) * exact(mask)
    truth = [of_sum, kept] if layer_scale is None else [of_sum, kept * exact(layer_scale), kept * exact(branch)]
    for name, our, torchs, true in zip(OPERANDS, *results, truth, strict=False):
        assert_contract(our, sum_to(true, our.shape), torchs, name)


@pytest.mark.parametrize("scale_shape", LAYER_SCALES.values(), ids=LAYER_SCALES)
def test_gradients(target, dtype, scale_shape):
    check_gradients(target, *operands(dtype, target.device, scale_shape))


@pytest.mark.parametrize("shape", LAYER_SCALED_SHAPES, ids=str)
def test_gradients_of_layer_scale(target, dtype, shape):
    check_gradients(target, *operands(dtype, target.device, shape[-1:], shape))


@pytest.mark.parametrize("unaligned", [(), (0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_gradients_have_the_same_bits_again(target, dtype, unaligned):
    inputs = operands(dtype, target.device, (24,), (6, 50, 24))
    grad = torch.randn_like(inputs[0])

    def add(*args, **kwargs):
        return trainops.drop_path_add(*args, **kwargs, backend=target.backend)

    expected = gradients(add, inputs, grad)
    moved = [LAYOUTS["unaligned"](x) if i in unaligned else x for i, x in enumerate(inputs)]
    for name, first, again in zip(OPERANDS, expected, gradients(add, moved, grad), strict=True):
        assert same_bits(first, again), name


@pytest.mark.parametrize("branch_grad", [True, False], ids=["branch", "frozen_branch"])
@pytest.mark.parametrize("scale_shape", SOME_LAYER_SCALES.values(), ids=SOME_LAYER_SCALES)
def test_gradients_of_an_expanded_gradient(target, scale_shape, branch_grad):
    results = []
    for add in (timm_drop_path_add, functools.partial(trainops.drop_path_add, backend=target.backend)):
        torch.manual_seed(1)
        residual, branch, layer_scale = operands(torch.float32, target.device, scale_shape)
        inputs = [x for x in (residual, branch.requires_grad_(branch_grad), layer_scale) if x is not None]
        inputs = [x.requires_grad_() for x in inputs if x is not branch or branch_grad]
        out = seeded(add, residual, branch, 0.5, True, layer_scale=layer_scale)
        results.append(torch.autograd.grad(out.sum(), inputs))
    for our, expected in zip(*results, strict=True):
        torch.testing.assert_close(our, expected)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32,) * 3,
        (torch.float64,) * 3,
        (torch.bfloat16,) * 3,
        (torch.float16,) * 3,
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(4, 9, 48), (5, 3, 7)], ids=str)
def test_backward_is_the_formula(target, shape, dtypes):
    grad, branch, layer_scale = operands(torch.float32, target.device, shape[-1:], shape)
    grad, branch, layer_scale = (x.to(dtype) for x, dtype in zip((grad, branch, layer_scale), dtypes, strict=True))
    mask = seeded(timm_drop_path, torch.ones_like(branch[:, :1, :1] * layer_scale[:1]), 0.3, True)
    grad[mask.flatten() != 0] = with_specials(grad[mask.flatten() != 0])
    kernels = select(target.backend, target.device)
    for of, scale in ((None, None), (None, layer_scale), (branch, layer_scale)):
        ours, of_scale = kernels.drop_path_backward(grad, of, mask, scale)
        expected, of_scale_expected = reference.drop_path_backward(grad, of, mask, scale)
        assert ours.dtype in (mask.dtype, branch.dtype)
        assert same_bits_but_nan(ours, expected.to(ours.dtype))
        assert (of_scale is None) == (of is None)
        if of_scale is not None:
            torch.testing.assert_close(of_scale, of_scale_expected, equal_nan=True)


# Samples that are no whole packs, samples of which a chunk has several, and samples of several chunks.
ROWS_CASES = [
    ((5, 7), "contiguous"),
    ((12, 50, 24), "contiguous"),
    ((12, 50, 24), "unaligned"),
    ((3, 3, 2801), "contiguous"),
    ((3, 2, 8200), "contiguous"),
    ((5, 8, 3, 4), "channels_last"),
]
ROWS_DTYPES = [
    (torch.float32,) * 3,
    (torch.float64,) * 3,
    (torch.bfloat16,) * 3,
    (torch.float32, torch.bfloat16, torch.bfloat16),
]
rows_cases = pytest.mark.parametrize(("shape", "layout"), ROWS_CASES, ids=str)
rows_dtypes = pytest.mark.parametrize("dtypes", ROWS_DTYPES, ids=str)


def rows_operands(target, shape, layout, dtypes, mask_samples):
    """Three tensors as of ``operands``, what lays them out, and a mask of so many samples, which keeps all."""
    tensors = operands(torch.float32, target.device, shape[-1:], shape)
    mask = torch.full((mask_samples, *[1] * (len(shape) - 1)), 1.5, dtype=dtypes[1], device=target.device)
    return *(x.to(dtype) for x, dtype in zip(tensors, dtypes, strict=True)), LAYOUTS[layout], mask


@rows_dtypes
@rows_cases
def test_rows_of_the_branch(target, shape, layout, dtypes):
    """The branch has the kept samples alone, in any order, and one more that all dropped ones name: it has no say."""
    samples = shape[0]
    residual, branch, layer_scale, lay, mask = rows_operands(target, shape, layout, dtypes, samples)
    dropped, kept = torch.randperm(samples, device=target.device).split([samples - samples // 2, samples // 2])
    mask[dropped] = 0
    rows = torch.full((samples,), len(kept), device=target.device)
    rows[kept] = torch.arange(len(kept), device=target.device)
    branch = branch[: len(kept) + 1]
    branch[-1] = math.nan
    assert len(branch) < samples
    residual, branch = lay(residual), lay(branch)
    kernels = select(target.backend, target.device)
    for scale in (None, layer_scale):
        ours = kernels.drop_path(branch, mask, residual, scale, rows)
        assert same_bits(ours, reference.drop_path(branch, mask, residual, scale, rows))
        assert same_bits(ours[dropped], residual[dropped])


@rows_dtypes
@rows_cases
def test_rows_of_the_gradient(target, shape, layout, dtypes):
    """The branch has some of the gradient's samples, in any order; of those, the last is dropped all the same."""
    samples = shape[0] // 2 + 1
    grad, branch, layer_scale, lay, mask = rows_operands(target, shape, layout, dtypes, samples)
    rows = torch.randperm(shape[0], device=target.device)[:samples]
    branch = branch[:samples]
    branch[-1], mask[-1] = math.nan, 0
    grad, branch = lay(grad), lay(branch)
    kernels = select(target.backend, target.device)
    for of, scale in ((None, None), (None, layer_scale), (branch, layer_scale)):
        ours, of_scale = kernels.drop_path_backward(grad, of, mask, scale, rows)
        expected, of_scale_expected = reference.drop_path_backward(grad, of, mask, scale, rows)
        assert same_bits(ours, expected)
        if of is not None:
            true = exact(grad.to(mask.dtype)[rows]) * exact(mask) * exact(branch.nan_to_num())
            assert_contract(of_scale, sum_to(true, layer_scale.shape), of_scale_expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(6, 9, 32), (5, 41, 3), (300, 2)], ids=str)
def test_small_chunks(target, dtype, shape, monkeypatch):
    """Chunks that lie in one sample, kept or dropped, and chunks of several samples."""
    if target.backend != "triton":
        pytest.skip("has no chunks to be made small")
    kernels = importlib.import_module("trainops.triton_kernels")
    monkeypatch.setattr(kernels._common, "CHUNK", 128)
    monkeypatch.setattr(kernels._common, "block_numel", lambda *_: 64)
    monkeypatch.setattr(kernels.drop_path, "PARTIALS", 9)
    residual, branch, layer_scale = operands(dtype, target.device, shape[-1:], shape)
    assert_is_timms(target.backend, residual, branch)
    assert_is_timms(target.backend, residual, branch, layer_scale=layer_scale)
    ours, torchs = (seeded(f, branch, 0.5, True) for f in (trainops.drop_path, timm_drop_path))
    assert same_bits(ours, torchs)
    dropped, broken = with_broken_dropped_samples(branch)
    ours = seeded(trainops.drop_path_add, residual, broken, 0.5, True, backend=target.backend)
    assert same_bits(ours[dropped], residual[dropped])
    check_gradients(target, residual, branch, layer_scale)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("scale_shape", SOME_LAYER_SCALES.values(), ids=SOME_LAYER_SCALES)
def test_gradients_of_mixed_dtypes(target, scale_shape, dtypes):
    residual, branch, layer_scale = operands(torch.float32, target.device, scale_shape)
    check_gradients(target, residual.to(dtypes[0]), branch.to(dtypes[1]), layer_scale)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_of_layouts(target, layout):
    check_gradients(target, *map(layout, operands(torch.float32, target.device)[:2]), None)


@pytest.mark.parametrize(("residual_shape", "branch_shape"), BROADCASTS, ids=str)
def test_broadcasting(target, residual_shape, branch_shape):
    residual, branch = (
        torch.randn(residual_shape, device=target.device),
        torch.randn(branch_shape, device=target.device),
    )
    layer_scale = torch.randn(branch_shape[-1:], device=target.device)
    for factor in (None, layer_scale):
        assert_is_timms(target.backend, residual, branch, layer_scale=factor)
        check_gradients(target, residual, branch, factor)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (3, 70001), (2, 3, 1500)], ids=str)
def test_gradients_of_odd_shapes(target, shape):
    check_gradients(target, *operands(torch.float32, target.device, shape[-1:], shape))


@pytest.mark.parametrize("scale_shape", [None, (2,), (1, 2, 1), ()], ids=str)
def test_gradcheck(target, scale_shape):
    inputs = [x for x in operands(torch.float64, target.device, scale_shape, (3, 2, 2)) if x is not None]

    def add(residual, branch, layer_scale=None):
        branch = seeded(trainops.drop_path, branch, 0.3, True, backend=target.backend)
        return seeded(trainops.drop_path_add, residual, branch, 0.3, True, True, layer_scale, backend=target.backend)

    assert 0 < seeded(timm_drop_path, inputs[1], 0.3, True).count_nonzero() < inputs[1].numel()
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(add, inputs)
    assert torch.autograd.gradgradcheck(add, inputs)


@pytest.mark.parametrize("required", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_what_requires_a_gradient_gets_one(target, required):
    inputs = operands(torch.float32, target.device, (7,))
    inputs = [x.requires_grad_(needs) for x, needs in zip(inputs, required, strict=True)]
    out = seeded(trainops.drop_path_add, *inputs[:2], 0.5, True, True, inputs[2], backend=target.backend)
    assert out.requires_grad == any(required)
    if any(required):
        out.square().sum().backward()
    assert [x.grad is not None for x in inputs] == list(required)


def test_func_grad(target):
    residual, branch, layer_scale = operands(torch.float32, target.device, (7,))

    def loss(add, residual, branch, layer_scale, **options):
        return add(residual, branch, 0.5, True, layer_scale=layer_scale, **options).square().sum()

    gradient = torch.func.grad(loss, argnums=(1, 2, 3))
    ours = seeded(gradient, trainops.drop_path_add, residual, branch, layer_scale, backend=target.backend)
    torchs = seeded(gradient, timm_drop_path_add, residual, branch, layer_scale)
    for our, expected in zip(ours, torchs, strict=True):
        torch.testing.assert_close(our, expected)


class Block(nn.Module):
    """A residual block with layer scale, written with trainops' modules or with timm's formula."""

    def __init__(self, ours=True):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 6)
        self.layer_scale = nn.Parameter(torch.full((6,), 0.3))
        self.drop_path, self.drop_path_add = trainops.DropPath(0.4), trainops.DropPathAdd(0.4)
        self.ours = ours

    def forward(self, x):
        if self.ours:
            x = x + self.drop_path(self.fc1(x))
            return self.drop_path_add(x, self.fc2(x), self.layer_scale)
        x = x + timm_drop_path(self.fc1(x), 0.4, self.training)
        return timm_drop_path_add(x, self.fc2(x), 0.4, self.training, layer_scale=self.layer_scale)


def run_block(call, block, x):
    """The output and the gradients of a call of ``block`` or of what wraps it."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    out = seeded(call, x)
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in block.parameters())]


def make_blocks(training):
    ours, timms = Block(), Block(ours=False)
    timms.load_state_dict(ours.state_dict())
    return ours.train(training), timms.train(training), torch.randn(32, 6)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_in_a_model(training, autocast):
    ours, timms, x = make_blocks(training)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = [run_block(block, block, x) for block in (ours, timms)]
    for our, torchs in zip(*results, strict=True):
        assert our.dtype == torchs.dtype
        torch.testing.assert_close(our, torchs)


def test_activation_checkpointing_draws_the_same_mask():
    block, _, x = make_blocks(training=True)
    plain = run_block(block, block, x)
    checkpointed = run_block(lambda x: checkpoint(block, x, use_reentrant=False), block, x)
    for a, b in zip(plain, checkpointed, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_without_a_graph_break(training, compiler):
    torch.compiler.reset()
    block, _, x = make_blocks(training)
    eager = run_block(block, block, x)
    compiled = run_block(torch.compile(block, fullgraph=True, backend=compiler), block, x)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("module_class", [trainops.DropPath, trainops.DropPathAdd])
def test_modules(module_class):
    module = module_class(0.25, scale_by_keep=False)
    assert repr(module) == f"{module_class.__name__}(drop_prob=0.250)"
    assert repr(module_class(1 / 3)) == f"{module_class.__name__}(drop_prob=0.333)"
    assert module.state_dict() == {}
    inputs = operands(torch.float32, "cpu")[: 1 if module_class is trainops.DropPath else 2]
    function = timm_drop_path if len(inputs) == 1 else timm_drop_path_add
    for other in (module, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert other.training
        for mode in (True, False):
            assert torch.equal(seeded(other.train(mode), *inputs), seeded(function, *inputs, 0.25, mode, False))
    assert module_class().eval()(*inputs) is inputs[0] or len(inputs) == 2


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("drop_prob", [-0.1, 1.0001, math.nan, math.inf], ids=str)
def test_drop_prob_out_of_range(drop_prob, training):
    x = torch.randn(3, 2)
    for call in (
        lambda: trainops.drop_path(x, drop_prob, training),
        lambda: trainops.drop_path_add(x, x, drop_prob, training),
        lambda: trainops.DropPath(drop_prob),
        lambda: trainops.DropPathAdd(drop_prob),
    ):
        with pytest.raises(ValueError, match=f"drop_prob.*{drop_prob}"):
            call()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("residual", "branch", "layer_scale", "message"),
    [
        ((), (), None, "at least one dimension"),
        ((4, 3), (), None, "at least one dimension"),
        ((4, 3), (4, 5), None, r"residual.*\(4, 3\).*\(4, 5\)"),
        ((2, 4, 5), (3, 5), None, r"residual.*\(2, 4, 5\).*\(3, 5\)"),
        ((4, 3), (4, 3), (4,), r"layer_scale.*\(4,\).*\(4, 3\)"),
        ((4, 3), (4, 3), (2, 4, 3), r"layer_scale.*\(2, 4, 3\).*\(4, 3\)"),
        ((4, 3), (4, 1), (3,), r"layer_scale.*\(3,\).*\(4, 1\)"),
        ((4, 3), (4, 3), (0,), r"layer_scale.*\(0,\).*\(4, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(residual, branch, layer_scale, message, training):
    residual, branch = torch.randn(residual), torch.randn(branch)
    layer_scale = None if layer_scale is None else torch.randn(layer_scale)
    with pytest.raises(ValueError, match=message):
        trainops.drop_path_add(residual, branch, 0.5, training, layer_scale=layer_scale)


@pytest.mark.parametrize("operand", OPERANDS)
def test_operands_are_tensors(operand):
    inputs = {name: torch.ones(3) for name in OPERANDS} | {operand: np.ones(10_000)}
    with pytest.raises(TypeError, match=f"^{operand} must be a tensor, got ndarray$"):
        trainops.drop_path_add(**inputs)
    with pytest.raises(TypeError, match=r"^x must be a tensor, got ndarray$"):
        trainops.drop_path(np.ones(10_000))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_only_floating_point_samples_are_dropped(dtype, scale_by_keep):
    x, state = torch.ones(4, 3).to(dtype), torch.get_rng_state()
    for call in (trainops.drop_path, lambda x, *options: trainops.drop_path_add(x, x, *options)):
        with pytest.raises(TypeError, match=f"floating-point tensors.*got {dtype}"):
            call(x, 0.5, True, scale_by_keep)
        assert call(x, 0.5, False, scale_by_keep).dtype == dtype
    assert torch.equal(torch.get_rng_state(), state)


def test_a_scalar_has_no_samples():
    with pytest.raises(ValueError, match="at least one dimension"):
        trainops.drop_path(torch.tensor(1.0), 0.5, True)


@pytest.mark.parametrize("elsewhere", OPERANDS)
def test_operands_on_different_devices(elsewhere):
    devices = {name: "meta" if name == elsewhere else "cpu" for name in OPERANDS}
    inputs = {name: torch.ones(3, device=device) for name, device in devices.items()}
    with pytest.raises(ValueError, match=r"branch is on.*but"):
        trainops.drop_path_add(**inputs, drop_prob=0.5, training=True)


def test_shapes_can_be_inferred_on_the_meta_device():
    x = torch.empty(4, 3, device="meta")
    out = trainops.drop_path_add(x, x, 0.5, True, layer_scale=torch.empty(3, device="meta"))
    assert out.shape == x.shape
    assert out.device.type == "meta"
