"""The order of what is in tables, which C++ writes and Python and Triton read by name."""

import importlib
import inspect

import pytest
import torch
from table_fixtures import NO_PLACES, STEP_COLUMNS, names_of, state_of
from torch import nn

import trainops
from trainops import core, reference
from trainops.adapters.interface import AVERAGES

RULES = [kind for kind, schema in core.schemas.items() if schema.settings]


def test_what_the_columns_are():
    """Where a number stands is written in C++ alone; what there is, is written here once more."""
    adamw = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert {kind: names_of(kind) for kind in core.schemas} == {
        "adamw": [*STEP_COLUMNS, *adamw],
        "adam": [*STEP_COLUMNS, *adamw],
        "sgd": [*STEP_COLUMNS, "momentum_buffer"],
        "ema": ["average", "tensor"],
        "reduce": ["tensor"],
        "transform": ["tensor"],
    }
    columns = {kind: core.schemas[kind].columns for kind in core.schemas}
    uses = {
        use: {f"{kind} {column.name}" for kind in columns for column in columns[kind] if getattr(column, use)}
        for use in ("written", "optional", "one_per_row", "of_param")
    }
    states = {"adamw": adamw, "adam": adamw, "sgd": ["momentum_buffer"]}
    written = {f"{rule} {x}" for rule in states for x in ("param", "average", "step", "master", *states[rule])}
    written |= {"ema average", "transform tensor"}
    optional = {f"{rule} {x}" for rule in states for x in ("average", "master", states[rule][-1])}
    assert uses == {
        "written": written,
        "optional": optional,
        "one_per_row": {f"{rule} step" for rule in states},
        "of_param": {f"{rule} master" for rule in states},
    }
    measured = {kind: names_of(kind)[core.schemas[kind].measured] for kind in core.schemas}
    of_rules = dict.fromkeys(states, "grad")
    assert measured == of_rules | {"ema": "average", "reduce": "tensor", "transform": "tensor"}
    assert core.step_columns == {name: place for place, name in enumerate(STEP_COLUMNS)}
    assert [column.name for column in core.further_averages] == list(AVERAGES[1:])
    assert names_of("sgd") + list(AVERAGES[1:3]) == list(core.schema("sgd", 3).places)
    of_averages = [f"{what}{i}" for what in ("ema_decay", "ema_seed") for i in ("", 2, 3, 4)]
    words = {
        "row": ["numel", "first_chunk", "group", "dtypes", *NO_PLACES],
        "chunk": ["row", "begin"],
        "step": ["max_norm", "max_norm_value", *of_averages[:4], "seed", *of_averages[4:]],
        "setting": ["form", "value"],
        "form": ["double", "float_address", "double_address"],
    }
    for kind, names in words.items():
        assert core.words(kind) == {name: place for place, name in enumerate(names)}


@pytest.mark.parametrize("kind", core.schemas)
def test_columns_and_settings_are_found_by_name(kind):
    names, settings = names_of(kind), core.schemas[kind].settings
    assert [core.schemas[kind].places[name] for name in names] == list(range(len(names)))
    assert [core.setting(kind, name) for name in settings] == list(range(len(settings)))
    assert "step_size" not in core.schemas[kind].places
    with pytest.raises(ValueError, match="not in list"):
        core.setting(kind, "step_size")


OPTIMIZERS = {
    "adamw": (trainops.AdamW, {"amsgrad": True}),
    "adam": (trainops.Adam, {"amsgrad": True}),
    "sgd": (trainops.SGD, {"momentum": 0.9}),
}


@pytest.mark.parametrize("rule", RULES)
def test_an_optimizer_has_the_columns_and_settings_of_its_rule(rule):
    kind, options = OPTIMIZERS[rule]
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = kind([p], **options)
    (group,) = optimizer.param_groups
    assert optimizer.rule == rule
    assert list(optimizer.state_names(group)) == state_of(rule)
    assert list(optimizer.settings(group)) == core.schemas[rule].settings
    optimizer.step()
    assert list(optimizer.state[p]) == ["step", *state_of(rule)]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_the_columns_of_a_step_and_the_specification_takes_the_rest(rule):
    assert names_of(rule)[: len(STEP_COLUMNS)] == STEP_COLUMNS
    parameters = inspect.signature(getattr(reference, f"{rule}_")).parameters
    columns = {name for name, x in parameters.items() if x.kind == x.POSITIONAL_OR_KEYWORD}
    settings = [name for name in parameters if name not in columns]
    assert columns == set(names_of(rule)) - {"average", "master"}
    assert settings == [*core.schemas[rule].settings, "coefficient", "skip", "spread"]


@pytest.mark.parametrize("rule", RULES)
def test_triton_takes_the_state_in_the_order_of_the_columns(rule):
    pytest.importorskip("triton")
    new_state = importlib.import_module(f"trainops.triton_kernels.{rule}").new_state
    update = importlib.import_module("trainops.triton_kernels.update")
    param, grad, *state, scalars = inspect.signature(new_state.fn).parameters
    assert (param, grad, scalars) == ("param", "grad", "scalars")
    assert state[: len(state_of(rule))] == state_of(rule)
    types = [name for name in inspect.signature(update.update.fn).parameters if name.startswith("STATE")]
    assert types == [f"STATE{i}_TYPE" for i in range(len(state))]  # a rule with less state leaves the last ones out
    assert update.STATE.value == len(STEP_COLUMNS)
