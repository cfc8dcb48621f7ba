"""EMA called as timm's, torch's and diffusers' classes are: models, steps and lists of parameters; schedules."""

import copy
import pickle

import pytest
import torch
from contract import same_bits
from models import make_net, same_tensors, snapshot, tensors_of, wander
from targets import over
from torch import nn
from torch.optim import swa_utils
from training import randn

import trainops


class Wrapper(nn.Module):
    """What DDP and others put around a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def compiled(model):
    return torch.compile(model, backend="eager")


GIVEN = {
    "nothing": lambda ema: ema.update(),
    "model": lambda ema: ema.update(ema.model),
    "step": lambda ema: ema.update(ema.model, ema.step + 1),
    "step_alone": lambda ema: ema.update(step=ema.step + 1),
    "torch": lambda ema: ema.update_parameters(ema.model),
    "wrapper": lambda ema: ema.update(Wrapper(ema.model)),
    "compiled": lambda ema: ema.update_parameters(compiled(ema.model)),
    "compiled_wrapper": lambda ema: ema.update(Wrapper(compiled(ema.model))),
    "parameters": lambda ema: ema.update(ema.model.parameters()),
}


@over("update", GIVEN)
def test_update_takes_what_is_followed(update):
    model = make_net()
    ema, twin = trainops.EMA(model, 0.9, warmup=True), trainops.EMA(model, 0.9, warmup=True)
    for _ in range(5):
        wander(tensors_of(model).values())
        update(ema)
        twin.update()
    assert same_tensors(ema.module, twin.module)
    assert ema.step == 5


def test_an_average_of_a_wrapper_follows_the_model_inside():
    model = nn.Linear(3, 2)
    for wrapper in (Wrapper(model), compiled(model)):
        ema = trainops.EMA(wrapper, 0.5)
        ema.update(model)
        assert ema.step == 1


def test_a_step_is_that_of_timm():
    """The count is the caller's: gaps and returns are taken as they come."""
    model = nn.Linear(3, 2)
    ema, expected = trainops.EMA(model, 0.9, warmup=True), model.weight.detach().clone()
    for step in (1, 2, 7, 1000, 3):
        wander(model.parameters())
        ema.update(model, step)
        expected.lerp_(model.weight.detach(), 1 - ema.decay_at(step))
        assert ema.step == step
    torch.testing.assert_close(ema.module.weight.detach(), expected)


WRONG = {
    "another": (lambda ema: ema.update(nn.Linear(3, 2)), ValueError, "this Linear is not the model that the average"),
    "average": (lambda ema: ema.update_parameters(ema.module), ValueError, "not the model that the average follows"),
    "number": (lambda ema: ema.update(7), TypeError, r"got 7: write update\(step=7\)"),
    "text": (lambda ema: ema.update("model"), TypeError, "an iterable of parameters, got str"),
    "step": (lambda ema: ema.update(ema.model, 1.5), TypeError, "step must be an integer, got 1.5"),
    "others": (lambda ema: ema.update(nn.Linear(3, 2).parameters()), ValueError, "these are not the parameters of"),
    "read_twice": (lambda ema: ema.update(iter([])), ValueError, "a generator such as .* can be read only once"),
}


@over(("call", "error", "message"), WRONG)
def test_update_refuses_what_is_not_followed(call, error, message):
    ema = trainops.EMA(nn.Linear(3, 2))
    before = snapshot(ema.module)
    wander(ema.model.parameters())
    with pytest.raises(error, match=message):
        call(ema)
    assert same_tensors(ema.module, before)
    assert ema.step == 0


def test_another_model_or_module_may_be_put_in_place():
    ema, other = trainops.EMA(nn.Linear(3, 2), 0.0), nn.Linear(3, 2)
    ema.update()
    ema.model = other
    ema.update(other)
    assert same_tensors(ema.module, other)
    ema.module, before = nn.Linear(3, 2), ema.module
    wander(other.parameters())
    ema.update()
    assert same_tensors(ema.module, other)
    assert not same_tensors(before, other)


# Lists of parameters.


def test_an_average_of_parameters_is_that_of_their_model():
    model = make_net()
    ema, twin = (trainops.EMA(x, 0.9) for x in (model.parameters(), model))
    for _ in range(4):
        wander(tensors_of(model).values())
        ema.update(list(model.parameters()))
        twin.update()
    pairs = zip(ema.shadow_params, twin.module.parameters(), strict=True)
    assert all(same_bits(x, y) for x, y in pairs)


