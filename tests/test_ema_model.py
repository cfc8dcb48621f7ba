"""The EMA of a model: its schedule, models that change under it, swap(), copies and checkpoints."""

import copy
import io

import pytest
import torch
from contract import assert_contract, same_bits
from controls import CONTROLS, must_fail, wrong_decay
from exact import ema_of as exact_ema_of
from models import (
    CHANGES,
    FLOAT_BUFFERS,
    OTHER_BUFFERS,
    SOME_CHANGES,
    Single,
    Tied,
    check_averages,
    check_updates,
    make_net,
    moved,
    over_averages,
    over_copies,
    over_layouts,
    over_two_averages,
    replace,
    replace_data,
    same_tensors,
    snapshot,
    tensors_of,
    wander,
)
from targets import INTERPRETER, REFERENCE, interpreted, over
from torch import nn
from torch.optim import swa_utils
from training import randn

import trainops

INF, NAN = float("inf"), float("nan")


def check_followed(ours, torchs, history, copied):
    """Hold averages to the contract; ``history`` are snapshots of the model, the first of which is copied."""
    for name, average in tensors_of(ours).items():
        values = [tensors[name] for tensors in history]
        if name in copied:
            assert same_bits(average, values[-1]), name
        elif average.is_floating_point():
            finite = average.isfinite()
            assert torch.equal(average[~finite], values[-1][~finite]), name
            if average.dtype.itemsize > 2:  # each update of a 16-bit average has been checked by itself
                true = exact_ema_of(values[0][finite], [x[finite] for x in values[1:]], 0.9)
                assert_contract(average[finite], true, tensors_of(torchs)[name][finite], name)
        else:
            assert same_bits(average, tensors_of(torchs)[name]), name


def follow(target, dtype, buffers, in_averaged_model, updates=20):
    """Averages of a model that changes, beside those of torch's own function."""
    model, history = make_net(dtype, target.device), []
    ours, torchs = (
        swa_utils.AveragedModel(model, multi_avg_fn=module.get_ema_multi_avg_fn(0.9), use_buffers=buffers)
        for module in (trainops, swa_utils)
    )
    ema = trainops.EMA(model, 0.9, average_buffers=buffers)
    averaged = ours.module if in_averaged_model else ema.module
    copied = (set() if buffers else FLOAT_BUFFERS) | (set() if in_averaged_model and buffers else OTHER_BUFFERS)
    for step in range(updates):
        wander(tensors_of(model).values())
        before = snapshot(averaged)
        ours.update_parameters(model) if in_averaged_model else ema.update()
        torchs.update_parameters(model)
        history.append(snapshot(model))
        if dtype.itemsize == 2:
            check_averages(averaged, model, before, 0.9 if step > 0 else 0.0, copied)
    assert (ours.n_averaged if in_averaged_model else ema.step) == torchs.n_averaged
    check_followed(averaged, torchs.module, history, copied)


@interpreted(lambda in_averaged_model, **_: not in_averaged_model)
@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "buffers"])
@pytest.mark.parametrize("in_averaged_model", [False, True], ids=["EMA", "multi_avg_fn"])
def test_follows_as_averaged_model_does(target, dtype, monkeypatch, buffers, in_averaged_model):
    monkeypatch.setenv("TRAINOPS_BACKEND", target.backend)
    follow(target, dtype, buffers, in_averaged_model, updates=5 if target == INTERPRETER else 20)


@pytest.mark.parametrize("in_averaged_model", [False, True], ids=["EMA", "multi_avg_fn"])
@over("control", CONTROLS | {"wrong_decay": wrong_decay})
def test_following_wrongly_is_noticed(dtype, monkeypatch, in_averaged_model, control):
    monkeypatch.setenv("TRAINOPS_BACKEND", "reference")
    must_fail(control, follow, REFERENCE, dtype, True, in_averaged_model)


