"""What lies between tensors and kernels: 16-bit numbers, odd layouts and addresses, and tensors that move."""

import re

import pytest
import torch
from contract import same_bits
from targets import over_cpu_targets, thorough
from torch import nn
from training import at_offset

import trainops
from trainops import core
from trainops.adapters import cpu, cuda, select

DLPACK_API = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
PLAIN_TYPES = (torch.Tensor, nn.Parameter)

sixteen_bits = pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


# The same numbers, otherwise arranged.
LAYOUTS = {
    "contiguous": torch.clone,
    "unaligned": lambda x: at_offset(x, 1),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "gaps": lambda x: torch.stack((x, x), -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),  # the numbers of the first row, and its memory
    "conjugated": lambda x: x.conj().resolve_conj().conj(),
    "negated": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
}


def plain(x):
    return x.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def every_pattern(narrow):
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(narrow)


def same_but_nan_payloads(a, b):
    return torch.equal(a.isnan(), b.isnan()) and same_bits(a[~a.isnan()], b[~b.isnan()])


def stored_as(x, dtype, pieces=1):
    """The numbers ``x`` as the kernel of the average stores them, given in so many tensors."""
    out = torch.zeros_like(x, dtype=dtype)
    trainops.ema_update_(out.tensor_split(pieces), x.tensor_split(pieces), 0.0, backend="cpu")
    return out


def halfway(narrow):
    """Every float32 midway between neighbours of 16 bits, or the largest and infinity; and those next to it."""
    numbers = every_pattern(narrow)
    numbers = numbers[numbers.isfinite()].double().unique()
    gaps = numbers.diff()
    middle = torch.cat((numbers[1:] - gaps / 2, numbers[-1:] + gaps[-1:] / 2, numbers[:1] - gaps[:1] / 2)).float()
    infinity = torch.full_like(middle, torch.inf)
    return torch.cat((middle, middle.nextafter(infinity), middle.nextafter(-infinity)))


def random_patterns(count):
    return torch.randint(-(2**31), 2**31, (count,)).int().view(torch.float32)


FLOAT32_NUMBERS = {
    "random": lambda narrow: random_patterns(300_000),
    "halfway": halfway,
    "subnormal": lambda narrow: torch.rand(10_000) * torch.finfo(narrow).smallest_normal,
    "float32_subnormal": lambda narrow: torch.randint(1, 2**23, (10_000,)).int().view(torch.float32),
    "overflowing": lambda narrow: torch.finfo(narrow).max * (1 + torch.randn(10_000) * torch.finfo(narrow).eps),
    "extremes": lambda narrow: torch.tensor([torch.finfo(x).max for x in (narrow, torch.float32)]),
}


@sixteen_bits
def test_every_16_bit_number_widens_exactly(narrow):
    x = every_pattern(narrow)
    # A branch that is dropped, added to every number: the sum has the wider type, the sign of zero and infinities.
    wide = trainops.drop_path_add(x, torch.ones(len(x)), 1.0, True, backend="cpu")
    assert same_but_nan_payloads(wide, x.float())


@sixteen_bits
@pytest.mark.parametrize("pieces", [1, 9000], ids=["vectors", "tails"])
def test_every_16_bit_number_survives_a_round_trip(narrow, pieces):
    grads = every_pattern(narrow).clone()
    params = [nn.Parameter(torch.zeros_like(x)) for x in grads.tensor_split(pieces)]
    for p, grad in zip(params, grads.tensor_split(pieces), strict=True):
        p.grad = grad
    trainops.clip_grad_value_(params, torch.inf, backend="cpu")
    assert same_but_nan_payloads(grads, every_pattern(narrow))


@sixteen_bits
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_finite_16_bit_numbers_widen_and_narrow_again(narrow, wide):
    x = every_pattern(narrow)
    x = x[x.isfinite() & (x != 0)]
    widened = stored_as(x, wide)
    assert same_bits(widened, x.to(wide))
    assert same_bits(stored_as(widened, narrow), x)


@sixteen_bits
@pytest.mark.parametrize("pieces", [1, 3000], ids=["vectors", "tails"])
@pytest.mark.parametrize("numbers", FLOAT32_NUMBERS.values(), ids=FLOAT32_NUMBERS)
def test_float32_is_rounded_as_by_pytorch(narrow, numbers, pieces):
    x = numbers(narrow)
    x = x[~x.isinf() & (x != 0)]  # of these, an average makes NaN and +0
    assert same_but_nan_payloads(stored_as(x, narrow, pieces), x.to(narrow))


