"""Averages of weights: numbers, the decay's schedule, models that change under the average, and the fused update."""

import copy
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from contract import DTYPES, assert_contract, exact, same_bits
from targets import Target
from torch import nn
from torch.optim import swa_utils

import trainops

INF, NAN = float("inf"), float("nan")
DECAYS = [0.0, 0.3, 0.9, 0.9999, 1.0]

# Views of a tensor of shape (6, 7, 8, 9).
LAYOUTS = {f"offset_{i}": lambda x, i=i: x.flatten()[i:] for i in (0, 1, 2, 3, 5, 7)} | {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2),
    "every_other": lambda x: x[..., ::2],
    "one_column": lambda x: x[..., 5],
}

# A model's dtype, and that of its average where it is another.
BFLOAT16_IN_FLOAT32 = (torch.bfloat16, torch.float32)
AVERAGES = [*((dtype, None) for dtype in DTYPES), BFLOAT16_IN_FLOAT32, (torch.float64, torch.float32)]


def over(name, table):
    return pytest.mark.parametrize(name, table.values(), ids=table.keys())


over_layouts = over("layout", LAYOUTS)
over_decays = pytest.mark.parametrize("decay", DECAYS)
over_averages = pytest.mark.parametrize(("dtype", "shadow"), AVERAGES, ids=str)
over_two_averages = pytest.mark.parametrize(("dtype", "shadow"), [AVERAGES[0], BFLOAT16_IN_FLOAT32], ids=str)


def randn(shape, dtype, device):
    return torch.randn(shape, dtype=torch.float64, device=device).to(dtype)


def exact_ema(average, tensors, decay):
    """The average after it has followed ``tensors``, one after the other, in extended precision."""
    average = exact(average)
    for x in tensors:
        average = average + (1 - np.longdouble(decay)) * (exact(x) - average)
    return average


def check_update(target, averages, tensors, decay):
    torchs = copy.deepcopy(averages)
    true = [exact_ema(average, [x], decay) for average, x in zip(averages, tensors, strict=True)]
    trainops.ema_update_(averages, tensors, decay, backend=target.backend)
    torch._foreach_lerp_(torchs, [x.to(y.dtype) for x, y in zip(tensors, torchs, strict=True)], 1 - decay)
    for i, average in enumerate(averages):
        assert_contract(average, true[i], torchs[i], f"average {i}")


# ema_update_.


def test_matches_exact_for_all_shapes(target, dtype, shapes):
    averages, tensors = ([randn(shape, dtype, target.device) for shape in shapes] for _ in range(2))
    check_update(target, averages, tensors, 0.9)


@over_decays
@pytest.mark.parametrize("dtypes", [*zip(DTYPES, DTYPES, strict=True), *itertools.permutations(DTYPES, 2)], ids=str)
def test_matches_exact_for_all_decays_and_dtypes(target, dtypes, decay):
    shapes = [(33, 31), (), (0,), (1025,)]
    averages, tensors = ([randn(shape, dtype, target.device) for shape in shapes] for dtype in dtypes)
    check_update(target, averages, tensors, decay)


def test_matches_exact_for_several_dtypes_at_once(target):
    averages, tensors = ([randn((127,), dtype, target.device) for dtype in 2 * DTYPES] for _ in range(2))
    check_update(target, averages, tensors[::-1], 0.9)


@over_layouts
def test_matches_exact_for_all_layouts(target, dtype, layout):
    whole, tensor = (randn((6, 7, 8, 9), dtype, target.device) for _ in range(2))
    outside = whole.clone()
    layout(outside).zero_()
    check_update(target, [layout(whole)], [layout(tensor)], 0.9)
    check_update(target, [layout(whole)], [layout(tensor).contiguous()], 0.9)
    check_update(target, [layout(whole).contiguous()], [layout(tensor)], 0.9)
    layout(whole).zero_()
    assert same_bits(whole, outside), "elements outside the view were written"


@pytest.mark.parametrize("decay", [0.9, 0.9999])
@over_averages
def test_matches_exact_after_many_steps(target, dtype, shadow, decay):
    ours = randn((33, 31), shadow or dtype, target.device)
    torchs, steps = ours.clone(), [randn((33, 31), dtype, target.device) for _ in range(100)]
    true = exact_ema(ours, steps, decay)
    for x in steps:
        trainops.ema_update_([ours], [x], decay, backend=target.backend)
        torchs.lerp_(x.to(ours.dtype), 1 - decay)
    assert_contract(ours, true, torchs)


