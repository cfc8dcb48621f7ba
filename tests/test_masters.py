"""Masters: 16-bit parameters whose weights are those of float32 training, bit for bit.

``test_master_state.py`` has checkpoints and bad input.
"""

import pytest
import torch
from contract import same_bits
from controls import must_fail
from surroundings import Surrounded
from targets import INTERPRETER, REFERENCE, TARGETS, interpreted, over
from training import Model, make_grads, set_grads

import trainops
from trainops import reference
from trainops import reference_storage as storage

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = ((), (0,), (7,), (33, 31), (3, 4099))
KINDS = {"split": ("split", BFLOAT16), "float32": ("float32", BFLOAT16), "float32 of float16": ("float32", FLOAT16)}
over_kinds = over("kind", KINDS)
over_masters = pytest.mark.parametrize("master", ["split", "float32"])


def with_bits(*patterns):
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(FLOAT32)


def bits_of(x):
    return [
        bits & (1 << 8 * x.itemsize) - 1 for bits in x.view({2: torch.int16, 4: torch.int32}[x.itemsize]).tolist()
    ]


# Where rounding is delicate: ties, carries into the exponent, the ends of the range, what rounds to infinity.
DELICATE = [
    0x3F808000,
    0x3F818000,
    0x3F807FFF,
    0x3F808001,
    0x3FFF8000,
    0x3FFFFFFF,
    0x7F7FFFFF,
    0x7F7F8000,
    0x7F7F7FFF,
]
DELICATE += [0x00000000, 0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x007FFFFF, 0x00800000, 0x7F800000]
DELICATE += [bits | 0x80000000 for bits in DELICATE]
NANS = [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000, 0xFF800001, 0x7FFF8000]


@pytest.fixture(autouse=True)
def never_foreach(request):
    if "target" in request.fixturenames and request.getfixturevalue("target").backend == "foreach":
        pytest.skip("foreach serves masters by the specification, whose bits are not those of PyTorch's fused step")


def make(target, weights, master=None, dtype=BFLOAT16, average=FLOAT32, **options):
    """A model with these float32 weights, in 16 bits if it has a master, and its optimizer with an average."""
    model = Model([x.to(target.device, copy=True) for x in weights])
    whole = {name: x.clone() for name, x in model.state_dict().items()}
    if master is not None:
        model.to(dtype)
    ema = trainops.EMA(model, 0.9, dtype=average, backend=target.backend) if average else None
    options = {"lr": 0.03, "weight_decay": 0.1, **options}
    optimizer = trainops.AdamW(model.parameters(), master=master, ema=ema, backend=target.backend, **options)
    if master is not None:
        optimizer.load_float32_state_dict(model, whole)
    return model, optimizer


def weights_of(model, optimizer):
    return list(optimizer.float32_state_dict(model).values())


def drawn(shapes=None, seed=0):
    shapes = SHAPES if shapes is None else shapes
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# One step is that of float32


def check_as_float32(target, kind, steps, **options):
    """Steps on 16-bit parameters with a master, beside the same on float32 ones: all that is stored agrees."""
    master, dtype = kind
    options = {"state_dtype": BFLOAT16, **options}
    wide, narrow = make(target, drawn(), **options), make(target, drawn(), master, dtype, **options)
    for grads in make_grads(SHAPES, dtype, "cpu", steps):
        for model, optimizer in (wide, narrow):
            set_grads(model.params, [grad.to(target.device, model.params[0].dtype) for grad in grads])
            optimizer.step()
    assert_as_float32(wide, narrow)
    for p, weight in zip(narrow[0].params, weights_of(*narrow), strict=True):
        assert p.dtype == dtype
        error = (p.detach().double() - weight.double()).abs()
        assert (error <= 2.0 ** {BFLOAT16: -9, FLOAT16: -12}[dtype] * 2 * weight.double().abs() + 1e-7).all()
    return narrow


def assert_as_float32(wide, narrow):
    for theirs, ours in zip(weights_of(*wide), weights_of(*narrow), strict=True):
        assert ours.dtype == FLOAT32
        assert same_bits(ours, theirs.detach())
    for theirs, ours in zip(wide[0].params, narrow[0].params, strict=True):
        its, own = wide[1].state[theirs], narrow[1].state[ours]
        assert own.keys() - its.keys() == {"master"}
        assert all(same_bits(own[name], x) for name, x in its.items())
    if wide[1].ema is not None:
        for theirs, ours in zip(wide[1].ema.module.params, narrow[1].ema.module.params, strict=True):
            assert same_bits(ours, theirs)
    for name in ("grad_norm", "grad_norms"):
        theirs, ours = (getattr(optimizer, name) for _, optimizer in (wide, narrow))
        assert (theirs is None and ours is None) or same_bits(theirs, ours)


OPTIONS = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5, "skip_nonfinite": True},
    "float32_moments": {"state_dtype": FLOAT32, "max_grad_norm": 0.5},
    "mixed_moments": {"state_dtype": (BFLOAT16, FLOAT32), "amsgrad": True},
    "amsgrad": {"amsgrad": True, "maximize": True, "max_grad_norm": 1.0},
    "low_betas": {"betas": (0.3, 0.4), "eps": 1e-3},
    "no_average": {"average": None, "lr": torch.tensor(0.02)},
    "bfloat16_average": {"average": BFLOAT16},
    "float64_average": {"average": torch.float64, "max_grad_norm": 1e9},
}


