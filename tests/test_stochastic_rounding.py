"""Parameters in bfloat16 that are rounded stochastically: one of the two neighbours, in the mean the exact result."""

import copy

import numpy as np
import pytest
import torch
from contract import assert_contract, exact, same_bits
from controls import must_fail
from exact import clip_coefficient, ema, norm
from neighbours import (
    BFLOAT16,
    SHAPES,
    Directions,
    WrongRounding,
    assert_neighbour,
    drawn,
    same_in_each_step,
    to_nearest,
    truncated,
    two_units_up,
)
from surroundings import Surrounded
from targets import INTERPRETER, KERNELS, REFERENCE, TARGETS, interpreted, over, over_kernels
from training import RULES, SGD, Model, make_grads, set_grads

import trainops

FLOAT32 = torch.float32
RULE_OPTIONS = {
    "AdamW": (
        RULES[0],
        {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "max_grad_norm": 1.0, "average": BFLOAT16},
    ),
    "AdamW, float32 moments": (RULES[0], {"lr": 0.01, "state_dtype": FLOAT32, "average": FLOAT32}),
    "Adam": (RULES[1], {"lr": 0.01, "weight_decay": 0.1}),
    "SGD": (SGD, {"lr": 2.0**-6, "momentum": 0.9}),
}
# Arithmetic that is the same to the last bit in every backend.
PLAIN_SGD = (SGD, {"lr": 2.0**-6})


def make(target, rule, shapes=SHAPES, seed=5, average=None, **options):
    """A model and its optimizer, with an average of a type, if one is given."""
    model = Model([x.to(target.device) for x in drawn(shapes, seed=11)])  # not what `make_grads` draws
    if average is not None:
        how = {"stochastic_rounding": average == BFLOAT16, "backend": target.backend}
        options["ema"] = trainops.EMA(model, 0.9, update_after_step=-1, dtype=average, **how)
    optimizer = rule.ours(model.parameters(), stochastic_rounding=True, seed=seed, backend=target.backend, **options)
    return model, optimizer


def take_steps(model, optimizer, steps, first=0):
    for i in range(first, first + steps):
        set_grads(
            model.params, [x.to(model.params[0].device) for x in drawn([p.shape for p in model.params], 100 + i)]
        )
        optimizer.step()
    return [p.detach().clone() for p in model.params]


# The two neighbours


def assert_average(average, true, what):
    if average.dtype == BFLOAT16:
        assert_neighbour(average, true, what)
    else:
        assert_contract(average, true, what=what)


def check_neighbours(target, rule, steps, shapes=SHAPES, **options):
    model, optimizer = make(target, rule, shapes, **options)
    averages = [] if optimizer.ema is None else optimizer.ema.module.params
    directions = Directions()
    for grads in make_grads(shapes, BFLOAT16, "cpu", steps):
        set_grads(model.params, [x.to(target.device) for x in grads])
        coefficient = clip_coefficient(norm([exact(x) for x in grads]), optimizer.max_grad_norm)
        before = []
        for p in model.params:
            state = optimizer.state.get(p) or {}
            moments = [
                exact(state[name]) if name in state else np.zeros(p.shape, np.longdouble) for name in rule.states
            ]
            before.append((exact(p), moments, int(state.get("step", 0)) + 1))
        averages_before = [exact(x) for x in averages]
        optimizer.step()
        group = optimizer.param_groups[0]
        settings = {name: group[name] for name in rule.settings}
        for p, grad, (param, moments, step) in zip(model.params, grads, before, strict=True):
            true = rule.step(param, exact(grad), *moments, step, coefficient=coefficient, **settings)["param"]
            assert_neighbour(p, true, f"step {step}")
            directions.add(p, true)
        for x, old, p in zip(averages, averages_before, model.params, strict=False):
            assert_average(x, ema(old, exact(p), 0.9), f"average, step {step}")
    directions.assert_alike()


@interpreted(lambda rule, **_: rule == RULE_OPTIONS["AdamW"])
@over("rule", RULE_OPTIONS)
def test_every_result_is_a_neighbour(target, rule):
    check_neighbours(target, rule[0], 2 if target == INTERPRETER else 5, **rule[1])


@over("wrong", {"two units": two_units_up, "truncated": truncated})
def test_wrong_rounding_is_noticed(wrong):
    must_fail(lambda: WrongRounding(wrong), check_neighbours, REFERENCE, SGD, 3, lr=2.0**-6)