def test_an_optimizer_moves_an_average_of_parameters():
    model = nn.Linear(3, 2)
    ema = trainops.EMA(model.parameters(), 0.9)
    optimizer = trainops.AdamW(model.parameters(), ema=ema)
    for _ in range(3):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert ema.step == 3
    assert not same_bits(ema.shadow_params[0], model.weight)
    assert same_bits(ema.shadow_params[1], model.bias)


def test_an_average_of_parameters_goes_on_with_those_that_it_is_given():
    """As diffusers' does: frameworks replace parameters."""
    ema = trainops.EMA([torch.zeros(3), nn.Parameter(torch.zeros(2))], 0.5)
    ema.update()
    others = [torch.ones(3), nn.Parameter(torch.ones(2))]
    ema.update(others)
    assert [x.tolist() for x in ema.shadow_params] == [[0.5] * 3, [0.5] * 2]
    with pytest.raises(ValueError, match=r"0 has shape \(2,\), but its average has shape \(3,\)"):
        ema.update(others[::-1])
    others[0].fill_(1.5)
    ema.update()
    assert ema.shadow_params[0].tolist() == [1.0] * 3


def test_there_are_parameters_to_average():
    parameters = nn.Linear(3, 2).parameters()
    list(parameters)
    with pytest.raises(ValueError, match=r"a generator such as model\.parameters.* can be read only once"):
        trainops.EMA(parameters)


# store(), copy_to() and restore().


def moved_average():
    ema = trainops.EMA(make_net(), 0.5)
    for _ in range(3):
        wander(tensors_of(ema.model).values())
        ema.update()
    return ema


WHAT = {
    "default": lambda model: (),
    "model": lambda model: (model,),
    "parameters": lambda model: (list(model.parameters()),),
}


@over("what", WHAT)
def test_stored_weights_come_back(what):
    ema = moved_average()
    before, average = snapshot(ema.model), snapshot(ema.module)
    ema.store(*what(ema.model))
    ema.copy_to(*what(ema.model))
    parameters = dict(ema.model.named_parameters())
    assert all(same_bits(x, average[name]) for name, x in parameters.items())
    ema.restore(*what(ema.model))
    assert same_tensors(ema.model, before)
    assert same_tensors(ema.module, average)
    with pytest.raises(RuntimeError, match=r"restore\(\) without store\(\)"):
        ema.restore()


def test_copy_to_takes_parameters_of_another_model():
    ema, other = moved_average(), make_net()
    buffers = {name: x.clone() for name, x in other.named_buffers()}
    ema.copy_to(other.parameters())
    averages = dict(ema.module.named_parameters())
    assert all(same_bits(x, averages[name]) for name, x in other.named_parameters())
    assert all(same_bits(x, buffers[name]) for name, x in other.named_buffers())


def test_what_was_stored_fits_or_nothing_changes():
    ema = moved_average()
    ema.store()
    for x in tensors_of(ema.model).values():
        x.detach().zero_()
    before = snapshot(ema.model)
    with pytest.raises(ValueError, match="tensors, but what was stored has"):
        ema.restore(ema.model.parameters())
    with pytest.raises(ValueError, match="there are 1 tensors, but the average has"):
        ema.copy_to([torch.zeros(3)])
    with pytest.raises(ValueError, match=r"tensor 0 has shape \(8,\), but in the average \(\)"):
        ema.copy_to(reversed(list(ema.model.parameters())))
    with pytest.raises(TypeError, match="parameters must be tensors, got str"):
        ema.copy_to(["x"] * len(list(ema.model.parameters())))
    assert same_tensors(ema.model, before)
    ema.restore()
    assert not same_tensors(ema.model, before)


@pytest.mark.parametrize("call", ["store", "restore", "reset"])
def test_swapped_weights_are_not_stored(call):
    ema = moved_average()
    with ema.swap(), pytest.raises(RuntimeError, match=rf"^{call}\(\) inside `with ema.swap"):
        getattr(ema, call)()


# Schedules.


def test_a_half_life_is_a_decay():
    ema = trainops.EMA(nn.Linear(2, 2), halflife_steps=1000)
    assert ema.decay**1000 == pytest.approx(0.5, rel=1e-12)
    every = trainops.EMA(nn.Linear(2, 2), halflife_steps=1000, update_every=10)
    assert every.decay**100 == pytest.approx(0.5, rel=1e-12)


