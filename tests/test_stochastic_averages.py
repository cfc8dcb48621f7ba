"""Averages in bfloat16 that are rounded stochastically, in a step and alone, and the warning of those that stall."""

import copy

import numpy as np
import pytest
import torch
from contract import exact, same_bits
from controls import must_fail
from exact import ema as exact_ema
from neighbours import BFLOAT16, SHAPES, Directions, WrongRounding, assert_neighbour, drawn, truncated
from said import said
from targets import INTERPRETER, REFERENCE, over
from torch import nn
from training import Model, set_grads

import trainops

FLOAT16, FLOAT32 = torch.float16, torch.float32
DECAYS = {"usual": 0.9, "large": 0.999, "half": 0.4, "copy": 0.0, "kept": 1.0}


def make(target, dtype=BFLOAT16, decay=0.9, seed=3, shapes=SHAPES, **options):
    model = Model([x.to(target.device) for x in drawn(shapes, dtype=dtype)])
    options = {"update_after_step": -1, "dtype": BFLOAT16, "backend": target.backend, **options}
    return model, trainops.EMA(model, decay, stochastic_rounding=True, seed=seed, **options)


def move(model, ema, updates, first=0):
    for i in range(first, first + updates):
        with torch.no_grad():
            for p, x in zip(model.params, like(model, 50 + i), strict=True):
                p.copy_(x)
        ema.update()
    return [p.detach().clone() for p in ema.module.params]


def like(model, seed):
    return drawn([p.shape for p in model.params], seed, model.params[0].dtype)


def check_neighbours(target, decay, dtype=BFLOAT16, shapes=SHAPES):
    model, ema = make(target, dtype, decay, shapes=shapes)
    directions = Directions()
    for i in range(3):
        before = [exact(x) for x in ema.module.params]
        move(model, ema, 1, first=i)
        for average, old, p in zip(ema.module.params, before, model.params, strict=True):
            true = exact_ema(old, exact(p), decay)
            if decay in (0.0, 1.0):  # of what is in bfloat16 already
                assert np.array_equal(exact(average), true.value)
            assert_neighbour(average, true, f"update {i}")
            directions.add(average, true)
    if 0.0 < decay < 0.99:  # with a larger one, most go back to where they were, which is away from zero
        directions.assert_alike()


@over("decay", DECAYS)
def test_every_average_is_a_neighbour(target, decay):
    check_neighbours(target, decay)


@pytest.mark.parametrize("dtype", [FLOAT32, torch.float64, FLOAT16])
def test_averages_of_other_types_are_neighbours(target, dtype):
    check_neighbours(target, 0.9, dtype)


def test_truncated_averages_are_noticed():
    must_fail(lambda: WrongRounding(truncated), check_neighbours, REFERENCE, 0.9)


def test_the_mean_goes_the_whole_way(target):
    """300 updates with decay 0.999 go 26% of the way; rounded to nearest, they would not go a tenth of it."""
    numel, updates = (1 << 10, 30) if target == INTERPRETER else (1 << 13, 300)
    model = Model([torch.ones(numel, dtype=BFLOAT16, device=target.device)])
    ema = trainops.EMA(model, 0.999, update_after_step=-1, stochastic_rounding=True, backend=target.backend)
    for _ in range(updates):
        with torch.no_grad():
            model.params[0].fill_(2.0)
        ema.update()
    way = ema.module.params[0].double() - 1
    assert abs(way.mean() / (1 - 0.999**updates) - 1) < 0.02
    assert way.std() < 0.06