def every_pair(dtype, device):
    """Each value with each: two tensors."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 3e4, -3e4, 1e-40, INF, -INF, NAN], device=device).to(dtype)
    extremes = torch.finfo(dtype).max * torch.tensor([1.0, -1.0], dtype=torch.float64, device=device)
    values = torch.cat([values, extremes.to(dtype)])
    return values.repeat_interleave(len(values)), values.repeat(len(values))


def same_values(a, b):
    """Same bits, but for what a NaN carries."""
    return same_bits(*(torch.where(x.isnan(), NAN, x) for x in (a, b)))


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_both_ends_are_exact(target, dtype, decay):
    average, x = every_pair(dtype, target.device)
    expected = [x, average.clone()][int(decay)]
    trainops.ema_update_([average], [x], decay, backend=target.backend)
    assert same_values(average, expected)


@over_decays
def test_equal_values_stay(target, dtype, decay):
    average = every_pair(dtype, target.device)[0]
    x = average.clone()
    trainops.ema_update_([average], [x], decay, backend=target.backend)
    assert same_values(average, x)


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_non_finite_is_torchs(target, dtype, decay):
    average, x = every_pair(dtype, target.device)
    unequal = average != x  # equal infinities are NaN in PyTorch
    average, x = average[unequal], x[unequal]
    torchs = average.clone()
    trainops.ema_update_([average], [x], decay, backend=target.backend)
    torch._foreach_lerp_([torchs], [x], 1 - decay)
    torch.testing.assert_close(average, torchs, equal_nan=True)


@pytest.mark.parametrize("conjugated", [*itertools.product([False, True], repeat=2)], ids=str)
def test_complex(target, conjugated):
    pair = torch.randn(2, 127, dtype=torch.complex64, device=target.device)
    average, x = (z.conj() if lazily else z for z, lazily in zip(pair, conjugated, strict=True))
    expected = average.resolve_conj().clone().lerp_(x, 0.1)
    trainops.ema_update_([average], [x], 0.9, backend=target.backend)
    torch.testing.assert_close(average.resolve_conj(), expected)


@pytest.mark.parametrize("size", [1, 127])
def test_lazily_negated(target, size):
    average, x = torch.randn(2, size, dtype=torch.complex64, device=target.device).conj().imag
    assert average.is_neg()
    check_update(target, [average], [x], 0.9)


def test_takes_iterables_and_nothing(target):
    average = torch.zeros(3, device=target.device)
    trainops.ema_update_(iter([average]), (torch.ones_like(x) for x in [average]), 0.75, backend=target.backend)
    assert average.tolist() == [0.25] * 3
    assert trainops.ema_update_([], [], 0.5, backend=target.backend) is None


F, N = torch.ones(3), torch.ones(3, dtype=torch.int64)
BAD_UPDATES = {
    "decay_below": ([F], -0.1, r"decay must be in \[0, 1\], got -0.1"),
    "decay_above": ([F], 1.1, r"decay must be in \[0, 1\], got 1.1"),
    "decay_nan": ([F], NAN, r"decay must be in \[0, 1\], got nan"),
    "decay_inf": ([F], INF, r"decay must be in \[0, 1\], got inf"),
    "shorter": ([], 0.5, "2 averages for 0 tensors"),
    "longer": ([F, F, F], 0.5, "2 averages for 3 tensors"),
    "shape": ([F, torch.ones(4)], 0.5, r"tensor 1 has shape \(4,\), but its average has shape \(3,\)"),
    "broadcastable": ([F, torch.ones(1, 3)], 0.5, r"tensor 1 has shape \(1, 3\)"),
    "two_shapes": ([torch.ones(()), torch.ones(4)], 0.5, r"tensor 0 has shape \(\)"),
    "integers": ([F, N], 0.5, "tensor 1 is torch.int64, but its average is torch.float32"),
    "booleans": ([F, N.bool()], 0.5, "tensor 1 is torch.bool"),
    "complex": ([F, F.to(torch.complex64)], 0.5, "tensor 1 is torch.complex64, but its average is torch.float32"),
    "device": ([F, F.to("meta")], 0.5, "tensor 1 is on meta, but its average on"),
}


@over(("tensors", "decay", "message"), BAD_UPDATES)
def test_bad_update_changes_nothing(target, tensors, decay, message):
    averages = [torch.zeros(3, device=target.device) for _ in range(2)]
    tensors = [x if x.is_meta else x.to(target.device) for x in tensors]
    with pytest.raises(ValueError, match=message):
        trainops.ema_update_(averages, tensors, decay, backend=target.backend)
    assert all(same_bits(x, torch.zeros(3)) for x in averages)


def test_averages_of_integers_are_refused(target):
    with pytest.raises(ValueError, match=r"tensor 0 is torch\.int64; averages are of floating-point numbers"):
        trainops.ema_update_([N.clone()], [N], 0.5, backend=target.backend)


@pytest.mark.parametrize("averages", [[], [F]], ids=["empty", "one"])
def test_unknown_backend_changes_nothing(monkeypatch, averages):
    averages = [x.clone() for x in averages]
    with pytest.raises(ValueError, match=f"nonsense.*{'.*'.join(trainops.backends())}"):
        trainops.ema_update_(averages, [2 * x for x in averages], 0.5, backend="nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        trainops.EMA(nn.Linear(2, 2), backend="nonsense")
    monkeypatch.setenv("TRAINOPS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        trainops.ema_update_([F.clone()], [2 * F], 0.5)
    assert all(same_bits(x, F) for x in averages)


# Models, and what training does to them.


class Net(nn.Module):
    """Of everything that a model may hold, something."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(33, 31)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.ones(0, 3))
        self.frozen = nn.Parameter(torch.randn(127), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(5))  # never has a gradient
        self.elsewhere = nn.Parameter(torch.randn(4, 3))  # is not given to the optimizer
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("bias_table", torch.tensor([0.0, -INF]))
        self.register_buffer("nothing", None)


