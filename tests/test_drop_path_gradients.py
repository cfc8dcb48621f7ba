"""DropPath's gradients: the contract for all dtypes, shapes and layouts, and what autograd asks of them."""

import itertools

import pytest
import torch
from contract import assert_contract, same_bits
from controls import must_fail
from drop_path_controls import two_dtypes, wrong_gradient
from drop_path_formulas import (
    LAYER_SCALES,
    LAYOUTS,
    NARROW,
    OPERANDS,
    SOME_LAYER_SCALES,
    adding,
    assert_equal,
    draws_of,
    exact_gradients,
    gradients,
    operands,
    seeded,
    timm_drop_path,
    timm_drop_path_add,
    timm_mask,
    with_broken_dropped_samples,
)
from targets import REFERENCE, interpreted, thorough

import trainops

BATCHED = {
    "drop_path": lambda x, scale: trainops.drop_path(x.sin(), 0.4, True),
    "drop_path_add": lambda x, scale: trainops.drop_path_add(x, x.sin(), 0.4, True, layer_scale=scale),
    "stochastic_depth": lambda x, scale: trainops.stochastic_depth(x, torch.sin, 0.4, True),
}

pytestmark = pytest.mark.usefixtures("kernels_for_small_tensors")

# Samples of one position and of many, channels that are no power of two, more than a program takes, one and none.
LAYER_SCALED_SHAPES = [
    (0, 5),
    (4, 0, 8),
    (4, 3, 0),
    (1, 1),
    (3, 7, 1),
    (700, 8),
    (16, 50, 24),
    (3, 9, 9, 96),
    (5, 3, 130),
    (3, 3, 1500),
]

NUMBERS = [(0,), (1,), (1025,)]

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

FOR_SHAPES = (torch.float32, torch.bfloat16)  # where types and shapes have nothing to do with each other

FAULTS = ["nothing", "last_element", "unscaled", "of_another_seed", "leaking"]

scales = pytest.mark.parametrize("scale_shape", LAYER_SCALES.values(), ids=LAYER_SCALES)
some_scales = pytest.mark.parametrize("scale_shape", SOME_LAYER_SCALES.values(), ids=SOME_LAYER_SCALES)


def check_gradients(target, residual, branch, layer_scale, drop_prob=0.3, scale_by_keep=True):
    """Of all operands, by the contract. A rate of 0.3 makes a mask that has to be rounded, 0.5 none."""
    product = branch if layer_scale is None else branch * layer_scale
    mask = timm_mask(product, drop_prob, scale_by_keep)
    out_dtype, out_shape = (residual + product).dtype, torch.broadcast_shapes(residual.shape, branch.shape)
    grad = torch.randn(out_shape, device=target.device).to(out_dtype)
    inputs = (residual, branch, layer_scale)
    ours, timms = (
        gradients(add, inputs, grad, drop_prob, scale_by_keep) for add in (adding(target), timm_drop_path_add)
    )
    true = exact_gradients(*inputs, mask, grad)
    for name, our, torchs, result in zip(OPERANDS, ours, timms, true, strict=False):
        # PyTorch's error is no measure where it is that of a single number, which may have none at all.
        assert_contract(our, result, torchs if our.numel() > 1 else None, name)


def check_draws(target, dtype, scale_shape, scale_by_keep=True):
    """Of as many operands as it takes for a wrong gradient to be seen."""
    draws = [operands(dtype, target.device, scale_shape) for _ in range(draws_of(dtype, scale_shape))]
    for inputs in draws:
        check_gradients(target, *inputs, scale_by_keep=scale_by_keep)


def check_same_gradients(target, residual, branch, layer_scale):
    """What a dropped sample's branch holds has no effect."""
    grad = torch.randn_like(residual)
    _, broken = with_broken_dropped_samples(branch)
    ours, expected = (gradients(adding(target), (residual, x, layer_scale), grad) for x in (broken, branch))
    for name, our, without in zip(OPERANDS, ours, expected, strict=False):
        assert_equal(our, without, name)


# The mask is drawn before any kernel is called: for these, an unscaled one is another number.
@thorough(lambda scale_by_keep, scale_shape, **_: not scale_by_keep and scale_shape != (7,))
@pytest.mark.parametrize("scale_by_keep", [True, False], ids=["scaled", "unscaled"])
@scales
def test_gradients(target, dtype, scale_shape, scale_by_keep):
    check_draws(target, dtype, scale_shape, scale_by_keep)


@interpreted(lambda dtype, shape, **_: dtype in FOR_SHAPES or shape == (16, 50, 24))
@pytest.mark.parametrize("shape", LAYER_SCALED_SHAPES, ids=str)
def test_gradients_of_layer_scale(target, dtype, shape):
    check_gradients(target, *operands(dtype, target.device, shape[-1:], shape))


@pytest.mark.parametrize("shape", NUMBERS, ids=str)
def test_gradients_of_numbers(target, shape):
    """Each sample is a number."""
    for scale_shape in (None, shape, ()):
        check_gradients(target, *operands(torch.float32, target.device, scale_shape, shape))