@sixteen_bits
def test_float64_is_rounded_as_by_pytorch(narrow):
    x = torch.cat((halfway(narrow), random_patterns(10_000))).double()
    x = x[~x.isinf() & (x != 0)]
    x = torch.cat([x * (1 + factor * 2.0**-40) for factor in (-1, 0, 1)])
    assert same_but_nan_payloads(stored_as(x, narrow), x.to(narrow))


@pytest.fixture
def configure():
    """Chooses one of them: DLPack, or Python."""
    chosen = {"describe": core.describe, "plain_types": PLAIN_TYPES}
    yield lambda api: core.reader.configure(api=api, **chosen)
    core.reader.configure(api=DLPACK_API, **chosen)


# Addresses are numbers: one that stands where another belongs is not noticed.


def signatures(module):
    """What the functions of a module take, and its classes' constructors."""
    for name, x in vars(module).items():
        if callable(x):
            doc = (x.__init__ if isinstance(x, type) else x).__doc__
            yield name, re.match(r"\w+\((?:self: [\w.]+, )?(.*)\) -> ", doc)[1]


@pytest.mark.parametrize("module", [pytest.param(x, id=x.__name__) for x in (cpu._cpu, cuda._cuda) if x is not None])
def test_all_but_tables_are_given_by_name(module):
    found = dict(signatures(module))
    assert {"reduce", "scale", "clamp", "ema", "update", "drop_path", "drop_path_backward"} <= found.keys()
    for name, arguments in found.items():
        assert re.fullmatch(r"((table|staged|operands|reader): [\w.:]+)?((^|, )\*, \w.*)?", arguments), name


@pytest.mark.parametrize("operands", [core._core.DropPath, core._core.DropPathBackward])
def test_operands_are_given_by_name(operands):
    assert re.search(r"\(self: [\w.]+, reader: [\w.:]+, \*, device_type: ", operands.__init__.__doc__)


def test_addresses_are_refused_without_their_names():
    table, rows = core.table("reduce", {"tensor": [torch.ones(4)]}, "cpu"), torch.zeros(1)
    arguments = {"statistic": "l2_norm", "rows_out": rows.data_ptr()}
    with pytest.raises(TypeError):
        cpu._cpu.reduce(table, *arguments.values())
    assert rows == 0
    assert cpu._cpu.reduce(table, **arguments) == rows == 2


def test_both_descriptions_give_the_same_step(configure, dtype):
    results = []
    for api in (DLPACK_API, None):
        configure(api)
        torch.manual_seed(0)
        shapes = [(), (0,), (7,), (2, 3, 5, 7), (70001,), (2, 3, 5, 7)]
        params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        params[3] = nn.Parameter(LAYOUTS["channels_last"](params[3].detach()))
        params[5] = nn.Parameter(LAYOUTS["gaps"](params[5].detach()))
        optimizer = trainops.AdamW(params, lr=0.1, amsgrad=True, max_grad_norm=1.0, backend="cpu")
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            optimizer.step()
        results.append([optimizer.grad_norm, *params, *(x for p in params for x in optimizer.state[p].values())])
    assert all(map(same_bits, *results))