class Tied(nn.Module):
    """Two names for one parameter, and for one buffer."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(7, 7), nn.Linear(7, 7, bias=False)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("table", torch.randn(5))
        self.decoder.register_buffer("table", self.table)


class Single(nn.Module):
    """One parameter, and a buffer of its dtype."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("last", torch.zeros((), dtype=weight.dtype, device=weight.device))


FLOAT_BUFFERS = {"norm.running_mean", "norm.running_var", "bias_table"}
OTHER_BUFFERS = {"norm.num_batches_tracked", "mask"}


def make_net(dtype=torch.float32, device="cpu"):
    return Net().to(device=device, dtype=dtype)


def tensors_of(module):
    return dict(module.named_parameters()) | dict(module.named_buffers())


def snapshot(module):
    return {name: x.detach().clone() for name, x in tensors_of(module).items()}


def same_tensors(module, expected):
    """Whether a module holds, bit for bit, what ``expected`` (a module or a snapshot) does."""
    ours, others = (x if isinstance(x, dict) else tensors_of(x) for x in (module, expected))
    return ours.keys() == others.keys() and all(same_bits(ours[name], others[name]) for name in others)


@torch.no_grad()
def wander(tensors):
    """Change every tensor a little, as training would."""
    for x in tensors:
        if x.dtype == torch.bool:
            x.logical_not_()
        else:
            x.add_(0.1 * torch.randn_like(x) if x.is_floating_point() or x.is_complex() else 1)


def moved(model, target, shadow=None):
    """The average of a model after three updates."""
    ema = trainops.EMA(model, 0.9, dtype=shadow, backend=target.backend)
    for _ in range(3):
        wander(tensors_of(model).values())
        ema.update()
    return ema


def check_updates(target, ema, updates, every=1):
    """Hold every update to be ``ema_update_`` with the decay of its step, and a copy of what is no float."""
    for _ in range(updates):
        wander(tensors_of(ema.model).values())
        expected, step = snapshot(ema.module), ema.step + 1
        for name, x in tensors_of(ema.model).items() if step % every == 0 else ():
            if x.is_floating_point() or x.is_complex():
                trainops.ema_update_([expected[name]], [x], ema.decay_at(step), backend=target.backend)
            else:
                expected[name].copy_(x)
        ema.update()
        assert ema.step == step
        assert same_tensors(ema.module, expected)


# The EMA of a model.


def check_followed(ours, torchs, history, copied):
    """Hold averages to the contract; ``history`` are snapshots of the model, the first of which is copied."""
    for name, average in tensors_of(ours).items():
        values = [tensors[name] for tensors in history]
        if name in copied:
            assert same_bits(average, values[-1]), name
        elif average.is_floating_point():
            finite = average.isfinite()
            assert torch.equal(average[~finite], values[-1][~finite]), name
            true = exact_ema(values[0][finite], [x[finite] for x in values[1:]], 0.9)
            assert_contract(average[finite], true, tensors_of(torchs)[name][finite], name)
        else:
            assert same_bits(average, tensors_of(torchs)[name]), name


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "buffers"])
@pytest.mark.parametrize("in_averaged_model", [False, True], ids=["EMA", "multi_avg_fn"])
def test_follows_as_averaged_model_does(target, dtype, monkeypatch, buffers, in_averaged_model):
    monkeypatch.setenv("TRAINOPS_BACKEND", target.backend)
    model, history = make_net(dtype, target.device), []
    ours, torchs = (
        swa_utils.AveragedModel(model, multi_avg_fn=module.get_ema_multi_avg_fn(0.9), use_buffers=buffers)
        for module in (trainops, swa_utils)
    )
    ema = trainops.EMA(model, 0.9, average_buffers=buffers)
    for _ in range(20):
        wander(tensors_of(model).values())
        ours.update_parameters(model) if in_averaged_model else ema.update()
        torchs.update_parameters(model)
        history.append(snapshot(model))
    assert (ours.n_averaged if in_averaged_model else ema.step) == torchs.n_averaged
    copied = (set() if buffers else FLOAT_BUFFERS) | (set() if in_averaged_model and buffers else OTHER_BUFFERS)
    check_followed((ours if in_averaged_model else ema).module, torchs.module, history, copied)