def test_gradients_of_several_chunks(target):
    check_gradients(target, *operands(torch.float32, target.device, (70001,), (3, 70001)))


def test_gradients_of_several_runs(target):
    """With CUDA, a thread adds up more elements than those of a run where there are more than 32,768 positions."""
    check_gradients(target, *operands(torch.float32, target.device, (3,), (40, 1000, 3)))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@some_scales
def test_gradients_of_mixed_dtypes(target, scale_shape, dtypes):
    residual, branch, layer_scale = operands(torch.float32, target.device, scale_shape)
    check_gradients(target, residual.to(dtypes[0]), branch.to(dtypes[1]), layer_scale)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_of_layouts(target, layout):
    check_gradients(target, *map(layout, operands(torch.float32, target.device)[:2]), None)


@pytest.mark.parametrize(("residual_shape", "branch_shape"), BROADCASTS, ids=str)
def test_broadcasting(target, residual_shape, branch_shape):
    residual, branch = (torch.randn(shape, device=target.device) for shape in (residual_shape, branch_shape))
    layer_scale = torch.randn(branch_shape[-1:], device=target.device)
    for factor in (None, layer_scale):
        args = (residual, branch, 0.3, True, True, factor)
        assert_equal(seeded(adding(target), *args), seeded(timm_drop_path_add, *args))
        check_gradients(target, residual, branch, factor)


@some_scales
def test_a_dropped_samples_branch_is_of_no_effect_on_gradients(target, dtype, scale_shape):
    check_same_gradients(target, *operands(dtype, target.device, scale_shape))