@pytest.mark.parametrize("decay", [-0.1, 1.1, NAN])
def test_multi_avg_fn_refuses_a_bad_decay(decay):
    with pytest.raises(ValueError, match=rf"decay must be in \[0, 1\], got {decay}"):
        trainops.get_ema_multi_avg_fn(decay)


def test_begins_as_a_frozen_copy_in_eval_mode(dtype):
    model = make_net(dtype)
    ema = trainops.EMA(model, 0.9)
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
    "dtype": ({"dtype": torch.int64}, "dtype must be a floating-point type of 16 bits or more, got torch.int64"),
}


@over(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        trainops.EMA(nn.Linear(2, 2), **arguments)


@pytest.mark.parametrize("model", ["0.9", nn.Linear(2, 2).state_dict(), 3, torch.ones(2), [0.9]])
def test_the_model_is_a_module_or_parameters(model):
    message = rf"^model must be a torch\.nn\.Module or an iterable of parameters, got {type(model).__name__}$"
    with pytest.raises(TypeError, match=message):
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
    """What ``timm.utils.ModelEmaV3.get_decay`` returns, which has no ``update_every``."""
    updates = max(0, step - update_after_step - 1)
    if updates == 0:
        return 0.0
    return max(min(1 - (1 + updates / warmup_gamma) ** -warmup_power, decay), min_decay) if warmup else decay


@over("schedule", SCHEDULES)
def test_decay_is_timms(schedule):
    ema = trainops.EMA(nn.Linear(2, 2), **schedule)
    every = schedule.get("update_every", 1)
    moves = [step for step in range(1, 30) if step % every == 0 and step > schedule.get("update_after_step", 0)]
    for step in [*range(12), 1000, 10**6, 10**12]:
        first = every > 1 and step <= moves[0]  # the first update that moves the average copies, as the first of all
        assert ema.decay_at(step) == (0.0 if first else timm_decay(step, **schedule))


@interpreted(lambda schedule: schedule in (SCHEDULES["low"], SCHEDULES["everything"]))
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


@interpreted(lambda dtype, **_: dtype == torch.float32)
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


@interpreted(lambda shadow, **_: shadow is None)
@over_layouts
@over_two_averages
def test_weights_of_any_layout(target, dtype, shadow, layout):
    model = Single(layout(randn((6, 7, 8, 9), dtype, target.device)))
    check_updates(target, trainops.EMA(model, 0.9, dtype=shadow, backend=target.backend), 3)


# Models that change under the average.


@interpreted(lambda change: change in SOME_CHANGES)
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
    ema = moved(make_net(), REFERENCE)
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


@interpreted(lambda dtype, **_: dtype == torch.float32)
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


@interpreted(lambda dtype, **_: dtype == torch.float32)
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


@interpreted(lambda dtype, **_: dtype == torch.float32)
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


def test_loading_writes_into_the_tensors_that_are_there():
    """Also where they are tied: whoever holds them has the loaded weights."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    ema, other = trainops.EMA(model, 0.9), trainops.EMA(model, 0.9)
    with torch.no_grad():
        for p in other.module.parameters():
            p.add_(1)
    before = [*ema.module.parameters(), *ema.module.buffers()]
    ema.load_state_dict(other.state_dict())
    after = [*ema.module.parameters(), *ema.module.buffers()]
    assert len(after) == 3
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert ema.module[1].weight is ema.module[0].weight
    assert all(map(torch.equal, after, other.module.parameters()))


BAD_STATES = {
    "no_step": (
        lambda state: state.pop("step"),
        r"not a state_dict of trainops.EMA: key 'step' is missing$",
    ),
    "no_module": (lambda state: state.pop("module"), r"EMA: key 'module' is missing$"),
    "empty": (lambda state: state.clear(), r"EMA: keys 'module' and 'step' are missing$"),
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
    twin = copied(moved(make_net(), REFERENCE))
    averages = dict(zip(map(id, twin.model.parameters()), twin.module.parameters(), strict=True))
    fusable = twin.plan_update().matched.fusable
    assert fusable.keys() == averages.keys()
    assert all(fusable[key] is average for key, average in averages.items())
