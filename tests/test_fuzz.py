"""Random cases: every backend, step by step, beside ``reference`` and an evaluation in extended precision."""

from functools import partial

import pytest
import torch

pytest.importorskip("hypothesis")
import codes
import fuzz
from contract import same_bits
from controls import AVERAGE_CONTROLS, STEP_CONTROLS, leaving, must_fail, truncated, wrong_decay, wrong_norm
from drop_path_controls import wrong_forward, wrong_gradient
from fuzz import World
from fuzz_contract import check_step, check_total_norm, clipped_exactly, expected_average, is_finite, total_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from neighbours import WrongRounding, two_units_up
from targets import TARGETS, over

import trainops
from trainops.storage import codes_key

# Averages of 16 bits with a large decay are drawn as well.
pytestmark = pytest.mark.filterwarnings("ignore:an average in .* stalls:UserWarning")

CPU, CUDA, TRITON = "cpu", "cuda", "triton"


def examples(count):
    """So many cases in the default profile, and as many times more in a thorough one."""
    return settings(max_examples=count * settings.default.max_examples // 100)


def on(*backends):
    """Over backends, as far as they are there, on the devices that they serve here."""
    targets = [target for target in TARGETS if target.backend in backends]
    return pytest.mark.parametrize("target", targets, indirect=True, ids="-".join)


def both(target):
    """A target, and ``reference`` on the same device."""
    return target, target._replace(backend="reference")


def outcome(function, *args):
    """The type of what a function raises."""
    try:
        function(*args)
    except Exception as error:
        return type(error), str(error)
    return None


def go_through(case, target):
    ours, others = (World(case, each) for each in both(target))
    for i, step in enumerate(case.steps):
        for world in (ours, others):
            world.prepare(step)
        others.follow(ours)
        before = {name: x.clone() for name, x in ours.tensors().items()}
        for world in (ours, others):
            world.set_grads(step, seed=1000 * case.seed + i)
        grads = [None if p.grad is None else p.grad.clone() for p in ours.model.params]
        raised = [outcome(world.step, step) for world in (ours, others)]
        assert raised == [None, None]
        after = ours.tensors(), others.tensors()
        check_step(ours, step, before, after[1])
        check_step(others, step, before, after[0])
        for param, grad in zip(ours.model.params, grads, strict=True):
            assert grad is None or same_bits(param.grad, grad)


@on(CPU)
@given(case=fuzz.cases(st.sampled_from([*fuzz.SHAPES * 10, (65_537,)])))
@examples(250)
def test_steps(target, case):
    go_through(case, target)


@on("foreach")
@given(case=fuzz.cases(st.sampled_from([*fuzz.SHAPES * 10, (65_537,)])))
@examples(60)
def test_steps_of_foreach(target, case):
    go_through(case, target)


@on(CUDA)
@given(case=fuzz.cases(st.sampled_from(fuzz.SHAPES), most_rows=4, most_steps=3))
@examples(40)
def test_steps_of_cuda(target, case):
    go_through(case, target)


@on(TRITON)
@given(case=fuzz.cases(st.sampled_from(fuzz.SHAPES), most_rows=3, most_steps=2))
@examples(20)
def test_steps_of_triton(target, case):
    go_through(case, target)


# Bad input: the same error everywhere, and nothing has changed

SPOIL = {
    "shape": lambda state, m, _: state.update({m: state[m].new_zeros(4, 5)}),
    "integers": lambda state, _, v: state.update({v: torch.zeros_like(state[v], dtype=torch.int64)}),
    "complex": lambda state, m, _: state.update({m: state[m].to(torch.complex64)}),
    "overlap": lambda state, m, _: state.update({m: state[m].new_zeros(1).expand(state[m].shape)}),
    "number": lambda state, *_: state.update(step=1),
    "two steps": lambda state, *_: state.update(step=state["step"].new_zeros(2)),
    "missing": lambda state, _, v: state.pop(v),
    "sparse": None,
    "average": None,
}


def spoil(world, how, i):
    """Make a tensor of parameter ``i`` one that no step can take."""
    param = world.model.params[i]
    if how == "sparse":
        param.grad = torch.ones_like(param.grad).to_sparse()
    elif how == "average":
        world.ema.module.params[i] = torch.nn.Parameter(param.new_zeros(4, 5), requires_grad=False)
    else:
        state = world.optimizer.state[param]
        SPOIL[how](state, *(codes_key(x) if codes_key(x) in state else x for x in ("exp_avg", "exp_avg_sq")))


def everything(world):
    """What an error must leave as it is: tensors as copies."""
    optimizer, params = world.optimizer, world.model.params
    found = world.tensors() | {f"grad {i}": p.grad.to_dense() for i, p in enumerate(params)}
    found |= {f"keys {i}": list(optimizer.state[p]) for i, p in enumerate(params) if p in optimizer.state}
    found |= {name: getattr(optimizer, name) for name in ("grad_norm", "grad_norms", "skipped_steps")}
    found["updates"] = world.ema.step
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in found.items()}