# The mean


def check_mean(target, steps, numel=1 << 14):
    """Steps of a thirtieth of the last place: the mean is right, and elements and steps are independent."""
    p = torch.nn.Parameter(torch.ones(numel, dtype=BFLOAT16, device=target.device))
    step = 2.0**-7 / 30  # the last place of 1 is 2^-7
    optimizer = trainops.SGD([p], lr=step, stochastic_rounding=True, maximize=True, backend=target.backend)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    places = (p.detach().double().cpu() - 1) * 2**7
    share = 1 / 30
    variance = steps * share * (1 - share)
    assert abs(places.mean() - steps * share) < 4 * (variance / numel) ** 0.5
    assert abs(places.var() / variance - 1) < 6 * (2 / numel) ** 0.5


def test_the_mean_is_right(target):
    check_mean(target, *((8, 1 << 12) if target == INTERPRETER else (60,)))


@over("wrong", {"to nearest": to_nearest, "the same bits in each step": same_in_each_step})
def test_a_wrong_mean_is_noticed(wrong):
    must_fail(lambda: WrongRounding(wrong), check_mean, REFERENCE, 60)


# The same bits


def of(backend):
    return next(target for target in TARGETS if target.backend == backend)


def test_every_backend_has_the_same_bits(target):
    steps = 2 if target == INTERPRETER else 4
    ours, theirs = (take_steps(*make(x, *PLAIN_SGD[:1], **PLAIN_SGD[1]), steps) for x in (target, REFERENCE))
    assert all(map(same_bits, ours, theirs))


@over("rule", RULE_OPTIONS)
def test_compiled_backends_have_the_same_bits(rule):
    options = {name: x for name, x in rule[1].items() if name != "max_grad_norm"}  # sums differ in their last bit
    found = [take_steps(*make(x, rule[0], **options), 5) for x in KERNELS if x.backend in ("cpu", "cuda")]
    assert all(all(map(same_bits, found[0], other)) for other in found[1:])


def placed(x, layout):
    if layout == "transposed" and x.ndim == 2:
        return x.t().contiguous().t()
    return Surrounded(x, 3).tensor if layout == "offset" else Surrounded(x, 3, step=2).tensor


@interpreted(lambda layout, **_: layout == "gaps")
@pytest.mark.parametrize("layout", ["offset", "transposed", "gaps"])
def test_wherever_tensors_lie(target, layout):
    def run(target):
        model, optimizer = make(target, SGD, **PLAIN_SGD[1])
        for p in model.params:
            p.data = placed(p.data, layout)
        return take_steps(model, optimizer, 2)

    assert all(map(same_bits, run(target), run(REFERENCE)))


def test_any_number_of_threads():
    def run(threads):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            return take_steps(*make(of("cpu"), RULES[0], [(300, 1001), (5,)]), 2)
        except StopIteration:
            pytest.skip("no backend cpu")
        finally:
            torch.set_num_threads(before)

    assert all(map(same_bits, run(1), run(3)))


def test_seeds_and_steps_differ(target):
    where = {"stochastic_rounding": True, "backend": target.backend}

    def run(seed):
        p = torch.nn.Parameter(torch.ones(4096, dtype=BFLOAT16, device=target.device))
        optimizer = trainops.SGD([p], lr=2.0**-8, maximize=True, seed=seed, **where)
        p.grad = torch.ones_like(p)
        optimizer.step()
        return p.detach()

    found = [run(seed) for seed in (None, 0, 1, 1 << 32)]
    assert same_bits(found[0], found[1])
    for a, b in [(0, 2), (0, 3), (2, 3)]:
        assert 0.45 < (found[a] == found[b]).double().mean() < 0.55


def test_a_missing_gradient_shifts_nothing(target):
    def run(missing):
        model, optimizer = make(target, SGD, **PLAIN_SGD[1])
        optimizer.add_param_group({"params": [torch.nn.Parameter(x.to(target.device)) for x in drawn([(50,)], 9)]})
        last = optimizer.param_groups[1]["params"][0]
        for i in range(2):
            set_grads([*model.params, last], [x.to(target.device) for x in drawn([*SHAPES, (50,)], i)])
            for k in missing:
                model.params[k].grad = None
            optimizer.step()
        return [p.detach() for k, p in enumerate([*model.params, last]) if k not in (0, 2)]

    assert all(map(same_bits, run(()), run((0, 2))))