@interpreted(
    lambda kind, options, **_: kind == KINDS["split"] and options in (OPTIONS["clipped"], OPTIONS["amsgrad"])
)
@over("options", OPTIONS)
@over_kinds
def test_100_steps_are_those_of_float32(target, kind, options):
    """On the CPU; elsewhere, where it takes longer, 10 of most options; in Triton's interpreter 3."""
    steps = 3 if target == INTERPRETER else 100 if target.backend == "cpu" or options == OPTIONS["clipped"] else 10
    check_as_float32(target, kind, steps, **options)


def fault(name, wrong, module=storage):
    """The specification with another function in the place of one."""
    context = pytest.MonkeyPatch()

    class Within:
        def __enter__(self):
            context.setattr(module, name, wrong)

        def __exit__(self, *_):
            context.undo()

    return Within


def unrounded(weight):
    return storage.bits(weight).__rshift__(16).to(torch.int16).view(BFLOAT16), torch.zeros_like(
        weight, dtype=torch.int16
    )


FAULTS = {
    "no_remainder": fault("split", lambda weight, right=storage.split: (right(weight)[0], right(weight)[1] * 0)),
    "truncated": fault("split", unrounded),
    "param_alone": fault("join", lambda param, master: param.float()),
    "remainder_unsigned": fault("join", lambda p, m: (storage.bits(p.float()) + (m.int() & 0xFFFF)).view(FLOAT32)),
}


@over("wrong", FAULTS)
def test_wrong_weights_are_noticed(wrong):
    must_fail(wrong, check_as_float32, REFERENCE, KINDS["split"], 3)


def average_of_the_rounded_weight():
    def ema_(averages, tensors, *args, right=reference.ema_):
        right(averages, [x if isinstance(x, torch.nn.Parameter) else x.to(BFLOAT16) for x in tensors], *args)

    return fault("ema_", ema_, reference)()


def test_an_average_of_the_rounded_weight_is_noticed():
    must_fail(average_of_the_rounded_weight, check_as_float32, REFERENCE, KINDS["split"], 3)


# Every float32 survives


def check_storage(target, master, weights, dtype=BFLOAT16):
    """A step of learning rate 0 reads and writes every weight, and leaves it as it is."""
    for x in weights.split(10_007):
        x = x.to(target.device)
        p = torch.nn.Parameter(x.to(dtype))
        optimizer = trainops.AdamW([p], lr=0.0, master=master, backend=target.backend)
        optimizer.load_float32_state_dict(torch.nn.ParameterList([p]), {"0": x})
        p.grad = torch.zeros_like(p)
        for _ in range(2):
            optimizer.step()
            assert same_bits(optimizer.float32_weight(p), x)
        assert same_bits(p.detach(), to_nearest_away(x) if dtype == BFLOAT16 else x.to(dtype))


def to_nearest_away(x):
    """As bfloat16, by way of numbers, not of bits: ``frexp`` has no rounding."""
    wide = x.double()
    exponent = torch.frexp(wide)[1].clamp(min=-125)
    scaled = torch.ldexp(wide, 8 - exponent)
    nearest = torch.where(scaled.isfinite(), (scaled.abs() + 0.5).floor().copysign(wide), scaled)
    return torch.ldexp(nearest, exponent - 8).to(BFLOAT16)


@over_masters
def test_delicate_weights_survive(target, master):
    check_storage(target, master, with_bits(*DELICATE))


def to_nearest_even(weight):
    param = weight.to(BFLOAT16)
    return param, storage.remainder(weight, param)


def test_ties_to_even_are_noticed():
    must_fail(fault("split", to_nearest_even), check_storage, REFERENCE, "split", with_bits(*DELICATE))


@interpreted(lambda **_: False)
@over_kinds
def test_random_weights_survive(target, kind):
    every = torch.randint(-(1 << 31), 1 << 31, (50_000,), generator=torch.Generator().manual_seed(0))
    weights = every.to(torch.int32).view(FLOAT32)
    check_storage(target, kind[0], weights[weights.isfinite()], kind[1])


def test_every_bfloat16_and_its_neighbours_survive():
    upper = torch.arange(1 << 16)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        weights = ((upper << 16) + lower).to(torch.int32).view(FLOAT32)
        weights = weights[~weights.isnan()]
        param, remainder = storage.split(weights)
        assert same_bits(storage.join(param, remainder), weights)
        assert same_bits(param, to_nearest_away(weights))
        check_storage(TARGETS[1], "split", weights)


