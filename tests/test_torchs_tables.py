"""PyTorch's own tables of arguments that optimizers take and refuse: ours do what PyTorch's do with each."""

import copy
import re
import warnings

import pytest
import torch
from as_torchs import check, go_on, make_model, outcome
from training import RULES

pytest.importorskip("expecttest", reason="PyTorch's tables import expecttest")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tables = pytest.importorskip("torch.testing._internal.common_optimizers")

OF_CLASS = {info.optim_cls: info for info in tables.optim_db}
TAKEN = [
    pytest.param(rule, case, id=f"{rule.ours.__name__}-{case.desc or case.kwargs}")
    for rule in RULES
    for case in OF_CLASS[rule.torchs].optim_inputs_func(device="cpu")
]
REFUSED = [
    pytest.param(rule, case, id=f"{rule.ours.__name__}-{case.error_regex}")
    for rule in RULES
    for case in OF_CLASS[rule.torchs].optim_error_inputs_func(device="cpu", dtype=torch.float32)
]


@pytest.mark.parametrize("flag", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize(("rule", "taken"), TAKEN)
def test_arguments(rule, taken, flag):
    """Training, saved in the middle, goes on in a new optimizer."""

    def train(cls):
        options = copy.deepcopy(taken.kwargs) | flag
        model = make_model()
        optimizer = cls(model.parameters(), **options)
        go_on(model, optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        resumed = cls(model.parameters(), **copy.deepcopy(taken.kwargs) | flag)
        resumed.load_state_dict(saved)
        weights, state = go_on(model, resumed)
        return weights, without_our_steps(state, rule)

    check(train, rule.ours, rule.torchs)


def without_our_steps(state_dict, rule):
    """PyTorch's SGD counts no steps, and has None for a buffer that it does not need."""
    if rule.torchs is torch.optim.SGD:
        for state in state_dict["state"].values():
            state.pop("step", None)
            if state.get("momentum_buffer", 0) is None:
                state.clear()
        state_dict["state"] = {key: state for key, state in state_dict["state"].items() if state}
    return state_dict


@pytest.mark.parametrize(("rule", "refused"), REFUSED)
def test_bad_arguments(rule, refused):
    case = refused.optimizer_error_input

    def construct(cls):
        cls(case.params, **copy.deepcopy(case.kwargs))

    what, message = outcome(construct, rule.ours)
    if what is None:  # it warns
        (what, message), *_ = message
    assert issubclass(what, refused.error_type)
    assert re.search(refused.error_regex, message)
    check(construct, rule.ours, rule.torchs)