def go_wrong(case, target, how):
    raised = []
    for world in (World(case, each) for each in both(target)):
        for step in case.steps:
            world.set_grads(step, case.seed)
            world.step(step)
        spoilt = len(case.rows) // 2
        if spoilt > 0:  # another parameter has no state yet, and an error must leave it without
            del world.optimizer.state[world.model.params[0]]
        spoil(world, how, spoilt)
        before = everything(world)
        raised.append(outcome(world.step, case.steps[0]))
        after = everything(world)
        assert list(after) == list(before)
        for name, x in before.items():
            is_same = same_bits(after[name], x) if isinstance(x, torch.Tensor) else after[name] == x
            assert is_same, f"{name} has changed"
    assert raised[0] is not None
    assert raised[0][0] is raised[1][0], raised


REAL_ROWS = fuzz.lists_of_rows(st.sampled_from([(3, 2)]), st.sampled_from(fuzz.FLOATS), 4)
PLAIN_STEP = st.just(fuzz.Step(1.0, [False], None, None, None, "nothing", "plain", torch.float32))
WRONG = st.builds(
    fuzz.Case,
    rows=REAL_ROWS,
    groups=st.lists(fuzz.GROUPS, min_size=1, max_size=2),
    settings=fuzz.SETTINGS,
    ema=st.just({"decay": 0.5}),
    fused=st.just(True),
    steps=st.lists(PLAIN_STEP, min_size=1, max_size=1),
    seed=st.integers(0, 7),
)


@on(CPU, CUDA, TRITON)
@pytest.mark.parametrize("how", SPOIL)
@given(case=WRONG)
@examples(4)
def test_what_no_step_can_take(target, case, how):
    go_wrong(case, target, how)


# Clipping, averages and DropPath by themselves


@st.composite
def lists_of_tensors(draw, most=5, complex_too=True):
    """Tensors of some layouts, with their guards."""
    dtypes = [*fuzz.FLOATS, *([torch.complex64, torch.complex128] if complex_too else [])]
    dtype = draw(st.sampled_from([*map(st.just, fuzz.FLOATS), st.sampled_from(dtypes)]))
    rows = draw(fuzz.lists_of_rows(st.sampled_from([*fuzz.SHAPES, (8193,)]), dtype, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 7)))
    tensors = [
        fuzz.randoms(row.shape, row.dtype, generator, draw(st.sampled_from([1.0, 1e-3, 30.0]))) for row in rows
    ]
    poison = draw(st.sampled_from([None] * 3 + [float("nan"), float("inf"), -float("inf")]))
    if poison is not None and tensors[0].numel():
        tensors[0].view(-1)[-1] = poison
    return list(zip(tensors, rows, strict=True))


def placed(drawn, device, role="layout"):
    guards = fuzz.Guards(device)
    layouts = [getattr(row, role) for _, row in drawn]
    return guards, [guards.place(x, layout) for (x, _), layout in zip(drawn, layouts, strict=True)]


def clipped(drawn, target, clip, *args):
    """What ``clip`` makes of gradients, and what it returns."""
    guards, grads = placed(drawn, target.device)
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    found = []
    result = outcome(lambda: found.append(clip(params, *args, backend=target.backend)))
    guards.check()
    return [p.grad for p in params], found[0] if found else result


@on(CPU, CUDA, TRITON)
@given(
    drawn=lists_of_tensors(),
    norm_type=st.sampled_from([2.0, 2, 1.0, float("inf"), 0.5, 3, 0, -1.0]),
    max_norm=st.sampled_from([0.5, 0.0, 1e9, float("inf"), torch.tensor(0.25)]),
    error_if_nonfinite=st.booleans(),
)
@examples(40)
def test_clip_grad_norm(target, drawn, norm_type, max_norm, error_if_nonfinite):
    grads = [grad for grad, _ in drawn]
    total = total_norm(grads, norm_type)
    is_error = error_if_nonfinite and not is_finite(total, grads)
    for each in both(target):
        clips, norm = clipped(drawn, each, trainops.clip_grad_norm_, max_norm, norm_type, error_if_nonfinite)
        assert isinstance(norm, torch.Tensor) != is_error
        if is_error:
            assert norm[0] is RuntimeError
            assert "non-finite" in norm[1]
            assert all(map(same_bits, clips, (grad.to(target.device) for grad in grads)))
            continue
        check_total_norm(each, norm, total, grads, norm_type)
        for got, grad in zip(clips, grads, strict=True):
            clipped_exactly(grad, norm, max_norm).check("gradient", got, grad.dtype)