def test_every_backend_has_the_same_bits(target):
    ours, theirs = (move(*make(x), 2) for x in (target, REFERENCE))
    assert all(map(same_bits, ours, theirs))


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_no_nan_becomes_a_number(target, decay):
    """Random bits carry the largest mantissa into the sign; what is cut off the smallest one leaves infinity."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800001 - (1 << 31), 0x7FC00000], dtype=torch.int32)
    model = Model([torch.ones(5 * 13, device=target.device)])
    ema = trainops.EMA(
        model, decay, dtype=BFLOAT16, update_after_step=-1, stochastic_rounding=True, backend=target.backend
    )
    model.params[0].data.copy_(bits.repeat(13).view(FLOAT32))
    ema.update()
    assert ema.module.params[0].isnan().all()


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_a_step_moves_it_as_an_update_after_it(target, dtype):
    """Buffers and parameters without a gradient included, whose averages no step moves."""

    def run(fused):
        model, _ = make(target, dtype)
        model.register_buffer("buffer", drawn([(33,)])[0].to(target.device))
        ema = trainops.EMA(model, 0.9, dtype=BFLOAT16, stochastic_rounding=True, seed=4, backend=target.backend)
        optimizer = trainops.AdamW(
            model.parameters(),
            lr=0.01,
            ema=ema if fused else None,
            backend=target.backend,
            stochastic_rounding=dtype == BFLOAT16,
        )
        for i in range(3):
            set_grads(model.params, [x.to(target.device) for x in drawn(seed=i, dtype=dtype)])
            model.params[2].grad = None
            with torch.no_grad():
                model.buffer.mul_(1.5)
            optimizer.step()
            if not fused:
                ema.update()
        return [*ema.module.params, ema.module.buffer]

    assert all(map(same_bits, run(True), run(False)))


def test_resuming_goes_on_with_the_same_bits():
    whole = move(*make(REFERENCE), 4)
    model, ema = make(REFERENCE)
    move(model, ema, 2)
    saved = copy.deepcopy(ema.state_dict())
    assert saved["seed"] == 3
    other, resumed = make(REFERENCE, seed=None)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    assert resumed.seed == 3
    assert all(map(same_bits, move(other, resumed, 2, first=2), whole))
    nearest = trainops.EMA(Model(drawn()), 0.9)
    nearest.load_state_dict(saved)
    assert nearest.seed is None
    assert "seed" not in nearest.state_dict()
    assert all(map(same_bits, move(copy.deepcopy(other), copy.deepcopy(resumed), 0), resumed.module.params))


def test_what_is_left_out_shifts_nothing():
    """The bits of a weight are those of its place in the model, whichever others are averaged."""

    def run(**options):
        model, ema = make(REFERENCE, **options)
        return move(model, ema, 2)[3]

    assert same_bits(run(), run(exclude=["params.1", "params.2"]))


@pytest.mark.parametrize(
    ("dtype", "options", "error", "message"),
    [
        (FLOAT16, {"dtype": None}, ValueError, "one of the averages is float16"),
        (BFLOAT16, {"dtype": FLOAT32}, ValueError, "none of the averages"),
        (BFLOAT16, {"seed": "1"}, TypeError, "seed must be an integer"),
        (BFLOAT16, {"stochastic_rounding": None}, TypeError, "True or False"),
        (BFLOAT16, {"stochastic_rounding": False, "seed": 1}, ValueError, "of no use"),
    ],
)
def test_what_is_refused(dtype, options, error, message):
    with pytest.raises(error, match=message):
        trainops.EMA(Model(drawn(dtype=dtype)), 0.9, **{"stochastic_rounding": True, **options})


# The warning


STALLING = {"bfloat16": (BFLOAT16, 0.9999), "the default": (BFLOAT16, None), "float16": (FLOAT16, 0.9999)}


@over("case", STALLING)
def test_an_average_that_stalls_is_named_once(case):
    dtype, decay = case
    model = nn.Linear(3, 2).to(dtype)
    (message,) = said(lambda: trainops.EMA(model, decay))
    assert "stalls" in message
    assert "EMA(..., dtype=torch.float32)" in message
    assert ("stochastic_rounding=True" in message) == (dtype == BFLOAT16)


def test_others_are_not():
    model = nn.Linear(3, 2)
    half = copy.deepcopy(model).bfloat16()
    quiet = [
        lambda: trainops.EMA(model),
        lambda: trainops.EMA(half, 0.9999, dtype=FLOAT32),
        lambda: trainops.EMA(half, 0.9999, stochastic_rounding=True),
        lambda: trainops.EMA(half, 0.99),
        lambda: trainops.EMA(half, 1.0),
        lambda: trainops.EMA(half, exclude=["weight", "bias"]),
        lambda: trainops.EMA(half, trainops.DiffusersDecay()),
    ]
    assert [said(make) for make in quiet] == [[]] * len(quiet)
