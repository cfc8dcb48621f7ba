"""What PyTorch's own tests ask of an optimizer's state: checkpoints of every kind, their hooks, and copies."""

import copy
import gc
import io
import pickle
import weakref
from functools import partial

import pytest
import torch
from as_torchs import check, go_on, make_model, one_param, train
from targets import over
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import lr_scheduler

KEYS = ["maximize", "foreach", "fused", "differentiable", "capturable", "amsgrad", "decoupled_weight_decay"]


def changed(cls, change, **options):
    """Training goes on from a checkpoint that was changed."""
    checkpoint = copy.deepcopy(train(cls, **options)[1].state_dict())
    change(checkpoint)
    model, optimizer = train(cls, steps=0, **options)
    optimizer.load_state_dict(checkpoint)
    return go_on(model, optimizer)


@pytest.mark.parametrize("key", KEYS)
def test_checkpoints_from_before_there_was_a_setting(key):
    check(partial(changed, change=lambda checkpoint: checkpoint["param_groups"][0].pop(key)))


STEP_COUNTS = {
    "number": torch.Tensor.item,
    "integer": lambda step: int(step.item()),
    "one_element": lambda step: step.reshape(1),
    "float64": torch.Tensor.double,
}


@over("kind", STEP_COUNTS)
def test_checkpoints_with_other_step_counts(kind):
    def change(checkpoint):
        for state in checkpoint["state"].values():
            state["step"] = kind(state["step"])

    check(partial(changed, change=change))


def test_checkpoints_with_more_than_an_optimizer_knows():
    def change(checkpoint):
        checkpoint["state"][0] |= {"note": "text", "more": torch.ones(3)}
        checkpoint["state"]["of_no_parameter"] = 3
        checkpoint["param_groups"][0]["more"] = "text"

    check(partial(changed, change=change))


def from_named_to_nameless_and_back(cls):
    _, first = train(cls, named=True)
    model, second = train(cls, steps=0)
    second.load_state_dict(first.state_dict())
    go_on(model, second)
    model, third = train(cls, steps=0, named=True)
    third.load_state_dict(second.state_dict())
    return [second.state_dict(), go_on(model, third)]


def in_a_file_of_weights_alone(cls):
    file = io.BytesIO()
    torch.save(train(cls)[1].state_dict(), file)
    file.seek(0)
    model, optimizer = train(cls, steps=0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    return go_on(model, optimizer)


def two_optimizers_one_of_which_loaded_the_others(cls):
    """What they then share is up to PyTorch."""
    _, first = train(cls)
    model, second = train(cls, steps=0)
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(first.state_dict())
    return [go_on(model, second), first.state_dict(), before]


def groups_that_stand_there_twice(cls):
    _, optimizer = train(cls)
    optimizer.param_groups.extend(optimizer.param_groups)
    return optimizer.state_dict()["param_groups"]


def tensors_that_stand_there_twice(cls):
    param, optimizer = one_param(cls)
    optimizer.step()
    optimizer.state[param]["alias"] = optimizer.state[param]["exp_avg"]
    state = optimizer.state_dict()["state"][0]
    return [state["alias"] is state["exp_avg"], state["exp_avg"] is optimizer.state[param]["exp_avg"]]


def attributes_of_a_copy(cls):
    _, optimizer = train(cls)
    public = [{name for name in vars(each) if name[0] != "_"} for each in (optimizer, copy.deepcopy(optimizer))]
    return public[0] == public[1]


def pickled(cls):
    model, optimizer = pickle.loads(pickle.dumps(train(cls, amsgrad=True)))
    return [optimizer.defaults, go_on(model, optimizer)]


def distributed_checkpoint(cls):
    model, optimizer = train(cls)
    checkpoint = dcp.get_optimizer_state_dict(model, optimizer)
    fresh_model, fresh = train(cls, steps=0)
    dcp.set_optimizer_state_dict(fresh_model, fresh, checkpoint)
    return [checkpoint, list(fresh_model.parameters()), go_on(fresh_model, fresh)]


def distributed_checkpoint_before_the_first_step(cls):
    model, optimizer = train(cls, steps=0)
    return [dcp.get_optimizer_state_dict(model, optimizer), list(model.parameters())]


def a_group_of_settings(cls):
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = cls([{"params": [first], "lr": 1.0, "name": "a"}, {"params": second, "betas": (0.5, 0.6)}], lr=2.0)
    first.grad, second.grad = torch.ones(2), torch.ones(3)
    optimizer.step()
    return [first, second, optimizer.state_dict()]


def freed_without_the_garbage_collector(cls):
    """Nothing that an optimizer holds refers back to it, with a scheduler around it either."""
    _, optimizer = one_param(cls)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    optimizer.step()
    del scheduler
    reference = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        return reference() is None
    finally:
        gc.enable()


CASES = [
    from_named_to_nameless_and_back,
    in_a_file_of_weights_alone,
    two_optimizers_one_of_which_loaded_the_others,
    groups_that_stand_there_twice,
    tensors_that_stand_there_twice,
    attributes_of_a_copy,
    pickled,
    distributed_checkpoint,
    distributed_checkpoint_before_the_first_step,
    a_group_of_settings,
    freed_without_the_garbage_collector,
]


@over("case", {case.__name__: case for case in CASES})
def test_state_is_kept_as_torchs(case):
    check(case)


def hooked(cls, register, prepend):
    """Two hooks, the second of which changes what it sees where it may, and may ask to be run first."""
    model, optimizer = train(cls, steps=1)
    calls = []

    def second(optimizer, *checkpoint):
        calls.append("second")
        return (
            {**checkpoint[0], "param_groups": [{**checkpoint[0]["param_groups"][0], "lr": 0.5}]}
            if checkpoint
            else None
        )

    getattr(optimizer, register)(lambda *_: calls.append("first"))
    getattr(optimizer, register)(second, prepend=prepend)
    checkpoint = optimizer.state_dict()
    optimizer.load_state_dict(train(cls, model=make_model())[1].state_dict())
    return [calls, checkpoint, go_on(model, optimizer)]


@pytest.mark.parametrize("prepend", [False, True], ids=["", "prepend"])
@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("what", ["state_dict", "load_state_dict"])
def test_hooks_of_checkpoints(what, when, prepend):
    check(partial(hooked, register=f"register_{what}_{when}_hook", prepend=prepend))
