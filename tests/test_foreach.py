"""The ``foreach`` backend: what it does by itself. The tests over all targets hold it to the contract.

``elsewhere`` lets CPU tensors be served as those of a device whose numbers would have to be waited for, and which
has no fused step.
"""

import math

import pytest
import torch
from contract import DTYPES, assert_contract, exact, same_bits
from exact import adamw_step, clip_coefficient, norm
from targets import over
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trainops
from trainops import adapters, advice, reference
from trainops.adapters import _foreach_average, _foreach_fused, _foreach_norm, _foreach_rows, _foreach_update, foreach

INF, NAN = float("inf"), float("nan")
MODULES = (foreach, _foreach_average, _foreach_fused, _foreach_norm, _foreach_rows, _foreach_update)
SHAPES = [(), (0,), (1,), (127,), (33, 31), (300, 7), (2, 3, 5, 7)]


@pytest.fixture
def elsewhere(monkeypatch):
    for module in MODULES:
        if hasattr(module, "on_host"):
            monkeypatch.setattr(module, "on_host", lambda device: False)
    monkeypatch.setattr(_foreach_fused, "FUSED_DEVICES", ())


@pytest.fixture
def small_chunks(monkeypatch):
    for module in MODULES:
        if hasattr(module, "chunk_numel"):
            monkeypatch.setattr(module, "chunk_numel", lambda device: 500)


class Step:
    """An optimizer with an average in the middle of training."""

    def __init__(self, backend, dtypes, layout=lambda x: x, shapes=SHAPES, **options):
        torch.default_generator.manual_seed(0)
        param, grad, state, average = dtypes
        model = nn.Module()
        model.weights = nn.ParameterList(layout(torch.randn(shape).to(param)) for shape in shapes)
        self.ema = trainops.EMA(model, 0.9, dtype=average, update_after_step=-2, backend=backend)
        for x in self.ema.module.parameters():
            x.mul_(0.5)
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if options.get("amsgrad") else [])]
        self.params = list(model.weights)
        self.optimizer = trainops.AdamW(self.params, lr=0.1, ema=self.ema, backend=backend, **options)
        for i, p in enumerate(self.params):
            p.grad = layout(torch.randn(p.shape).to(grad))
            own = {name: layout(torch.randn(p.shape).abs().to(state)) for name in names}
            self.optimizer.state[p] = {"step": torch.tensor(float(i)), **own}

    def tensors(self):
        state = [x for p in self.params for x in self.optimizer.state[p].values()]
        return [*self.params, *state, *self.ema.module.parameters()]

    def grads(self):
        return [p.grad for p in self.params]


def copies(tensors):
    return [x.detach().clone() for x in tensors]


def all_same(tensors, others):
    return all(same_bits(x, y) for x, y in zip(tensors, others, strict=True))


OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True, "maximize": True, "weight_decay": 0.3},
    "tensor_lr": {"betas": (0.3, 0.5), "eps": 1e-3},
    "scaled": {"found_inf": 0.0},
}
F32, F64, BF16, F16 = DTYPES
TYPES = {
    "float32": (F32,) * 4,
    "bfloat16": (BF16,) * 4,
    "mixed": (BF16, BF16, F32, F32),
    "double": (F64, F64, F32, F64),
}


@over("options", OPTIONS)
@over("types", TYPES)
@pytest.mark.usefixtures("elsewhere", "small_chunks")
def test_what_is_not_fused_has_the_bits_of_the_specification(options, types):
    """Rows at different step counts share a chunk, and one row has several."""
    options = dict(options)
    found_inf = options.pop("found_inf", None)
    steps = [Step(backend, types, **options) for backend in ("reference", "foreach")]
    for step in steps:
        if found_inf is not None:
            step.optimizer.grad_scale, step.optimizer.found_inf = torch.tensor(8.0), torch.tensor(found_inf)
        if "eps" in options:
            step.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
        for _ in range(2):
            step.optimizer.step()
    assert all_same(*(step.tensors() for step in steps))


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "gaps": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