@pytest.mark.parametrize("decay", [-0.1, 1.1, NAN])
def test_multi_avg_fn_refuses_a_bad_decay(decay):
    with pytest.raises(ValueError, match=rf"decay must be in \[0, 1\], got {decay}"):
        trainops.get_ema_multi_avg_fn(decay)


def test_begins_as_a_frozen_copy_in_eval_mode(dtype):
    model = make_net(dtype)
    ema = trainops.EMA(model)
    assert same_tensors(ema.module, model)
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert not any(module.training for module in ema.module.modules())
    assert model.training
    assert model.linear.weight.requires_grad
    addresses = [{x.data_ptr() for x in tensors_of(module).values() if x.numel()} for module in (ema.module, model)]
    assert not set.intersection(*addresses)


BAD_ARGUMENTS = {
    "decay_below": ({"decay": -0.1}, r"decay must be in \[0, 1\], got -0.1"),
    "decay_above": ({"decay": 1.1}, r"decay must be in \[0, 1\], got 1.1"),
    "decay_nan": ({"decay": NAN}, r"decay must be in \[0, 1\], got nan"),
    "min_decay": ({"min_decay": 2.0}, r"min_decay must be in \[0, 1\], got 2.0"),
    "warmup_gamma": ({"warmup_gamma": 0.0}, "warmup_gamma must be positive, got 0.0"),
    "warmup_gamma_nan": ({"warmup_gamma": NAN}, "warmup_gamma must be positive, got nan"),
    "update_every": ({"update_every": 0}, "update_every must be at least 1, got 0"),
    "dtype": ({"dtype": torch.int64}, "dtype must be a floating-point type, got torch.int64"),
}