# The layouts of parameter, gradient and moments, and what else is special.
IRREGULAR = {
    "regular": ("contiguous", "contiguous", "contiguous", {}),
    "unaligned": ("unaligned", "unaligned", "unaligned", {}),
    "channels_last": ("channels_last", "channels_last", "channels_last", {}),
    "channels_last_param": ("channels_last", "contiguous", "contiguous", {}),
    "channels_last_param_and_grad": ("channels_last", "channels_last", "contiguous", {}),
    "channels_last_grad": ("contiguous", "channels_last", "contiguous", {}),
    "transposed_grad": ("contiguous", "transposed", "contiguous", {}),
    "transposed_state": ("contiguous", "contiguous", "transposed", {}),
    "expanded_grad": ("contiguous", "expanded", "contiguous", {}),
    "gaps_in_grad": ("contiguous", "gaps", "contiguous", {}),
    "gaps_in_state": ("contiguous", "contiguous", "gaps", {}),
    "gaps_in_param": ("gaps", "contiguous", "contiguous", {}),
    "gaps_in_all": ("gaps", "gaps", "gaps", {}),
    "negated_grad": ("contiguous", "negated", "contiguous", {}),
    "negated_grad_of_one": ("contiguous", "negated", "contiguous", {"shape": (1,)}),
    "negated_grad_of_a_scalar": ("contiguous", "negated", "contiguous", {"shape": ()}),
    "negated_param_of_one": ("negated", "contiguous", "contiguous", {"shape": (1,)}),
    "complex": ("contiguous", "contiguous", "contiguous", {"is_complex": True}),
    "complex_conjugated_grad": ("contiguous", "conjugated", "contiguous", {"is_complex": True}),
    "complex_transposed_grad": ("contiguous", "transposed", "contiguous", {"is_complex": True}),
    "complex_gaps": ("gaps", "contiguous", "contiguous", {"is_complex": True}),
    "float64_step": ("contiguous", "contiguous", "contiguous", {"step_dtype": torch.float64}),
    "float64_step_and_gaps": ("gaps", "contiguous", "contiguous", {"step_dtype": torch.float64}),
}


def adamw_from_a_checkpoint(optimizer_class, values, arranged, step_dtype, **options):
    """Two steps of an optimizer on a parameter of such values and moments, between two ordinary parameters."""
    param, grads, moments = values
    in_param, in_grad, in_state = arranged
    params = [nn.Parameter(x) for x in (torch.ones(5), in_param(param), torch.ones(9001))]
    optimizer = optimizer_class(params, lr=0.1, amsgrad=True, **options)
    state = {name: in_state(x) for name, x in zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), moments, strict=True)}
    optimizer.state[params[1]] = {"step": torch.tensor(4.0, dtype=step_dtype), **state}
    layouts = [x.stride() for x in (params[1], *state.values())]
    for grad in grads:
        params[0].grad, params[1].grad, params[2].grad = torch.ones(5), in_grad(grad), torch.ones(9001)
        optimizer.step()
    assert layouts == [x.stride() for x in (params[1], *state.values())]
    assert all(optimizer.state[params[1]][name] is x for name, x in state.items())
    return [*(p.detach() for p in params), optimizer.state[params[1]]["step"], *state.values()]


# For the device backends, whose tables have the same reader or the same rules.
FEW_IRREGULAR = ("channels_last", "channels_last_grad", "expanded_grad", "gaps_in_all", "negated_grad")
FEW_IRREGULAR += ("complex_conjugated_grad", "float64_step_and_gaps")


def is_of_a_device_backend(target):
    return target.backend in ("cuda", "triton")


@thorough(
    lambda target, irregular, precision: (
        is_of_a_device_backend(target) and (irregular not in FEW_IRREGULAR or precision == torch.float64)
    )
)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("irregular", IRREGULAR)
@over_cpu_targets
def test_irregular_rows(target, irregular, precision):
    backend, (param, grad, state, special) = target.backend, IRREGULAR[irregular]
    shape, step_dtype = special.get("shape", (4, 3, 5, 6)), special.get("step_dtype", torch.float32)
    dtype = precision.to_complex() if special.get("is_complex") else precision
    values = torch.randn(shape, dtype=dtype), torch.randn(2, *shape, dtype=dtype), torch.randn(3, *shape, dtype=dtype)
    values[2][1:] = values[2][1:] * values[2][1:].conj() + 0.1
    if dtype.is_complex:
        values[2][1:] += 0.3j
    arranged = [LAYOUTS[name] for name in (param, grad, state)]
    plainly = [lambda x, layout=layout: plain(layout(x)) for layout in arranged]
    ours = adamw_from_a_checkpoint(trainops.AdamW, values, arranged, step_dtype, backend=backend)
    regular = adamw_from_a_checkpoint(trainops.AdamW, values, plainly, step_dtype, backend=backend)
    torchs = adamw_from_a_checkpoint(torch.optim.AdamW, values, plainly, step_dtype, foreach=False)
    for our, ordinary, expected in zip(ours, regular, torchs, strict=True):
        torch.testing.assert_close(our, expected)
        # `foreach` has PyTorch's fused step for regular rows alone, which rounds elsewhere.
        assert backend in ("reference", "foreach") or same_bits(plain(our), ordinary)