def test_a_function_decides_on_each_update():
    seen = []

    def decay(step):
        seen.append(step)
        return {1: 0.0, 2: None, 3: 0.5, 5: 1.0}.get(step, 0.75)

    model = nn.Linear(1, 1)
    ema, averages = trainops.EMA(model, decay), []
    for value in range(1, 6):
        nn.init.constant_(model.weight, value)
        ema.update()
        averages.append(ema.module.weight.item())
    assert seen == [1, 2, 3, 4, 5]
    assert averages == [1.0, 1.0, 2.0, 2.5, 2.5]


def test_without_a_copy_in_the_beginning():
    """As timm's ``update(model)`` without a step."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    ema = trainops.EMA(model, lambda step: 0.75)
    nn.init.constant_(model.weight, 1.0)
    ema.update()
    assert ema.module.weight.item() == 0.25


def test_updates_that_are_left_out_begin_with_a_copy_all_the_same():
    """It was the initial weights that the first update of every ten kept in the average."""
    model = nn.Linear(3, 2)
    ema = trainops.EMA(model, 0.999, update_every=10)
    for _ in range(10):
        wander(model.parameters())
        ema.update()
    assert same_tensors(ema.module, model)
    assert [ema.decay_at(step) for step in (10, 20)] == [0.0, 0.999]


def test_schedules_are_pickled_and_shown():
    for decay in (trainops.DiffusersDecay(0.99), trainops.EMAPytorchDecay(0.99)):
        ema = trainops.EMA(nn.Linear(3, 2), decay)
        assert pickle.loads(pickle.dumps(ema)).decay == decay == copy.deepcopy(ema).decay
        assert f"decay={decay!r}" in repr(ema)


BAD_SCHEDULES = {
    "both": ({"decay": 0.9, "halflife_steps": 5}, ValueError, "decay and halflife_steps say the same"),
    "zero": ({"halflife_steps": 0}, ValueError, "halflife_steps must be positive, got 0"),
    "nan": ({"halflife_steps": float("nan")}, ValueError, "halflife_steps must be positive, got nan"),
    "text": ({"halflife_steps": "5"}, TypeError, "halflife_steps must be a number, got '5'"),
    "warmup": ({"decay": lambda step: 0.9, "warmup": True}, ValueError, "decay is a function: it takes the place"),
    "after": ({"decay": lambda step: 0.9, "update_after_step": 5}, ValueError, "decay is a function"),
}


@over(("options", "error", "message"), BAD_SCHEDULES)
def test_bad_schedules(options, error, message):
    with pytest.raises(error, match=message):
        trainops.EMA(nn.Linear(2, 2), **options)


@pytest.mark.parametrize(("value", "error"), [(1.5, ValueError), ("0.9", TypeError), (float("nan"), ValueError)])
def test_what_a_function_returns_is_checked_before_anything_moves(value, error):
    model = nn.Linear(3, 2)
    optimizer = trainops.AdamW(model.parameters(), ema=trainops.EMA(model, lambda step: value))
    model.weight.grad = torch.ones_like(model.weight)
    before = snapshot(model)
    with pytest.raises(error, match=r"decay\(1\) must be"):
        optimizer.step()
    assert same_tensors(model, before)
    assert optimizer.ema.step == 0


# A lockstep with the class that is always here; those of other packages are in tests/integrations.


@pytest.mark.parametrize("buffers", [False, True])
def test_in_lockstep_with_averaged_model(buffers):
    model = make_net(torch.float64)
    torchs = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.95), use_buffers=buffers)
    del model.bias_table  # of infinities, which torch's lerp makes NaN
    del torchs.module.bias_table
    ema = trainops.EMA(model, 0.95, average_buffers=buffers)
    for _ in range(200):
        wander(x for name, x in tensors_of(model).items() if name != "mask")
        ema.update_parameters(model)
        torchs.update_parameters(model)
    assert ema.step == torchs.n_averaged
    for name, average in tensors_of(ema.module).items():
        if average.is_floating_point() or not buffers:  # torch averages integers by its own rounding
            torch.testing.assert_close(average, tensors_of(torchs.module)[name], rtol=1e-12, atol=1e-14)


# What an EMA is not.


@pytest.mark.parametrize("name", ["to", "eval", "parameters", "cuda", "load", "linear"])
def test_what_a_module_has_is_looked_for_there(name):
    ema = trainops.EMA(make_net())
    message = f"write ema.module.{name}" if name != "load" else "'EMA' object has no attribute 'load'"
    with pytest.raises(AttributeError, match=message):
        getattr(ema, name)
    assert not hasattr(ema, name)


def test_a_call_is_one_of_the_averaged_model():
    model = nn.Linear(3, 2)
    ema, x = trainops.EMA(model, 0.5), randn((4, 3), torch.float32, "cpu")
    for _ in range(3):
        wander(model.parameters())
        ema.update()
    assert same_bits(ema(x), ema.module(x))
    assert not torch.equal(ema(x), model(x))


def test_a_step_inside_swap_is_named():
    ema = trainops.EMA(nn.Linear(3, 2))
    optimizer = trainops.AdamW(ema.model.parameters(), ema=ema)
    with ema.swap(), pytest.raises(RuntimeError, match=r"^optimizer.step\(\) inside `with ema.swap"):
        optimizer.step()
    ema.detach()
    with ema.swap(), pytest.raises(RuntimeError, match=r"^update\(\) inside `with ema.swap"):
        ema.update()


# Wrappers of optimizers.


class Swallowing:
    """Accelerate's, DeepSpeed's: what is set stays on the wrapper."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