@on(CPU, CUDA, TRITON)
@given(drawn=lists_of_tensors(), bound=st.sampled_from([0.5, 0.0, 1e-3, float("inf"), 1]))
@examples(15)
def test_clip_grad_value(target, drawn, bound):
    ours, theirs = (clipped(drawn, each, trainops.clip_grad_value_, bound) for each in both(target))
    assert ours[1] == theirs[1]
    for x, y in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@on(CPU, CUDA, TRITON)
@given(
    drawn=lists_of_tensors(),
    dtype=st.sampled_from([None, *fuzz.FLOATS]),
    decay=st.sampled_from([0.9, 0.0, 0.3, 0.5, 0.9999, 1.0]),
)
@examples(30)
def test_ema_update(target, drawn, dtype, decay):
    generator = torch.Generator().manual_seed(1)
    averages = [
        (fuzz.randoms(x.shape, x.dtype if dtype is None or x.is_complex() else dtype, generator), row)
        for x, row in drawn
    ]
    for (average, _), (x, _) in zip(averages, drawn, strict=True):
        average.view(-1)[:1] = x.view(-1)[:1]  # equal ones stay, infinities included
    _, sources = placed(drawn, target.device, "grad_layout")
    for each in both(target):
        guards, moved = placed(averages, target.device)
        trainops.ema_update_(moved, sources, decay, backend=each.backend)
        guards.check()
        for got, (before, _), source in zip(moved, averages, sources, strict=True):
            expected_average(before, source, decay).check("average", got, before.dtype)


