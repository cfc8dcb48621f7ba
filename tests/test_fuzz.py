"""Random cases: every backend, step by step, beside ``reference`` and an evaluation in extended precision."""

import pytest
import torch

pytest.importorskip("hypothesis")
import fuzz
from fuzz import World
from fuzz_contract import (
    as_bytes,
    check_step,
    check_total_norm,
    clip_coefficient,
    clipped_exactly,
    expected_average,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import CPU_TARGETS

import trainops

CPU, CUDA, TRITON = "cpu", "cuda", "triton"


def examples(count):
    """So many cases in the default profile, and as many times more in a thorough one."""
    return settings(max_examples=count * settings.default.max_examples // 100)


def on(*backends):
    """Over backends for CPU tensors, as far as they are there."""
    targets = [target for target in CPU_TARGETS if target.backend in backends]
    return pytest.mark.parametrize("target", targets, indirect=True, ids="-".join)


def outcome(function, *args):
    """The type of what a function raises."""
    try:
        function(*args)
    except Exception as error:
        return type(error), str(error)
    return None


def go_through(case, target):
    ours, others = World(case, target.backend), World(case, "reference")
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
        assert ours.optimizer.skipped_steps == others.optimizer.skipped_steps
        for param, grad in zip(ours.model.params, grads, strict=True):
            assert grad is None or torch.equal(as_bytes(param.grad), as_bytes(grad))


@on(CPU)
@given(case=fuzz.cases(st.sampled_from([*fuzz.SHAPES * 10, (65_537,)])))
@examples(250)
def test_steps(target, case):
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
    "shape": lambda state: state.update(exp_avg=torch.zeros(4, 5)),
    "integers": lambda state: state.update(exp_avg_sq=torch.zeros_like(state["exp_avg_sq"], dtype=torch.int64)),
    "complex": lambda state: state.update(exp_avg=torch.zeros(3, 2, dtype=torch.complex64)),
    "overlap": lambda state: state.update(exp_avg=torch.zeros(1).expand(state["exp_avg"].shape)),
    "number": lambda state: state.update(step=1),
    "two steps": lambda state: state.update(step=torch.zeros(2)),
    "missing": lambda state: state.pop("exp_avg_sq"),
    "sparse": None,
    "average": None,
}


def spoil(world, how, i):
    """Make a tensor of parameter ``i`` one that no step can take."""
    param = world.model.params[i]
    if how == "sparse":
        param.grad = torch.ones_like(param.grad).to_sparse()
    elif how == "average":
        world.ema.module.params[i] = torch.nn.Parameter(torch.zeros(4, 5), requires_grad=False)
    else:
        SPOIL[how](world.optimizer.state[param])


def go_wrong(case, target, how):
    worlds = [World(case, target.backend), World(case, "reference")]
    raised = []
    for world in worlds:
        for step in case.steps:
            world.set_grads(step, case.seed)
            world.step(step)
        spoil(world, how, len(case.rows) // 2)
        before = {name: x.clone() for name, x in world.tensors().items() if isinstance(x, torch.Tensor)}
        raised.append(outcome(world.step, case.steps[0]))
        after = {name: x for name, x in world.tensors().items() if isinstance(x, torch.Tensor)}
        assert list(after) == list(before)
        for name, x in before.items():
            assert torch.equal(as_bytes(after[name]), as_bytes(x)), f"{name} has changed"
        assert world.optimizer.skipped_steps == 0
    assert raised[0] is not None
    assert raised[0][0] is raised[1][0], raised


REAL_ROWS = fuzz.lists_of_rows(st.sampled_from([(3, 2)]), st.sampled_from(fuzz.FLOATS), 4)
PLAIN_STEP = st.just(fuzz.Step(1.0, [False], None, None, None, "nothing", "plain", torch.float32))
WRONG = {
    "case": st.builds(
        fuzz.Case,
        rows=REAL_ROWS,
        groups=st.lists(fuzz.GROUPS, min_size=1, max_size=2),
        settings=fuzz.SETTINGS,
        ema=st.just({"decay": 0.5}),
        fused=st.just(True),
        steps=st.lists(PLAIN_STEP, min_size=1, max_size=1),
        seed=st.integers(0, 7),
    ),
    "how": st.sampled_from(list(SPOIL)),
}


@on(CPU, CUDA, TRITON)
@given(**WRONG)
@examples(20)
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
    poison = draw(st.sampled_from([None] * 5 + [float("nan"), float("inf"), -float("inf")]))
    if poison is not None and tensors[0].numel():
        tensors[0].view(-1)[-1] = poison
    return list(zip(tensors, rows, strict=True))


def placed(drawn, role="layout"):
    guards = fuzz.Guards()
    layouts = [getattr(row, role) for _, row in drawn]
    return guards, [guards.place(x, layout) for (x, _), layout in zip(drawn, layouts, strict=True)]


def clipped(drawn, backend, clip, *args):
    """What ``clip`` makes of gradients, and what it returns."""
    guards, grads = placed(drawn)
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    found = []
    result = outcome(lambda: found.append(clip(params, *args, backend=backend)))
    guards.check()
    return [p.grad for p in params], found[0] if found else result


@on(CPU, CUDA, TRITON)
@given(
    drawn=lists_of_tensors(),
    norm_type=st.sampled_from([2.0, 2, 1.0, float("inf"), 0.5, 3, 0, -1.0]),
    max_norm=st.sampled_from([0.5, 0.0, 1e9, float("inf"), torch.tensor(0.25)]),
    error_if_nonfinite=st.booleans(),
)
@examples(30)
def test_clip_grad_norm(target, drawn, norm_type, max_norm, error_if_nonfinite):
    args = trainops.clip_grad_norm_, max_norm, norm_type, error_if_nonfinite
    (ours, norm), (theirs, expected) = (clipped(drawn, name, *args) for name in (target.backend, "reference"))
    if not isinstance(norm, torch.Tensor):
        assert norm[0] is RuntimeError
        assert norm[0] is expected[0]
        assert all(torch.equal(as_bytes(x), as_bytes(grad)) for x, (grad, _) in zip(ours, drawn, strict=True))
        return
    grads = [grad for grad, _ in drawn]
    check_total_norm(target.backend, norm, expected, grads, norm_type)
    coefficient = clip_coefficient(norm, max_norm)
    for got, other, grad in zip(ours, theirs, grads, strict=True):
        clipped_exactly(grad, coefficient).check("gradient", got, other)


@on(CPU, CUDA, TRITON)
@given(drawn=lists_of_tensors(), bound=st.sampled_from([0.5, 0.0, 1e-3, float("inf"), 1]))
@examples(15)
def test_clip_grad_value(target, drawn, bound):
    ours, theirs = (clipped(drawn, name, trainops.clip_grad_value_, bound) for name in (target.backend, "reference"))
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
    (guards, ours), (_, theirs) = (placed(averages) for _ in range(2))
    _, sources = placed(drawn, "grad_layout")
    trainops.ema_update_(ours, sources, decay, backend=target.backend)
    trainops.ema_update_(theirs, sources, decay, backend="reference")
    guards.check()
    for got, other, (before, _), source in zip(ours, theirs, averages, sources, strict=True):
        expected_average(before, source, decay).check("average", got, other)


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


def dropped(drawn, backend, drop_prob, scale_by_keep, mode):
    """The result, and the gradients of what requires one; with a mode, of a branch that is run on kept samples."""
    tensors, layouts, required = drawn
    guards = fuzz.Guards()
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
    (ours, is_scale), (theirs, _) = (dropped(drawn, name, *args) for name in (target.backend, "reference"))
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