class Imitating:
    """Lightning's and Fabric's: an instance of the optimizer's class, which reads what it lacks from it."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Imitating", (Imitating, type(optimizer)), {"__init__": lambda self: None})

    @property
    def optimizer(self):
        return self._optimizer

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Sharding:
    """ZeroRedundancyOptimizer's name for it."""

    def __init__(self, optimizer):
        self.optim = optimizer


WRAPPERS = {
    "none": lambda optimizer: optimizer,
    "swallowing": Swallowing,
    "imitating": Imitating,
    "sharding": Sharding,
    "two": lambda optimizer: Swallowing(Imitating(optimizer)),
    "three": lambda optimizer: Sharding(Swallowing(Sharding(optimizer))),
    "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
}


@over("wrap", WRAPPERS)
def test_an_average_finds_the_optimizer_inside(wrap):
    model = nn.Linear(3, 2)
    optimizer, ema = trainops.AdamW(model.parameters()), trainops.EMA(model)
    assert ema.attach(wrap(optimizer)) is optimizer
    assert (optimizer.ema, ema.optimizer) == (ema, optimizer)
    optimizer.step()
    assert ema.step == 1


def test_a_wrapper_that_imitates_its_optimizer_hands_settings_on():
    model = nn.Linear(3, 2)
    optimizer, ema = trainops.AdamW(model.parameters()), trainops.EMA(model)
    wrapper = Imitating(optimizer)
    wrapper.ema = ema
    wrapper.max_grad_norm = 0.5
    assert (optimizer.ema, ema.optimizer, wrapper.ema) == (ema, optimizer, ema)
    assert (optimizer.max_grad_norm, wrapper.max_grad_norm) == (0.5, 0.5)
    wrapper.ema = None
    assert (optimizer.ema, ema.optimizer) == (None, None)


class Endless:
    def __init__(self):
        self.optim = self


@over(
    "other",
    {
        "torch": lambda p: torch.optim.AdamW(p),
        "wrapped": lambda p: Swallowing(torch.optim.SGD(p)),
        "endless": lambda p: Endless(),
        "nothing": lambda p: None,
    },
)
def test_what_has_no_optimizer_of_trainops_is_named(other):
    ema = trainops.EMA(nn.Linear(3, 2))
    inside = other(ema.model.parameters())
    with pytest.raises(TypeError, match=f"no optimizer of trainops in this {type(inside).__name__}: call ema.update"):
        ema.attach(inside)
    assert ema.optimizer is None


def test_an_average_is_not_attached_to_the_optimizer_of_another_model():
    ema, optimizer = trainops.EMA(nn.Linear(3, 2)), trainops.AdamW(nn.Linear(3, 2).parameters())
    with pytest.raises(ValueError, match="ema follows a model that has none of these parameters"):
        ema.attach(optimizer)
    assert (optimizer.ema, ema.optimizer) == (None, None)