@st.composite
def branches(draw):
    """What DropPath takes: a branch, maybe a residual, and maybe factors for one of its dimensions."""
    shape = draw(st.sampled_from([(4,), (5, 3), (3, 1), (6, 4, 8), (2, 0, 3), (4, 8, 3, 5), (3, 2, 2801), (40, 16)]))
    dtypes = draw(st.sampled_from([*([dtype] * 3 for dtype in fuzz.FLOATS), None]))
    dtypes = dtypes or [draw(st.sampled_from(fuzz.FLOATS)) for _ in range(3)]
    channels_first = len(shape) > 2 and draw(st.booleans())
    channels = (shape[1], *[1] * (len(shape) - 2)) if channels_first else shape[-1:]
    shapes = [shape, shape, draw(st.sampled_from([channels, (1,), ()]))]
    shapes = [shapes[0], *(draw(st.sampled_from([None, x, x])) for x in shapes[1:])]
    layouts = [draw(st.sampled_from(fuzz.LAYOUTS)) for _ in range(4)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 7)))
    tensors = [
        None if shape is None else fuzz.randoms(shape, dtype, generator)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    poison = draw(st.sampled_from([None] * 3 + [float("nan"), float("inf")]))
    if poison is not None and tensors[0].numel():
        tensors[0].view(-1)[-1] = poison
    return tensors, layouts, draw(st.lists(st.booleans(), min_size=3, max_size=3))


def dropped(drawn, target, drop_prob, scale_by_keep, mode):
    """The result, and the gradients of what requires one; with a mode, of a branch that is run on kept samples."""
    tensors, layouts, required = drawn
    backend = target.backend
    guards = fuzz.Guards(target.device)
    placed = [
        None if x is None else guards.place(x, layout).requires_grad_(needs)
        for x, layout, needs in zip(tensors, layouts[:3], required, strict=True)
    ]
    branch, residual, layer_scale = placed
    torch.manual_seed(3)
    if mode is not None:
        layer_scale = None if branch.ndim < 2 else layer_scale
        args = drop_prob, True, scale_by_keep, layer_scale, mode
        out = trainops.stochastic_depth(branch, lambda x: 1.5 * x, *args, backend=backend)
    elif residual is None and layer_scale is None:
        out = trainops.drop_path(branch, drop_prob, True, scale_by_keep, backend=backend)
    else:
        residual = torch.zeros_like(branch) if residual is None else residual
        args = drop_prob, True, scale_by_keep, layer_scale
        out = trainops.drop_path_add(residual, branch, *args, backend=backend)
    inputs = [x for x in placed if x is not None and x.requires_grad]
    grads = []
    if out.requires_grad:
        grad = guards.place(fuzz.randoms(out.shape, out.dtype, torch.Generator().manual_seed(5)), layouts[3])
        grads = torch.autograd.grad(out, inputs, grad, allow_unused=True)
    guards.check()
    return [out.detach(), *grads], [x is layer_scale for x in inputs]


def order(x):
    """Of the elements in memory: dimensions of size 1 have no say in it."""
    return [step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]


@on(CPU, CUDA, TRITON)
@given(
    drawn=branches(),
    drop_prob=st.sampled_from([0.5, 0.1, 0.0, 1.0]),
    scale_by_keep=st.booleans(),
    mode=st.sampled_from([None, None, "fixed", "bernoulli"]),
)
@examples(50)
def test_drop_path(target, drawn, drop_prob, scale_by_keep, mode):
    args = drop_prob, scale_by_keep, mode
    (ours, is_scale), (theirs, _) = (dropped(drawn, each, *args) for each in both(target))
    assert len(ours) == len(theirs)
    for got, expected, is_sum in zip(ours, theirs, [False, *is_scale[: len(ours) - 1]], strict=True):
        if got is None or expected is None:
            assert got is expected
            continue
        assert got.dtype == expected.dtype
        assert order(got) == order(expected)
        if is_sum:  # over samples and positions, in another order, of terms of some ten at most
            terms = 10 * drawn[0][0].numel() / max(1, got.numel()) / (1 - drop_prob or 1)
            unit = 2.0**-53 if got.dtype == torch.float64 else 2.0**-24
            tolerance = {"rtol": torch.finfo(got.dtype).eps, "atol": unit * terms}
            torch.testing.assert_close(got, expected, **tolerance, equal_nan=True)
        else:
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
            signs = torch.signbit(got) == torch.signbit(expected)
            assert (signs | got.isnan()).all()


# Controls: what the checks must notice. The faults are in ``reference``, whose results are checked, too.


def body(test):
    """What a test does with a case that it has drawn."""
    return test.hypothesis.inner_test


def fixed_case(dtype, **settings):
    """Two plain steps of two parameters, and of an average that is a part of them."""
    rows = [fuzz.Row(shape, dtype, "plain", "plain", 0, None) for shape in [(7, 3), (5,)]]
    step = fuzz.Step(30.0, [False], None, None, None, "nothing", "plain", dtype)
    return fuzz.Case(rows, [{"lr": 0.1}], settings, {"decay": 0.5, "update_after_step": -2}, True, [step, step])


FAULTS_OF_STEPS = {**STEP_CONTROLS, **AVERAGE_CONTROLS, "wrong_norm": wrong_norm, "truncated": truncated}


@on(CPU)
@over("fault", FAULTS_OF_STEPS)
def test_steps_with_a_fault_are_noticed(target, fault):
    case = fixed_case(torch.bfloat16 if fault is truncated else torch.float32, max_grad_norm=1.0)
    go_through(case, target)
    must_fail(fault, go_through, case, target)


@on(CPU)
@over("wrong", {f.__name__: f for f in (codes.next_code, codes.next_scale)})
def test_steps_with_wrong_codes_are_noticed(target, wrong):
    case = fixed_case(torch.float32, state_dtype="int8")
    go_through(case, target)
    must_fail(lambda: codes.WrongCodes(wrong), go_through, case, target)


@on(CPU)
def test_steps_with_wrong_neighbours_are_noticed(target):
    case = fixed_case(torch.bfloat16, stochastic_rounding=True)
    go_through(case, target)
    must_fail(lambda: WrongRounding(two_units_up), go_through, case, target)


PLAIN_ROW = fuzz.Row((7, 3), torch.float32, "plain", "plain", 0, None)
ONE_TENSOR = [(torch.linspace(-1.0, 2.0, 21).view(7, 3), PLAIN_ROW)]
BRANCH = [torch.linspace(1.0, 2.0, 32).view(8, 4), torch.ones(8, 4), torch.full((4,), 0.5)], ["plain"] * 4, [True] * 3
NOTHING = partial(leaving, slice(None))
FAULTS_OF_OPS = {
    "clip_nothing": (NOTHING, test_clip_grad_norm, (ONE_TENSOR, 2.0, 0.5, False)),
    "clip_wrong_norm": (wrong_norm, test_clip_grad_norm, (ONE_TENSOR, 2.0, 0.5, False)),
    "clamp_nothing": (NOTHING, test_clip_grad_value, (ONE_TENSOR, 0.5)),
    "ema_wrong_decay": (wrong_decay, test_ema_update, (ONE_TENSOR, None, 0.9)),
    "drop_path_unscaled": (partial(wrong_forward, "unscaled"), test_drop_path, (BRANCH, 0.5, True, None)),
    "drop_path_gradient": (
        partial(wrong_gradient, "layer_scale", "nothing"),
        test_drop_path,
        (BRANCH, 0.5, True, None),
    ),
}


@on(CPU)
@over("fault", FAULTS_OF_OPS)
def test_ops_with_a_fault_are_noticed(target, fault):
    control, test, case = fault
    body(test)(target, *case)
    must_fail(control, body(test), target, *case)