def mixed_steps(target, steps, cls=trainops.AdamW, shapes=((9,), (3, 4099)), **options):
    """Of parameters of float32, float64 and bfloat16."""
    dtypes = (FLOAT32, torch.float64, BFLOAT16)
    params = [torch.nn.Parameter(x) for dtype in dtypes for x in drawn(shapes, 1, dtype)]
    model = Model([x.to(target.device) for x in params])
    options = {"stochastic_rounding": True, "max_grad_norm": 100.0, **options}
    optimizer = cls(model.parameters(), lr=0.01, backend=target.backend, **options)
    for i in range(steps):
        set_grads(model.params, [x.to(p) for p, x in zip(params, drawn([p.shape for p in params], i), strict=True)])
        optimizer.step()
    return [p.detach() for p in model.params]


@interpreted(lambda **_: False)
@over_kernels
def test_other_parameters_are_as_without(target):
    found, plain = mixed_steps(target, 2), mixed_steps(target, 2, stochastic_rounding=False)
    assert all(map(same_bits, found[:4], plain[:4]))
    assert not any(map(same_bits, found[4:], plain[4:]))


# Checkpoints


def test_resuming_goes_on_with_the_same_bits(target):
    small = {"shapes": [(7,), (33, 31)], **PLAIN_SGD[1]}
    whole = take_steps(*make(target, SGD, **small), 4)
    model, optimizer = make(target, SGD, **small)
    take_steps(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0]["trainops"] == {"seed": 5}
    other, resumed = make(target, SGD, seed=6, **small)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    assert resumed.seed == 5
    assert all(map(same_bits, take_steps(other, resumed, 2, first=2), whole))


def test_a_state_of_torchs_class_leaves_the_seed():
    model, optimizer = make(REFERENCE, RULES[0])
    other = torch.optim.AdamW(model.parameters())
    set_grads(model.params, drawn())
    other.step()
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.seed == 5
    assert copy.deepcopy(optimizer).seed == 5
    take_steps(model, optimizer, 1)
    other.load_state_dict(optimizer.state_dict())
    other.step()


# Bad input


def parameter(dtype, shape=(3,)):
    return torch.nn.Parameter(torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("dtypes", "options", "error", "message"),
    [
        ([torch.float16, BFLOAT16], {}, ValueError, "float16"),
        ([FLOAT32, torch.float64], {}, ValueError, "none of the parameters"),
        ([BFLOAT16], {"master": "split"}, ValueError, "without a master"),
        ([BFLOAT16], {"differentiable": True}, ValueError, "PyTorch's own step"),
        ([BFLOAT16], {"stochastic_rounding": 1}, TypeError, "True or False"),
        ([BFLOAT16], {"seed": 0.5}, TypeError, "seed must be an integer"),
        ([BFLOAT16], {"seed": -1}, ValueError, "from 0 to"),
        ([BFLOAT16], {"seed": 1 << 63}, ValueError, "from 0 to"),
        ([BFLOAT16], {"seed": 1, "stochastic_rounding": False}, ValueError, "of no use"),
    ],
)
def test_what_is_refused(dtypes, options, error, message):
    with pytest.raises(error, match=message):
        trainops.AdamW([parameter(x) for x in dtypes], **{"stochastic_rounding": True, **options})


def test_a_refused_group_changes_nothing():
    optimizer = trainops.AdamW([parameter(BFLOAT16)], stochastic_rounding=True)
    with pytest.raises(ValueError, match="float16"):
        optimizer.add_param_group({"params": [parameter(torch.float16)]})
    with pytest.raises(ValueError, match="a setting of the optimizer"):
        optimizer.add_param_group({"params": [parameter(BFLOAT16)], "seed": 3})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [parameter(FLOAT32)]})
    assert "stochastic_rounding: True\nseed: 0\n" in repr(optimizer)


def test_a_skipped_step_changes_no_bit(target):
    model, optimizer = make(target, SGD, shapes=[(7,), (33, 31)], skip_nonfinite=True)
    take_steps(model, optimizer, 1)
    before = [p.detach().clone() for p in model.params]
    model.params[1].grad.fill_(float("inf"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(map(same_bits, [p.detach() for p in model.params], before))