@interpreted(lambda dtype, unaligned, **_: dtype in FOR_SHAPES or unaligned == (0, 1, 2))
@pytest.mark.parametrize("unaligned", [(), (0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_gradients_have_the_same_bits_again(target, dtype, unaligned):
    inputs = operands(dtype, target.device, (24,), (6, 50, 24))
    grad = torch.randn_like(inputs[0])
    expected = gradients(adding(target), inputs, grad)
    moved = [LAYOUTS["unaligned"](x) if i in unaligned else x for i, x in enumerate(inputs)]
    for name, first, again in zip(OPERANDS, expected, gradients(adding(target), moved, grad), strict=True):
        assert same_bits(first, again), name


@pytest.mark.parametrize("branch_grad", [True, False], ids=["branch", "frozen_branch"])
@some_scales
def test_gradients_of_an_expanded_gradient(target, scale_shape, branch_grad):
    results = []
    for add in (timm_drop_path_add, adding(target)):
        torch.manual_seed(1)
        residual, branch, layer_scale = operands(torch.float32, target.device, scale_shape)
        inputs = [x for x in (residual, branch.requires_grad_(branch_grad), layer_scale) if x is not None]
        inputs = [x.requires_grad_() for x in inputs if x is not branch or branch_grad]
        out = seeded(add, residual, branch, 0.5, True, layer_scale=layer_scale)
        results.append(torch.autograd.grad(out.sum(), inputs))
    for our, expected in zip(*results, strict=True):
        torch.testing.assert_close(our, expected)


# All numerical derivatives at once are those of a random direction.
@thorough(lambda fast, **_: not fast)
@pytest.mark.parametrize("fast", [True, False], ids=["one_direction", "every_element"])
@pytest.mark.parametrize("scale_shape", [None, (2,), (1, 2, 1), ()], ids=str)
def test_gradcheck(target, scale_shape, fast):
    inputs = [x for x in operands(torch.float64, target.device, scale_shape, (3, 2, 2)) if x is not None]

    def add(residual, branch, layer_scale=None):
        branch = seeded(trainops.drop_path, branch, 0.3, True, backend=target.backend)
        return seeded(adding(target), residual, branch, 0.3, True, True, layer_scale)

    assert 0 < seeded(timm_drop_path, inputs[1], 0.3, True).count_nonzero() < inputs[1].numel()
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(add, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(add, inputs, fast_mode=fast)


@pytest.mark.parametrize("required", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_what_requires_a_gradient_gets_one(target, required):
    inputs = operands(torch.float32, target.device, (7,))
    inputs = [x.requires_grad_(needs) for x, needs in zip(inputs, required, strict=True)]
    out = seeded(adding(target), *inputs[:2], 0.5, True, True, inputs[2])
    assert out.requires_grad == any(required)
    if any(required):
        out.square().sum().backward()
    assert [x.grad is not None for x in inputs] == list(required)


def test_func_grad(target):
    residual, branch, layer_scale = operands(torch.float32, target.device, (7,))

    def loss(add, residual, branch, layer_scale):
        return add(residual, branch, 0.5, True, layer_scale=layer_scale).square().sum()

    gradient = torch.func.grad(loss, argnums=(1, 2, 3))
    ours, timms = (
        seeded(gradient, add, residual, branch, layer_scale) for add in (adding(target), timm_drop_path_add)
    )
    for our, expected in zip(ours, timms, strict=True):
        torch.testing.assert_close(our, expected)


@pytest.mark.parametrize("scale_shape", [(7,), (1, 5, 1, 1)], ids=str)
def test_a_dropped_samples_branch_is_of_no_effect_on_gradients_of_the_formula(scale_shape):
    """Function transforms and compilers take the derivative of the specification: nothing times NaN is NaN."""
    residual, branch, layer_scale = operands(torch.float32, "cpu", scale_shape)
    _, broken = with_broken_dropped_samples(branch)

    def loss(layer_scale, branch):
        out = seeded(trainops.drop_path_add, residual, branch, 0.5, True, layer_scale=layer_scale)
        return out.square().sum()

    ours, expected = (torch.func.grad(loss)(layer_scale, x) for x in (broken, branch))
    assert_equal(ours, expected)


# Controls: what the checks above must notice.


def notices(operand, fault, check, *args, **kwargs):
    must_fail(lambda: wrong_gradient(operand, fault), check, REFERENCE, *args, **kwargs)


@two_dtypes
@pytest.mark.parametrize("fault", [*FAULTS, "last_sample"])
@scales
def test_a_wrong_gradient_of_the_branch_is_noticed(dtype, scale_shape, fault):
    notices("branch", fault, check_draws, dtype, scale_shape)


@two_dtypes
@pytest.mark.parametrize("fault", [*FAULTS, "forgets_a_sample"])
@pytest.mark.parametrize("scale_shape", [shape for shape in LAYER_SCALES.values() if shape is not None], ids=str)
def test_a_wrong_gradient_of_layer_scale_is_noticed(dtype, scale_shape, fault):
    notices("layer_scale", fault, check_draws, dtype, scale_shape)


@pytest.mark.parametrize("shape", [(3, 7, 1), (16, 50, 24), (3, 9, 9, 96), (5, 3, 130), (3, 3, 1500)], ids=str)
@pytest.mark.parametrize("fault", [*FAULTS, "forgets_a_sample"])
@pytest.mark.parametrize("dtype", FOR_SHAPES, ids=str)
def test_a_wrong_gradient_of_layer_scale_is_noticed_for_all_shapes(dtype, shape, fault):
    notices("layer_scale", fault, check_gradients, *operands(dtype, "cpu", shape[-1:], shape))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("operand", ["branch", "layer_scale"])
def test_a_wrong_gradient_of_numbers_is_noticed(operand, fault):
    notices(operand, fault, check_gradients, *operands(torch.float32, "cpu", (1025,), (1025,)))


@two_dtypes
@pytest.mark.parametrize("scale_shape", [shape for shape in LAYER_SCALES.values() if shape is not None], ids=str)
def test_a_forgotten_layer_scale_is_noticed(dtype, scale_shape):
    notices("branch", "no_layer_scale", check_draws, dtype, scale_shape)


@pytest.mark.parametrize("narrow", NARROW, ids=str)
@scales
def test_truncation_is_noticed(narrow, scale_shape):
    notices("branch", "truncated", check_draws, narrow, scale_shape)
    if scale_shape is not None:
        notices("layer_scale", "truncated", check_draws, narrow, scale_shape)


@pytest.mark.parametrize("operand", ["branch", "layer_scale"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_gradient_of_mixed_dtypes_is_noticed(dtypes, operand, fault):
    residual, branch, layer_scale = operands(torch.float32, "cpu", (7,))
    notices(operand, fault, check_gradients, residual.to(dtypes[0]), branch.to(dtypes[1]), layer_scale)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("residual_shape", "branch_shape"), [((4, 5), (4, 1)), ((4, 1, 5), (4, 3, 5))], ids=str)
def test_a_wrong_gradient_is_noticed_where_shapes_broadcast(residual_shape, branch_shape, fault):
    notices("branch", fault, check_gradients, torch.randn(residual_shape), torch.randn(branch_shape), None)


@two_dtypes
@pytest.mark.parametrize("scale_shape", [(7,), (1, 5, 1, 1)], ids=str)
def test_a_dropped_sample_that_has_an_effect_on_gradients_is_noticed(dtype, scale_shape):
    notices("layer_scale", "leaking", check_same_gradients, *operands(dtype, "cpu", scale_shape))


@pytest.mark.parametrize("shape", [(6, 5), (16, 100, 100)], ids=str)
@pytest.mark.parametrize("function", BATCHED.values(), ids=BATCHED.keys())
def test_several_gradients_at_once(function, shape):
    """As ``jacobian(vectorize=True)`` and ``hessian`` ask for them: in one backward pass, by PyTorch's vmap."""
    x, scale = torch.randn(shape, requires_grad=True), torch.randn(shape[-1:], requires_grad=True)
    y = function(x, scale)
    grads = torch.randn(3, *shape)
    found = torch.autograd.grad(y.sum(), [x, scale], retain_graph=True, allow_unused=True)
    inputs = [z for z, grad in zip((x, scale), found, strict=True) if grad is not None]
    at_once = torch.autograd.grad(y, inputs, grads, retain_graph=True, is_grads_batched=True)
    for i, grad in enumerate(grads):
        for got, one in zip(at_once, torch.autograd.grad(y, inputs, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], one)