@pytest.mark.parametrize("in_state", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_param", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_mixed_dtypes(in_param, in_state):
    values = torch.randn(2000).to(in_param), torch.randn(2, 2000).to(in_param), torch.rand(3, 2000).to(in_state)
    ours, expected = (
        adamw_from_a_checkpoint(trainops.AdamW, values, [torch.clone] * 3, torch.float32, backend=backend)
        for backend in ("cpu", "reference")
    )
    for our, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, reference)


def test_gaps_are_left_alone(dtype):
    memory = torch.full((2, 9, 4), 7.0, dtype=dtype)
    param, average, grad = memory[0, :, 1], memory[1, :, 2], torch.ones(9, dtype=dtype)
    p = nn.Parameter(param)
    p.grad = grad
    trainops.AdamW([p], lr=0.1, backend="cpu").step()
    trainops.ema_update_([average], [grad], 0.5, backend="cpu")
    trainops.clip_grads_with_norm_([p], 1.0, torch.tensor(2.0), backend="cpu")
    assert (param != 7).all()
    assert (average != 7).all()
    assert (memory == 7).sum() == memory.numel() - 18


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("what", ["parameter", "average"])
def test_a_lazily_conjugated_target_is_not_silently_left_alone(backend, what):
    target, source = torch.zeros(3, dtype=torch.complex64), torch.tensor([1 + 2j, 3 - 4j, 5j])

    def write(target):
        if what == "average":
            trainops.ema_update_([target], [source], 0.0, backend=backend)
            return target
        p = nn.Parameter(target)
        p.grad = source
        trainops.AdamW([p], lr=0.1, backend=backend).step()
        return p.detach()

    lazily = target.clone().conj()
    try:
        ours = write(lazily)
    except RuntimeError:  # as PyTorch does
        assert not lazily.resolve_conj().any()
        return
    torch.testing.assert_close(ours.resolve_conj(), write(target.clone()))


def everything(dtype, shapes, place):
    """What a fused step, an average and clipping make of tensors that ``place(x, role)`` puts somewhere."""
    torch.manual_seed(0)
    randoms = [[torch.randn(shape).to(dtype) for _ in range(8)] for shape in shapes]
    params = [nn.Parameter(place(x[0], 0)) for x in randoms]
    model = nn.Module()
    model.params = nn.ParameterList(params)
    ema = trainops.EMA(model, 0.9, backend="cpu")
    options = {"lr": 0.1, "amsgrad": True, "max_grad_norm": 1.0, "skip_nonfinite": True}
    optimizer = trainops.AdamW(params, **options, ema=ema, backend="cpu")
    for p, x, average in zip(params, randoms, ema.module.params, strict=True):
        p.grad = place(x[1], 1)
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        state = {name: place(x[i].abs(), i) for i, name in enumerate(names, start=2)}
        optimizer.state[p] = {"step": torch.tensor(3.0), **state}
        average.data = place(x[5], 5)
    for _ in range(3):
        optimizer.step()
    averages, sources = ([place(x[i], i) for x in randoms] for i in (6, 7))
    trainops.ema_update_(averages, sources, 0.9, backend="cpu")
    norm = trainops.clip_grad_norm_(params, 0.5, backend="cpu")
    for role, tensors in ((0, params), (1, [p.grad for p in params]), (5, ema.module.params), (6, averages)):
        assert not any(same_bits(x, old[role]) for x, old in zip(tensors, randoms, strict=True) if x.numel())
    dropped = trainops.drop_path_add(averages[-1], sources[-1], 0.5, True, layer_scale=params[0], backend="cpu")
    mask = torch.ones(len(sources[-1]), *[1] * (sources[-1].ndim - 1), dtype=dtype)
    mask[::3] = 0
    of_branch = select("cpu", "cpu").drop_path_backward(averages[-1], sources[-1], mask, params[0].detach())
    states = [x for p in params for x in optimizer.state[p].values()]
    norms = [optimizer.grad_norm, optimizer.grad_norms, norm]
    return [*norms, *params, *(p.grad for p in params), *states, *ema.module.params, *averages, dropped, *of_branch]