@over_kinds
def test_nan_stays_nan(target, kind):
    """CUDA's is 0x7fffffff, which rounding of its bits would make -0.0."""
    master, dtype = kind
    p = torch.nn.Parameter(torch.ones(len(NANS) + 1, device=target.device, dtype=dtype))
    optimizer = trainops.AdamW([p], master=master, state_dtype=FLOAT32, backend=target.backend)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["exp_avg"][1:] = with_bits(*NANS).to(target.device)
    for _ in range(2):
        optimizer.step()
        assert p[1:].isnan().all()
        assert optimizer.float32_weight(p)[1:].isnan().all()
        assert p[0].isfinite()
        if dtype == BFLOAT16:
            assert bits_of(p.detach()[1:]) == [0x7FC0] * len(NANS)
        if master == "split":
            assert optimizer.state[p]["master"].tolist()[1:] == [0] * len(NANS)


def test_the_specification_splits_nan_without_a_remainder():
    for bits in NANS:
        param, remainder = storage.split(with_bits(bits))
        assert (bits_of(param), remainder.item()) == ([0x7FC0], 0)
    assert storage.split(with_bits(0x7F7FFFFF))[1].item() == -1
    assert storage.split(with_bits(0x3F808000))[1].item() == -0x8000


# What a step leaves alone, and where tensors lie


@over_masters
@pytest.mark.parametrize("how", ["skip_nonfinite", "found_inf"])
def test_a_skipped_step_changes_no_bit(target, master, how):
    model, optimizer = make(target, drawn(), master, skip_nonfinite=how == "skip_nonfinite")
    set_grads(model.params, make_grads(SHAPES, BFLOAT16, target.device, 1)[0])
    optimizer.step()
    with torch.no_grad():
        for p in model.params:  # written by others: a step would change the master
            p.view(-1)[:1] = 0.0
            optimizer.state[p]["master"].view(-1)[:1] = -3
    model.params[3].grad.fill_(float("inf"))
    if how == "found_inf":
        optimizer.grad_scale, optimizer.found_inf = (torch.ones((), device=target.device) for _ in range(2))
    before = everything(model, optimizer)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(map(same_bits, everything(model, optimizer), before))


def everything(model, optimizer):
    states = [x for p in model.params for x in optimizer.state[p].values()]
    return [x.detach().clone() for x in (*model.params, *states, *optimizer.ema.module.params)]


def moved(x, offset, layout):
    """A copy at an odd place, amid memory that must stay as it is."""
    if layout == "transposed" and x.ndim == 2:
        x = x.t().contiguous().t()
    if layout == "gaps":
        return Surrounded(x.contiguous(), 8 + offset, step=2)
    return Surrounded(x, 8 + offset)


@interpreted(lambda layout, **_: layout == "offset")
@pytest.mark.parametrize("layout", ["offset", "transposed", "gaps", "master_alone"])
@over_kinds
def test_wherever_tensors_lie(target, kind, layout):
    master, dtype = kind
    wide, narrow = (
        make(target, drawn(), state_dtype=FLOAT32),
        make(target, drawn(), master, dtype, state_dtype=FLOAT32),
    )
    placed = []

    def place(x, offset):
        placed.append(moved(x, offset, layout))
        return placed[-1].tensor

    for grads in make_grads(SHAPES, dtype, "cpu", 2):
        for model, optimizer in (wide, narrow):
            set_grads(model.params, [grad.to(target.device, model.params[0].dtype) for grad in grads])
            if model is narrow[0]:
                for p in model.params:
                    state = optimizer.state[p]
                    state["master"] = place(state["master"], 1)
                    if layout != "master_alone":
                        p.data, p.grad = place(p.data, 3), None
                        state["exp_avg"] = place(state["exp_avg"], 2)
                set_grads(model.params, [grad.to(target.device) for grad in grads])
            optimizer.step()
    assert_as_float32(wide, narrow)
    assert all(x.is_whole() for x in placed)


def test_gradients_of_another_type(target):
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("gradients have their parameter's type in this PyTorch")
    wide, narrow = make(target, drawn()), make(target, drawn(), "split", state_dtype=FLOAT32)
    for p in narrow[0].params:
        p.grad_dtype = FLOAT32
    for grads in make_grads(SHAPES, FLOAT32, target.device, 3):
        for model, optimizer in (wide, narrow):
            set_grads(model.params, grads)
            optimizer.step()
    assert_as_float32(wide, narrow)


@over_masters
def test_float32_parameters_have_none(target, master):
    first, second, third = (
        torch.nn.Parameter(torch.ones(5, device=target.device).to(x)) for x in (BFLOAT16, FLOAT32, torch.float64)
    )
    optimizer = trainops.AdamW(
        [{"params": [first, second]}, {"params": [third]}], master=master, backend=target.backend
    )
    for _ in range(3):
        for p in (first, second, third):
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert ["master" in optimizer.state[p] for p in (first, second, third)] == [True, False, False]
    assert optimizer.state[first]["master"].dtype == {"split": torch.int16, "float32": FLOAT32}[master]
    assert optimizer.float32_weight(second) is second


def test_it_costs_two_bytes():
    model, optimizer = make(REFERENCE, drawn([(1000,)]), "split")
    state = optimizer.state[model.params[0]]
    assert sum(x.numel() * x.itemsize for x in state.values()) == 4 + (2 + 2 + 2) * 1000