@over("layout", LAYOUTS)
@pytest.mark.usefixtures("small_chunks")
def test_layouts_have_the_bits_of_the_specification(layout):
    steps = [Step(backend, TYPES["bfloat16"], layout) for backend in ("reference", "foreach")]
    for step in steps:
        step.optimizer.step()
    assert all_same(*(step.tensors() for step in steps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("elsewhere")
def test_a_step_that_is_skipped_elsewhere_keeps_every_bit(dtype):
    step = Step("foreach", (dtype,) * 4, max_grad_norm=1.0, skip_nonfinite=True)
    words = (
        step.params[3].detach().view(torch.int64 if dtype == F64 else torch.int32 if dtype == F32 else torch.int16)
    )
    words[5] |= 0x7FC1 if dtype == BF16 else 0x7E01  # a NaN that says something, where it is one
    step.params[4].grad[3, 3] = INF
    before = copies(step.tensors())
    step.optimizer.step()
    assert all_same(step.tensors(), before)
    assert step.optimizer.skipped_steps == 1
    step.params[4].grad[3, 3] = 1.0
    step.optimizer.step()
    assert step.optimizer.skipped_steps == 1
    assert not any(same_bits(x, y) for x, y in zip(step.params[3:], before[3 : len(SHAPES)], strict=True))


# Shapes that several tensors share are stacked, if they are small; others come between them.
SHARED = [(3,), (40, 40), (70, 70), (3,), (5,), (40, 40), (3,), (0,), (40, 40), (3,), (40, 40), (40, 40), (70, 70)]


@over("shapes", {"different": SHAPES, "shared": SHARED, "tiny": 5 * [()] + 4 * [(0,)], "alike": 20 * [(7, 9)]})
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_fused_step_reads_gradients_and_copies_a_chunk_at_a_time(monkeypatch, dtype, shapes):
    step, whole, plain = (
        Step(backend, (dtype,) * 4, shapes=shapes, max_grad_norm=0.5)
        for backend in ("foreach", "foreach", "reference")
    )
    for each in (step, whole, plain):
        for state in each.optimizer.state.values():
            state["step"].fill_(3.0)
    whole.optimizer.step()
    plain.optimizer.step()
    grads, sizes, memory = copies(step.grads()), [], {}
    scaled = _foreach_fused.Copy.scaled

    def noted(self, coefficient):
        found = scaled(self, coefficient)
        sizes.append(sum(x.numel() for x in found))
        memory.update({(its := x.untyped_storage()).data_ptr(): its.nbytes() for x in found if x.numel()})
        return found

    limit = 500
    for module in (_foreach_fused, _foreach_norm):
        monkeypatch.setattr(module, "copied_numel", lambda device, dtype: limit)
    monkeypatch.setattr(_foreach_fused.Copy, "scaled", noted)
    step.optimizer.step()
    assert all_same(step.grads(), grads)
    assert max(sizes) <= limit
    assert sum(sizes) == sum(x.numel() for x in grads)
    assert sum(memory.values()) <= (_foreach_norm.KEPT + 1) * limit * dtype.itemsize
    for other in (whole, plain):
        for x, y in zip(step.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(x, y, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


BETAS = [(0.9, 0.999), (0.0, 0.999), (0.9, 1 - 1e-7), (1 - 1e-9, 1 - 1e-12)]


@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_a_fused_step_in_float64_has_its_accuracy(betas, weight_decay):
    """Of weights that are zero, the step is all that is left: it shows what cancels in ``1 - beta ** count``."""
    step = Step("foreach", (F64,) * 4, betas=betas, weight_decay=weight_decay, eps=0.5, max_grad_norm=0.5)
    for p in step.params:
        p.data.masked_fill_(torch.rand(p.shape) < 0.5, 0.0)
    before = copies(step.tensors())
    rows = [
        [exact(x) for x in (p, step.optimizer.state[p]["exp_avg"], step.optimizer.state[p]["exp_avg_sq"])]
        for p in step.params
    ]
    step.optimizer.step()
    assert not all_same(step.tensors(), before)
    coefficient = clip_coefficient(norm(list(map(exact, step.grads()))), 0.5)
    for i, (p, (param, *moments)) in enumerate(zip(step.params, rows, strict=True)):
        options = {"lr": 0.1, "betas": betas, "eps": 0.5, "weight_decay": weight_decay, "coefficient": coefficient}
        true = adamw_step(param, exact(p.grad), *moments, None, i + 1, **options)
        assert_contract(p, true["param"], None, f"parameter {i}")


def test_counts_that_no_steps_have_made():
    """They are taken as the specification takes them."""
    steps = [Step(backend, (F64,) * 4) for backend in ("foreach", "reference")]
    for step in steps:
        for p, count in zip(step.params, [-1.0, -5.0, NAN, -0.5, INF, 1e9, 0.5], strict=True):
            step.optimizer.state[p]["step"].fill_(count)
        step.optimizer.step()
    for x, y in zip(*(step.tensors() for step in steps), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_nan_is_the_largest_square_there_is(dtype):
    """Of a NaN and a number, PyTorch's fused step may take the number."""
    steps = [Step(backend, (dtype,) * 4, amsgrad=True, betas=(0.0, 0.0)) for backend in ("foreach", "reference")]
    for step in steps:
        for p in step.params[2:]:
            p.grad.view(-1)[-1] = NAN
            step.optimizer.state[p]["exp_avg_sq"].view(-1)[0] = INF  # which makes NaN of another kind: 0 * INF
        step.optimizer.step()
    for x, y in zip(*(step.tensors() for step in steps), strict=True):
        assert torch.equal(x.isnan(), y.isnan())


def test_gradients_that_are_not_clipped_are_not_copied(monkeypatch):
    step = Step("foreach", (F32,) * 4, max_grad_norm=1e9)
    monkeypatch.setattr(_foreach_fused, "Copy", None)
    step.optimizer.step()
    assert step.optimizer.grad_norm > 0


@pytest.mark.parametrize("shapes", [SHAPES, 4 * [(33, 31)]], ids=["different", "shared"])
@pytest.mark.parametrize("infinity", [INF, -INF])
def test_an_average_of_an_infinite_parameter_stays(infinity, shapes):
    step = Step("foreach", (F32,) * 4, shapes=shapes)
    for x in (step.params[3], list(step.ema.module.parameters())[3]):
        x.data.view(-1)[7] = infinity
    step.optimizer.step()
    assert list(step.ema.module.parameters())[3].view(-1)[7] == infinity


@pytest.mark.parametrize("value", [1e-23, 1e-10, 1.0, 1.1, 1e30])
@pytest.mark.parametrize("numel", [255, 1024, 4096, 70_001, 1 << 20])
def test_norms_of_long_tensors(value, numel):
    """Squares may overflow or vanish in float32. All equal, rounding errors add up."""
    x = torch.full((numel,), value)
    norm = trainops.get_total_norm([x], backend="foreach").item()
    assert norm == pytest.approx(x[0].item() * math.sqrt(numel), rel=4e-7, abs=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_tensors_that_share_shapes(dtype):
    """Each has its own: one of them needs float64, and one is not finite."""
    tensors = [(i + 1) * torch.randn(shape).to(dtype) for i, shape in enumerate(SHARED)]
    tensors[5].mul_(1e-4 if dtype == F16 else 1e-25)
    tensors[8][3, 3] = INF
    norms = _foreach_norm.sum_norms(tensors)[1]
    true = torch.stack([torch.linalg.vector_norm(x.double()) for x in tensors])
    torch.testing.assert_close(norms, true, rtol=1e-12 if dtype == F64 else 1e-6, atol=0)


def runs_of(*lengths):
    return [_foreach_rows.Run(length, None) for length in lengths]


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_what_is_not_finite_is_found(value):
    for i, shape in enumerate(SHARED):
        tensors = [torch.ones(shape) for shape in SHARED]
        assert _foreach_rows.all_finite(tensors)
        assert _foreach_rows.all_finite([tensors[i]] * 3, runs_of(2, 1))
        tensors[i].view(-1)[-1:] = value
        assert _foreach_rows.all_finite(tensors) is (shape == (0,))
        for runs in (runs_of(), runs_of(1), runs_of(2), runs_of(1, 1)):
            assert _foreach_rows.all_finite([torch.ones(shape), tensors[i]], runs) is (shape == (0,))
            assert _foreach_rows.all_finite([tensors[i].view(-1), torch.ones(2, 2)], runs) is (shape == (0,))


@pytest.mark.parametrize("limit", [1, 8, 11, 1000])
def test_chunks(limit):
    """Rows in their order, each element once; large ones in pieces, but where there are gaps."""
    sizes = [3, 0, 20, 5, 1, 7, 20, 4]
    columns = {"param": [torch.randn(size) for size in sizes], "step": [torch.tensor(float(i)) for i in range(8)]}
    columns["grad"] = [x.clone() for x in columns["param"]]
    columns["param"][6], columns["grad"][6] = (torch.randn(20, 2)[:, 0] for _ in "ab")
    found = list(_foreach_rows.chunks(columns, limit))
    for name in ("param", "grad"):
        pieces = [x for chunk in found for x in chunk[name]]
        assert same_bits(torch.cat(pieces), torch.cat(columns[name]))
    for chunk in found:
        assert sum(x.numel() for x in chunk["param"]) <= max(limit, 20 if chunk["step"][0] == 6 else 0)
        assert len(chunk["param"]) == len(chunk["grad"]) == len(chunk["step"])
    steps = [int(x) for chunk in found for x in chunk["step"]]
    assert steps == [i for i, size in enumerate(sizes) for _ in range(1 if i == 6 else max(1, -(-size // limit)))]


class WithoutFloat64(TorchDispatchMode):
    """A device that has no float64, as Apple's GPUs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{function} makes float64, which the device does not have")
        return result


@pytest.fixture
def without_float64(elsewhere, monkeypatch):
    monkeypatch.setattr(adapters, "is_transformed", lambda: False)
    reference.scalar_dtype.cache_clear()
    yield WithoutFloat64()
    reference.scalar_dtype.cache_clear()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@over("options", OPTIONS)
def test_a_device_without_float64(without_float64, dtype, options):
    """Steps and norms need none, and stay within what float32 loses."""
    options = {**options, "max_grad_norm": 0.5, "skip_nonfinite": True}
    found_inf = options.pop("found_inf", None)
    ours, theirs = (Step(backend, (dtype,) * 4, **options) for backend in ("foreach", "reference"))
    for step in (ours, theirs):
        if found_inf is not None:
            step.optimizer.grad_scale, step.optimizer.found_inf = torch.tensor(8.0), torch.tensor(found_inf)
    with without_float64:
        ours.optimizer.step()
        assert ours.optimizer.grad_norm.dtype == torch.float32
    theirs.optimizer.step()
    for x, y in zip(ours.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(ours.optimizer.grad_norms, theirs.optimizer.grad_norms)


@pytest.mark.parametrize(("value", "norm"), [(2.0**62, 2.0**63), (2.0**63, INF), (2.0**-60, 2.0**-59), (2.0**-76, 0)])
def test_the_range_of_norms_without_float64(without_float64, value, norm):
    """As docs/backends.md says: the squares are float32 numbers."""
    with without_float64:
        assert trainops.get_total_norm([torch.full((4,), value)], backend="foreach").item() == norm


def test_the_stand_in_notices_float64(without_float64):
    with without_float64, pytest.raises(TypeError, match="does not have"):
        torch.ones(3).double()


@pytest.mark.usefixtures("elsewhere")
def test_norms_elsewhere():
    tensors = [torch.randn(shape).to(dtype) for shape in SHAPES for dtype in DTYPES]
    for statistic, order in (("l1_norm", 1.0), ("l2_norm", 2.0), ("inf_norm", INF)):
        total, norms = foreach.reduce(statistic, tensors)
        doubles = [x.double().flatten() for x in tensors]
        true = torch.stack([torch.linalg.vector_norm(x, order) if x.numel() else x.sum() for x in doubles])
        torch.testing.assert_close(norms, true, rtol=1e-12, atol=0)
        torch.testing.assert_close(total, torch.linalg.vector_norm(true, order), rtol=1e-12, atol=0)


@pytest.mark.usefixtures("elsewhere")
def test_averages_and_clipping_elsewhere():
    for dtype in DTYPES:
        ours = [torch.randn(s).to(dtype) for s in SHAPES]
        specified = copies(ours)
        others = [torch.randn(s).to(dtype) for s in SHAPES]
        for tensors, backend in ((ours, "foreach"), (specified, "reference")):
            trainops.ema_update_(tensors, others, 0.75, backend=backend)
            params = [nn.Parameter(x) for x in tensors]
            for p, x in zip(params, tensors, strict=True):
                p.grad = x
            trainops.clip_grads_with_norm_(params, 1.0, torch.tensor(3.0), backend=backend)
        assert all_same(ours, specified)


def test_ordinary_steps_are_collected_and_others_are_not():
    def collected(change=lambda step: None):
        step = Step("foreach", (F32,) * 4)
        change(step)
        optimizer = step.optimizer
        averages = [{id(p): x for p, x in zip(step.params, step.ema.module.parameters(), strict=True)}]
        names = [("exp_avg", "exp_avg_sq")]
        return foreach.collect("adamw", optimizer.param_groups, optimizer.state, averages, [], names)

    found = collected()
    assert found.group_rows == [len(SHAPES)]
    assert found.averaged == [len(SHAPES)]

    def state(change):
        return lambda step: change(step.optimizer.state[step.params[4]])

    def no_gradients(step):
        for p in step.params:
            p.grad = None

    def shared(step):
        step.params[3].data = step.params[5].data.view(-1)[:127]

    changes = [
        no_gradients,
        shared,
        state(lambda its: its.clear()),
        state(lambda its: its.pop("exp_avg")),
        state(lambda its: its.update(exp_avg=its["exp_avg"].half())),
        state(lambda its: its.update(exp_avg=its["exp_avg"][1:])),
        state(lambda its: its.update(exp_avg=its["exp_avg"].mT.contiguous().mT)),
        state(lambda its: its.update(step=torch.tensor(1))),
    ]
    assert [collected(change) for change in changes] == [None] * len(changes)


def clip_twice(param):
    for _ in range(2):
        trainops.clip_grads_with_norm_(param, 1.0, torch.tensor(3.0), backend="foreach")


def test_what_is_left_to_the_specification_is_said_once(monkeypatch):
    monkeypatch.setattr(advice, "_left_to_reference", False)
    param = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    param.grad = torch.ones(3, dtype=torch.complex64).conj()
    with pytest.warns(UserWarning, match="resolve_conj") as caught:
        clip_twice(param)
    assert len(caught) == 1
    assert caught[0].filename == __file__