def test_unaligned_addresses_give_the_same_bits(dtype):
    shapes = [(37,), (1,), (1000,), (3, 2049), (64, 37)]
    aligned = everything(dtype, shapes, lambda x, role: x.clone())
    for offset in range(9):
        for shift in (0, 1):  # all tensors alike, and each at an offset of its own
            unaligned = everything(dtype, shapes, lambda x, role: at_offset(x, (offset + shift * role) % 9))  # noqa: B023
            assert all(map(same_bits, aligned, unaligned)), (offset, shift)


def test_any_number_of_threads_gives_the_same_bits(dtype):
    shapes = [(31,), (3, 70001), (0,), *[(100,)] * 50, (200_000,), (4, 5000, 31)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            if cpu._cpu.threads() != count:
                pytest.skip("trainops is built without OpenMP, or with another one than torch")
            results.append(everything(dtype, shapes, lambda x, role: x.clone()))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32], ids=str)
def test_an_unsupported_dtype_raises_and_changes_nothing(dtype):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)]
    optimizer = trainops.AdamW(params, lr=0.1, max_grad_norm=1.0, backend="cpu")
    params[0].grad = torch.ones(3)
    optimizer.step()
    params[1].grad = torch.ones(3).to(dtype)
    watched = [*params, *(p.grad for p in params), *optimizer.state[params[0]].values()]
    before = [x.detach().clone() for x in watched]
    for call in (
        optimizer.step,
        lambda: trainops.clip_grad_value_(params, 0.5, backend="cpu"),
        lambda: trainops.clip_grads_with_norm_(params, 1.0, torch.tensor(2.0), backend="cpu"),
    ):
        with pytest.raises(RuntimeError, match=str(dtype)):
            call()
        assert all(map(same_bits, watched, before))


def test_an_average_of_an_unsupported_dtype_raises_and_changes_nothing():
    averages = [torch.zeros(3), torch.zeros(3).to(torch.float8_e4m3fn)]
    with pytest.raises(ValueError, match=r"tensor 1 is torch\.float8_e4m3fn; averages are of floating-point"):
        trainops.ema_update_(averages, [torch.ones(3), torch.ones(3).to(torch.float8_e4m3fn)], 0.5, backend="cpu")
    assert not any(x.float().any() for x in averages)


MOVES = ["param", "grad", "average", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"]


@thorough(lambda target, dtype, moved: is_of_a_device_backend(target) and dtype != torch.float32)
@pytest.mark.parametrize("moved", MOVES)
@over_cpu_targets
def test_tensors_that_move_between_steps_are_followed(target, dtype, moved):
    backend, results = target.backend, []
    for moves in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(7, 5).to(dtype)
        ema = trainops.EMA(model, 0.9, backend=backend)
        optimizer = trainops.AdamW(model.parameters(), lr=0.1, amsgrad=True, ema=ema, backend=backend)
        for p in model.parameters():
            p.grad = torch.randn(p.shape).to(dtype)
        optimizer.step()
        places = {"param": model.weight, "grad": model.weight.grad, "average": ema.module.weight}
        target = (places | optimizer.state[model.weight])[moved]
        left, value = target.detach(), target.detach() * 2
        before = left.clone()
        if moves:
            target.data = value.clone()
        else:
            target.detach().copy_(value)
        optimizer.step()
        if moves:
            assert same_bits(left, before)
        states = [x for p in model.parameters() for x in optimizer.state[p].values()]
        results.append([*model.parameters(), *ema.module.parameters(), *states])
    assert all(map(same_bits, *results))


@over_cpu_targets
def test_tensors_that_are_replaced_between_steps_are_followed(target):
    backend, results = target.backend, []
    for optimizer_class, options in ((trainops.AdamW, {"backend": backend}), (torch.optim.AdamW, {"foreach": False})):
        p = nn.Parameter(torch.ones(5))
        optimizer = optimizer_class([p], lr=0.1, **options)
        p.grad = torch.ones(5)
        optimizer.step()
        p.data, p.grad = torch.full((3, 5), 2.0), torch.full((3, 5), -1.0)
        moments = {"exp_avg": torch.full((3, 5), 0.5), "exp_avg_sq": torch.full((3, 5), 0.3)}
        optimizer.state[p] = {"step": torch.tensor(9.0), **moments}
        optimizer.step()
        results.append((p.detach(), *optimizer.state[p].values()))
    for our, expected in zip(*results, strict=True):
        torch.testing.assert_close(our, expected)