@over(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        trainops.EMA(nn.Linear(2, 2), **arguments)


@pytest.mark.parametrize("model", ["0.9", nn.Linear(2, 2).state_dict(), nn.Linear(2, 2).parameters()])
def test_the_model_is_a_module(model):
    with pytest.raises(TypeError, match=rf"^model must be a torch\.nn\.Module, got {type(model).__name__}$"):
        trainops.EMA(model)


ILL_TYPED = {
    "decay": ("0.9", "decay must be a number, got '0.9'"),
    "min_decay": (None, "min_decay must be a number, got None"),
    "warmup": (100, "warmup must be True or False, got 100"),
    "warmup_gamma": ("1", "warmup_gamma must be a number, got '1'"),
    "warmup_power": (True, "warmup_power must be a number, got True"),
    "update_after_step": (1.5, "update_after_step must be an integer, got 1.5"),
    "update_every": ("10", "update_every must be an integer, got '10'"),
    "dtype": ("bfloat16", "dtype must be a torch.dtype, got 'bfloat16'"),
}


@over("name", {name: name for name in ILL_TYPED})
def test_arguments_of_another_type(name):
    value, message = ILL_TYPED[name]
    with pytest.raises(TypeError, match=message):
        trainops.EMA(nn.Linear(2, 2), **{name: value})


def test_an_error_shows_the_beginning_of_a_value():
    with pytest.raises(TypeError, match=r"^decay must be a number, got tensor") as caught:
        trainops.ema_update_([], [], torch.arange(1000.0))
    assert len(str(caught.value)) < 100


@over("arguments", {"model": ((nn.Linear(2, 2),), {}), "step": ((), {"step": 3})})
def test_update_takes_no_model(arguments):
    ema = trainops.EMA(nn.Linear(2, 2))
    args, kwargs = arguments
    with pytest.raises(TypeError, match=r"takes no arguments: the model was given to EMA\(model\)"):
        ema.update(*args, **kwargs)
    assert ema.step == 0


SCHEDULES = {
    "constant": {},
    "low": {"decay": 0.3},
    "warmup": {"warmup": True},
    "slow_warmup": {"warmup": True, "warmup_gamma": 25.0, "warmup_power": 0.75},
    "low_warmup": {"warmup": True, "decay": 0.5},
    "min_decay": {"warmup": True, "min_decay": 0.6},
    "min_above_max": {"warmup": True, "decay": 0.5, "min_decay": 0.6},
    "min_without_warmup": {"decay": 0.5, "min_decay": 0.6},
    "after": {"update_after_step": 4},
    "warmup_after": {"warmup": True, "update_after_step": 4, "decay": 0.7},
    "every": {"update_every": 3},
    "everything": {"warmup": True, "update_after_step": 2, "update_every": 3, "min_decay": 0.1},
}


def timm_decay(
    step, decay=0.9999, warmup=False, warmup_gamma=1.0, warmup_power=2 / 3, min_decay=0.0, update_after_step=0, **_
):
    """What ``timm.utils.ModelEmaV3.get_decay`` returns."""
    updates = max(0, step - update_after_step - 1)
    if updates == 0:
        return 0.0
    return max(min(1 - (1 + updates / warmup_gamma) ** -warmup_power, decay), min_decay) if warmup else decay


@over("schedule", SCHEDULES)
def test_decay_is_timms(schedule):
    ema = trainops.EMA(nn.Linear(2, 2), **schedule)
    for step in [*range(12), 1000, 10**6, 10**12]:
        assert ema.decay_at(step) == timm_decay(step, **schedule)


@over("schedule", SCHEDULES)
def test_updates_follow_the_schedule(target, schedule):
    ema = trainops.EMA(make_net(device=target.device), backend=target.backend, **schedule)
    check_updates(target, ema, 10, schedule.get("update_every", 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_average_moves_where_a_16_bit_one_stalls(target, dtype):
    before, after = 1.0, 1.0 + 4 * torch.finfo(dtype).eps
    model = Single(torch.full((127,), before, dtype=dtype, device=target.device))
    wide, narrow = (trainops.EMA(model, 0.99, dtype=x, backend=target.backend) for x in (torch.float32, None))
    for _ in range(51):
        wide.update()
        narrow.update()
        model.weight.detach().fill_(after)
    assert narrow.module.weight.dtype == dtype
    assert (narrow.module.weight == before).all()
    true = after + (before - after) * 0.99**50
    torch.testing.assert_close(
        wide.module.weight.detach(), torch.full((127,), true).to(target.device), rtol=1e-6, atol=0
    )


@over_averages
def test_dtype_is_of_floating_point_tensors(target, dtype, shadow):
    ema = moved(make_net(dtype, target.device), target, shadow)
    for name, average in tensors_of(ema.module).items():
        own = tensors_of(ema.model)[name].dtype
        assert average.dtype == (shadow if shadow and own.is_floating_point else own), name


@pytest.mark.parametrize("shadow", [None, torch.float32], ids=str)
def test_complex_parameters(target, shadow):
    model = Single(torch.randn(33, 31, dtype=torch.complex64, device=target.device))
    check_updates(target, trainops.EMA(model, 0.9, dtype=shadow, backend=target.backend), 3)


@pytest.mark.parametrize("shadow", [None, torch.float32, torch.float64], ids=str)
def test_tied_tensors_stay_tied_and_are_averaged_once(target, shadow):
    ema = trainops.EMA(Tied().to(target.device), 0.75, dtype=shadow, backend=target.backend)
    check_updates(target, ema, 3)
    assert ema.module.encoder.weight is ema.module.decoder.weight
    assert ema.module.table is ema.module.decoder.table


@over_layouts
@over_two_averages
def test_weights_of_any_layout(target, dtype, shadow, layout):
    model = Single(layout(randn((6, 7, 8, 9), dtype, target.device)))
    check_updates(target, trainops.EMA(model, 0.9, dtype=shadow, backend=target.backend), 3)


# Models that change under the average.


def replace(model, name, make):
    module, _, key = name.rpartition(".")
    x = make(model.get_parameter(name).detach())
    setattr(model.get_submodule(module), key, nn.Parameter(x, requires_grad=x.is_floating_point()))


def replace_data(model, make):
    model.linear.weight.data = make(model.linear.weight.data)


def shard(x):
    """A view into flat memory, unaligned, as sharding frameworks give to parameters."""
    return x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)


CHANGES = {
    "replaced": lambda model: replace(model, "linear.weight", torch.randn_like),
    "data": lambda model: replace_data(model, torch.randn_like),
    "data_transposed": lambda model: replace_data(model, lambda x: x.t().contiguous().t()),
    "data_shard": lambda model: replace_data(model, shard),
    "data_double": lambda model: replace_data(model, torch.Tensor.double),
    "data_half": lambda model: replace_data(model, torch.Tensor.half),
    "buffer": lambda model: setattr(model.norm, "running_mean", torch.randn_like(model.norm.running_mean)),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "assigned": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "frozen": lambda model: model.requires_grad_(False),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
}


@over("change", CHANGES)
def test_changes_are_followed(target, change):
    ema = moved(make_net(device=target.device), target)
    change(ema.model)
    check_updates(target, ema, 2)


BAD_CHANGES = {
    "shape": (lambda model: replace(model, "linear.weight", lambda x: x[:2]), r"linear.weight has shape \(2, 33\)"),
    "data_shape": (lambda model: replace_data(model, lambda x: x[:2]), r"linear.weight has shape \(2, 33\)"),
    "buffer": (lambda model: setattr(model.norm, "running_var", torch.ones(2)), r"norm.running_var has shape \(2,\)"),
    "complex": (
        lambda model: replace(model, "linear.weight", lambda x: x.to(torch.complex64)),
        "linear.weight is torch.complex64, but its average is torch.float32",
    ),
    "integer": (
        lambda model: replace(model, "frozen", torch.Tensor.long),
        "frozen is torch.int64, but its average is",
    ),
    "added": (lambda model: setattr(model, "more", nn.Parameter(torch.ones(2))), "more is in the model alone"),
    "removed": (lambda model: delattr(model.linear, "bias"), "linear.bias is in the average alone"),
    "tied": (lambda model: setattr(model.conv, "bias", model.norm.bias), "bias is in the average alone"),
}
USES = {
    "update": lambda ema: ema.update(),
    "step": lambda ema: trainops.AdamW(ema.model.parameters(), ema=ema).step(),
    "swap": lambda ema: ema.swap().__enter__(),
    "copy_to": lambda ema: ema.copy_to(ema.model),
}


@over(("change", "message"), BAD_CHANGES)
@over("use", USES)
def test_mismatch_changes_nothing(change, message, use):
    ema = moved(make_net(), Target("reference", "cpu"))
    change(ema.model)
    for p in ema.model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before, average_before = snapshot(ema.model), snapshot(ema.module)
    with pytest.raises(ValueError, match=message):
        use(ema)
    assert ema.step == 3
    assert same_tensors(ema.model, before)
    assert same_tensors(ema.module, average_before)


# swap() and copy_to().


def in_dtypes_of(model, tensors):
    return {name: tensors[name].to(x.dtype) for name, x in tensors_of(model).items()}


@over_averages
def test_swap_restores_every_bit(target, dtype, shadow):
    model = make_net(dtype, target.device)
    ema = moved(model, target, shadow)
    model.frozen[:4] = torch.tensor([NAN, -0.0, INF, -INF])
    before, average_before = snapshot(model), snapshot(ema.module)
    places = [(id(x), x.data_ptr()) for x in tensors_of(model).values()]
    with ema.swap():
        assert same_tensors(model, in_dtypes_of(model, average_before))
        assert places == [(id(x), x.data_ptr()) for x in tensors_of(model).values()]
    assert same_tensors(model, before)
    with pytest.raises(KeyError), ema.swap():
        raise KeyError(wander(model.parameters()))
    assert same_tensors(model, before)
    assert same_tensors(ema.module, average_before)
    check_updates(target, ema, 1)


@pytest.mark.parametrize("use", [USES["update"], USES["step"], USES["swap"]], ids=["update", "step", "swap"])
def test_swapped_weights_are_not_averaged(target, use):
    ema = moved(make_net(device=target.device), target)
    for p in ema.model.parameters():
        p.grad = torch.ones_like(p)
    before, average_before = snapshot(ema.model), snapshot(ema.module)
    with ema.swap():
        with pytest.raises(RuntimeError, match=r"inside `with ema\.swap"):
            use(ema)
        assert same_tensors(ema.model, average_before)
    assert same_tensors(ema.model, before)
    assert same_tensors(ema.module, average_before)
    assert ema.step == 3
    use(ema)


def test_autograd_notices_a_swap(target):
    ema = moved(make_net(device=target.device), target)
    loss = ema.model.linear.weight.square().sum()
    with ema.swap(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@over_averages
def test_copy_to(target, dtype, shadow):
    ema = moved(make_net(dtype, target.device), target, shadow)
    other, before, average = make_net(dtype, target.device), snapshot(ema.model), snapshot(ema.module)
    ema.copy_to(other)
    assert same_tensors(other, in_dtypes_of(other, average))
    assert same_tensors(ema.model, before)
    ema.copy_to(ema.model)
    assert same_tensors(ema.model, other)
    assert same_tensors(ema.module, average)


# Saving, loading and copying.


@over_averages
def test_continues_identically_from_a_checkpoint(target, dtype, shadow):
    ema, file = moved(make_net(dtype, target.device), target, shadow), io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    other = trainops.EMA(make_net(dtype, target.device), 0.9, dtype=shadow, backend=target.backend)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.step == 3
    for _ in range(3):
        assert same_tensors(other.module, ema.module)
        wander(tensors_of(ema.model).values())
        other.model.load_state_dict(ema.model.state_dict())
        ema.update()
        other.update()


BAD_STATES = {
    "no_step": (lambda state: state.pop("step"), r"has no \['step'\]"),
    "no_module": (lambda state: state.pop("module"), r"has no \['module'\]"),
    "empty": (lambda state: state.clear(), r"has no \['module', 'step'\]"),
    "missing": (lambda state: state["module"].pop("linear.weight"), r"missing \['linear.weight'\]"),
    "missing_buffer": (lambda state: state["module"].pop("mask"), r"missing \['mask'\]"),
    "unexpected": (lambda state: state["module"].update(more=torch.ones(2)), r"unexpected \['more'\]"),
    "shape": (
        lambda state: state["module"].update(frozen=torch.ones(2)),
        r"frozen has shape \(2,\), expected \(127,\)",
    ),
    "no_tensor": (lambda state: state["module"].update(frozen=None), "frozen"),
    "no_number": (lambda state: state.update(step=None), "step"),
}


@over(("spoil", "message"), BAD_STATES)
def test_bad_state_changes_nothing(spoil, message):
    ema, other = (trainops.EMA(make_net()) for _ in range(2))
    other.update()
    state = copy.deepcopy(other.state_dict())
    spoil(state)
    before = snapshot(ema.module)
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict(state)
    assert same_tensors(ema.module, before)
    assert ema.step == 0


over_copies = over("copied", {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))})


@over_copies
def test_a_copy_follows_its_own_model(target, copied):
    ema = moved(make_net(device=target.device), target)
    before, twin = snapshot(ema.module), copied(ema)
    assert same_tensors(twin.module, ema.module)
    check_updates(target, twin, 2)
    assert (twin.step, ema.step) == (5, 3)
    assert same_tensors(ema.module, before)


@over_copies
def test_a_copy_of_a_fused_training_continues_identically(target, copied):
    ema = moved(make_net(device=target.device), target)
    optimizer = trainops.AdamW(ema.model.parameters(), ema=ema, backend=target.backend)
    optimizer.step()
    twin, twin_optimizer = copied((ema, optimizer))
    assert twin_optimizer.ema is twin
    for _ in range(3):
        for p, q in zip(ema.model.parameters(), twin.model.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        twin_optimizer.step()
    assert same_tensors(twin.model, ema.model)
    assert same_tensors(twin.module, ema.module)


@over_copies
def test_a_copy_fuses_its_own_parameters(copied):
    twin = copied(moved(make_net(), Target("reference", "cpu")))
    averages = dict(zip(map(id, twin.model.parameters()), twin.module.parameters(), strict=True))
    fusable = twin.plan_update().fusable
    assert fusable.keys() == averages.keys()
    assert all(fusable[key] is average for key, average in averages.items())


# The average in the optimizer's step.


def train(target, make, steps, *, fused, change=None, shadow=None, gradless=(), options=None, **schedule):
    """Train with the average in the optimizer's step, or after it."""
    torch.manual_seed(1)
    model = make()
    ema = trainops.EMA(model, 0.9, dtype=shadow, backend=target.backend, **schedule)
    if change is not None:
        ema.update()
        change(model)
    named = dict(model.named_parameters()) | {"stranger": nn.Parameter(torch.randn(9, device=target.device))}
    inside = [p for name, p in named.items() if name != "elsewhere"]
    groups = [{"params": inside[::2]}, {"params": inside[1::2], "lr": 0.02, "weight_decay": 0.0}]
    optimizer = trainops.AdamW(groups, 0.01, ema=ema if fused else None, backend=target.backend, **options or {})
    for step in range(steps):
        wander([*model.buffers(), *(p for name, p in named.items() if name == "elsewhere")])
        for i, (name, p) in enumerate(named.items()):
            has_grad = p.requires_grad and name != "unused" and (step, i) not in gradless
            p.grad = torch.randn_like(p) if has_grad else None
        optimizer.step()
        if not fused:
            ema.update()
    return ema


def check_fused(target, make, steps=3, **arguments):
    ema, fused = (train(target, make, steps, fused=fused, **arguments) for fused in (False, True))
    assert same_tensors(fused.model, ema.model)
    assert same_tensors(fused.module, ema.module)
    assert fused.step == ema.step


STEPS = {
    "plain": {},
    "clipped": {"options": {"max_grad_norm": 0.5}},
    "skipping": {"options": {"max_grad_norm": 0.5, "skip_nonfinite": True}},
    "amsgrad": {"options": {"amsgrad": True, "maximize": True}},
    "warmup": {"warmup": True, "update_after_step": 1},
    "every_second": {"update_every": 2, "average_buffers": False},
    "missing_gradients": {"gradless": [(0, 0), (0, 5), (1, 1), *((2, i) for i in range(20)), (3, 6)]},
}


def test_one_update_a_step(target):
    ema = moved(make_net(device=target.device), target)
    params = list(ema.model.parameters())
    optimizer = trainops.AdamW(params[::2], ema=ema, backend=target.backend)
    ema.update()
    optimizer.step()
    before = snapshot(ema.module)
    with pytest.raises(RuntimeError, match=r"leave out ema\.update"):
        ema.update()
    assert same_tensors(ema.module, before)
    second = trainops.AdamW(params[1::2], ema=ema, backend=target.backend)
    second.step()  # in place of the first, for all one knows
    before = snapshot(ema.module)
    with pytest.raises(RuntimeError, match="another optimizer updates this average in turn"):
        optimizer.step()
    assert same_tensors(ema.module, before)
    assert ema.step == 6
    second.ema = None
    optimizer.step()
    optimizer.ema = None
    ema.update()
    assert ema.step == 8


@over_copies
def test_a_copy_made_within_swap_is_not_swapped(copied):
    ema = moved(make_net(), Target("reference", "cpu"))
    with ema.swap():
        twin = copied(ema)
    twin.update()
    with twin.swap():
        pass


def test_optimizers_may_follow_each_other():
    ema = moved(make_net(), Target("reference", "cpu"))
    first, second = (trainops.AdamW(ema.model.parameters(), ema=ema) for _ in range(2))
    for optimizer in (first, first, second, second, first):
        optimizer.step()


def test_a_step_that_raises_takes_nothing_over():
    ema = moved(make_net(), Target("reference", "cpu"))
    params = list(ema.model.parameters())
    first, second = (trainops.AdamW(params, ema=ema) for _ in range(2))
    first.step()
    params[0].grad = torch.ones_like(params[0]).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        second.step()
    params[0].grad = None
    first.step()
    assert ema.step == 5


def test_an_optimizer_that_is_gone_holds_nothing():
    ema = moved(make_net(), Target("reference", "cpu"))
    optimizer = trainops.AdamW(ema.model.parameters(), ema=ema)
    optimizer.step()
    optimizer.itself = optimizer  # kept alive by nothing else
    del optimizer
    ema.update()


@over_copies
def test_a_copy_is_held_by_its_own_optimizer(copied):
    ema = moved(make_net(), Target("reference", "cpu"))
    optimizer = trainops.AdamW(ema.model.parameters(), ema=ema)
    optimizer.step()
    copied(ema).update()
    twin, twin_optimizer = copied((ema, optimizer))
    twin_optimizer.step()
    with pytest.raises(RuntimeError, match=r"leave out ema\.update"):
        twin.update()


@over("arguments", STEPS)
@over_averages
def test_fused_is_step_then_update(target, dtype, shadow, arguments):
    check_fused(target, lambda: make_net(dtype, target.device), 4, shadow=shadow, **arguments)


@over("change", CHANGES)
def test_fused_follows_changes(target, change):
    check_fused(target, lambda: make_net(device=target.device), change=change)


@over_layouts
@over_two_averages
def test_fused_takes_any_layout(target, dtype, shadow, layout):
    check_fused(target, lambda: Single(layout(randn((6, 7, 8, 9), dtype, target.device))), shadow=shadow)


def test_fused_takes_tied_and_complex(target):
    check_fused(target, lambda: Tied().to(target.device))
    check_fused(target, lambda: Single(torch.randn(33, 31, dtype=torch.complex64, device=target.device)))


SKIPS = {
    "nan": ({"skip_nonfinite": True}, NAN, None),
    "inf": ({"skip_nonfinite": True, "max_grad_norm": 0.5}, INF, None),
    "found_inf": ({}, 1.0, 1.0),  # as a GradScaler tells
}


@over(("options", "value", "found_inf"), SKIPS)
@over_averages
def test_a_skipped_step_is_silent(target, dtype, shadow, options, value, found_inf):
    model = make_net(dtype, target.device)
    ema = moved(model, target, shadow)
    inside = [p for p in model.parameters() if p is not model.elsewhere]
    optimizer = trainops.AdamW(inside, ema=ema, backend=target.backend, **options)
    for skipped in (False, True, False):
        wander([*model.buffers(), model.elsewhere])
        for p in inside:
            p.grad = torch.randn_like(p) if p.requires_grad else None
        if skipped:
            model.scale.grad.fill_(value)
        if found_inf is not None:
            optimizer.grad_scale = torch.ones((), device=target.device)
            optimizer.found_inf = torch.full((), found_inf if skipped else 0.0, device=target.device)
        before, average_before = snapshot(model), snapshot(ema.module)
        optimizer.step()
        assert same_tensors(model, before) == skipped
        assert same_tensors(ema.module, average_before) == skipped
    assert optimizer.skipped_steps == 1
    assert ema.step == 6


@pytest.mark.parametrize("fused", [False, True], ids=["update", "step"])
@over_averages
def test_autograd_notices_a_moved_average(target, dtype, shadow, fused):
    model = make_net(dtype, target.device)
    ema = moved(model, target, shadow)
    optimizer = trainops.AdamW(model.parameters(), ema=ema if fused else None, backend=target.backend)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        weight = ema.module.linear.weight
        output = (weight * torch.randn_like(weight, requires_grad=True)).sum()
        optimizer.step() if fused else ema.update()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()


def test_subclasses_do_their_own_arithmetic():
    calls = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    average = torch.zeros(3).as_subclass(Logged)
    trainops.ema_update_([average], [torch.ones(3)], 0.5)
    assert "lerp" in calls
    assert average.tolist() == [0.5] * 3
