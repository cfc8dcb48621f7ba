"""State dicts of an average: those of other classes and of wrapped models are read, and theirs can be written."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
from contract import same_bits
from models import Tied, make_net, same_tensors, snapshot, tensors_of, wander
from targets import over
from torch import nn
from torch.optim import swa_utils

import trainops


def moved(model, **options):
    ema = trainops.EMA(model, 0.9, **options)
    for _ in range(3):
        wander(tensors_of(model).values())
        ema.update()
    return ema


def prefixed(state, prefix):
    return OrderedDict((f"{prefix}{key}", value) for key, value in state.items())


def torchs(ema):
    average = swa_utils.AveragedModel(ema.module)
    average.n_averaged.fill_(ema.step)
    return average.state_dict()


def ema_pytorchs(ema):
    """With ``include_online_model``, as by default."""
    state = prefixed(ema.model.state_dict(), "online_model.") | prefixed(ema.module.state_dict(), "ema_model.")
    return state | {"initted": torch.tensor(True), "step": torch.tensor(ema.step)}


def diffusers(ema):
    return {"decay": 0.5, "optimization_step": ema.step, "shadow_params": list(ema.module.parameters())}


KEPT = {
    "ours": lambda ema: ema.state_dict(),
    "torch": torchs,
    "torch_of_ddp": lambda ema: prefixed(ema.module.state_dict(), "module.module.") | {"n_averaged": torch.tensor(3)},
    "ema_pytorch": ema_pytorchs,
    "diffusers": diffusers,
    "as_torchs": lambda ema: ema.state_dict(form="torch"),
    "as_diffusers": lambda ema: ema.state_dict(form="diffusers"),
    "ours_of_ddp": lambda ema: {"module": prefixed(ema.module.state_dict(), "module."), "step": ema.step},
    "ours_of_compiled": lambda ema: {"module": prefixed(ema.module.state_dict(), "_orig_mod."), "step": ema.step},
}
UNCOUNTED = {
    "model": lambda ema: ema.module.state_dict(),
    "timm": lambda ema: prefixed(ema.module.state_dict(), "module."),
    "as_timms": lambda ema: ema.state_dict(form="timm"),
    "ddp": lambda ema: prefixed(ema.module.state_dict(), "module."),
    "compiled": lambda ema: prefixed(ema.module.state_dict(), "_orig_mod."),
    "ddp_of_compiled": lambda ema: prefixed(ema.module.state_dict(), "module._orig_mod."),
    "compiled_block": lambda ema: {
        key.replace("linear.", "linear._orig_mod."): x for key, x in ema.module.state_dict().items()
    },
}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@over("write", KEPT)
def test_a_state_that_counts_is_resumed(write):
    ema = moved(make_net())
    other = trainops.EMA(copy.deepcopy(ema.model), 0.9)
    wander(tensors_of(other.module).values())
    if write in (diffusers, KEPT["as_diffusers"]):  # of parameters alone
        for name, buffer in other.module.named_buffers():
            buffer.copy_(ema.module.get_buffer(name))
    other.load_state_dict(through_a_file(write(ema)))
    assert other.step == 3
    for _ in range(2):
        assert same_tensors(other.module, ema.module)
        wander(tensors_of(ema.model).values())
        other.model.load_state_dict(ema.model.state_dict())
        ema.update()
        other.update()


@over("write", UNCOUNTED)
def test_a_state_that_does_not_count_is_continued(write):
    ema = moved(make_net())
    for options in ({}, {"step": 3}):
        other = trainops.EMA(copy.deepcopy(ema.model), 0.9)
        wander(tensors_of(other.module).values())
        other.load_state_dict(through_a_file(write(ema)), **options)
        assert same_tensors(other.module, ema.module)
        assert other.step == options.get("step", 0)
        twin = copy.deepcopy(ema)
        twin.update()
        other.update()
        assert same_tensors(other.module, twin.module)


@over("write", UNCOUNTED)
def test_a_decay_that_depends_on_the_step_asks_for_it(write):
    ema = moved(make_net())
    other = trainops.EMA(make_net(), trainops.DiffusersDecay())
    before = snapshot(other.module)
    with pytest.raises(ValueError, match=r"how many updates there were: load_state_dict\(state_dict, step=n\)"):
        other.load_state_dict(write(ema))
    assert same_tensors(other.module, before)
    other.load_state_dict(write(ema), step=1000)
    assert same_tensors(other.module, ema.module)
    assert other.step == 1000
    other.load_state_dict(write(ema))  # it goes on from its own count
    assert other.step == 1000


def test_wrapped_models_read_what_others_have_written():
    ema = moved(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    wrapped = trainops.EMA(torch.compile(copy.deepcopy(ema.model), backend="eager"), 0.9)
    wrapped.load_state_dict(ema.state_dict())
    ours, theirs = (list(tensors_of(x.module).values()) for x in (ema, wrapped))
    assert all(same_bits(x, y) for x, y in zip(ours, theirs, strict=True))
    ema.load_state_dict(wrapped.state_dict())


class Root(nn.Module):
    """A model with a child that is called as DDP calls its own."""

    def __init__(self):
        super().__init__()
        self.module, self.linear = nn.Linear(2, 2), nn.Linear(2, 2)


class Ambiguous(Root):
    """Without their wrappers, two keys of its state are one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("make", [Root, Ambiguous])
def test_a_child_called_module_is_no_wrapper(make):
    ema = moved(make())
    other = trainops.EMA(make())
    other.load_state_dict(ema.state_dict())
    assert same_tensors(other.module, ema.module)
    other.load_state_dict(ema.module.state_dict())
    assert same_tensors(other.module, ema.module)


def test_tied_weights_are_one_in_a_list():
    ema = moved(Tied())
    other = trainops.EMA(Tied())
    other.load_state_dict(ema.state_dict(form="diffusers"))
    assert len(other.shadow_params) == 2
    assert all(map(same_bits, other.shadow_params, ema.shadow_params))


class Renamed(nn.Linear):
    """A module that reads its older states by its version, as PyTorch's own do."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        self.seen_version = local_metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@over("write", {name: KEPT[name] for name in ("ours", "torch", "as_torchs")} | {"as_timms": UNCOUNTED["as_timms"]})
def test_versions_of_modules_are_kept(write):
    ema, other = (trainops.EMA(nn.Sequential(Renamed(3, 2))) for _ in range(2))
    other.load_state_dict(write(ema))
    assert other.module[0].seen_version == 2


def test_torchs_class_loads_what_is_written_for_it():
    ema = moved(make_net())
    average = swa_utils.AveragedModel(make_net())
    average.load_state_dict(ema.state_dict(form="torch"))
    assert same_tensors(average.module, ema.module)
    assert average.n_averaged == 3


NOT_AVERAGES = {
    "list": ([1], TypeError, "state_dict must be a dictionary, got list"),
    "empty": ({}, ValueError, "not a state_dict of trainops.EMA: keys 'module' and 'step' are missing"),
    "training": (
        {"epoch": 3, "state_dict": {"w": torch.ones(1)}, "state_dict_ema": {"w": torch.ones(1)}, "args": None},
        ValueError,
        r"nor of torch's AveragedModel, .*: it has \['epoch', 'state_dict', 'state_dict_ema', 'args'\]. Load "
        r"what lies under one of them, such as state_dict\['state_dict_ema'\]$",
    ),
    "optimizer": (
        trainops.AdamW(nn.Linear(2, 2).parameters()).state_dict(),
        ValueError,
        r"it has \['state', 'param_groups'\]$",
    ),
    "numbers": ({3: 4}, ValueError, r"it has \[3\]$"),
    "numbered": ({3: torch.ones(2)}, ValueError, r"it has \[3\]$"),
    "fraction": ({"module": {}, "step": 1.5}, ValueError, "step must be a number of updates, got 1.5"),
    "negative": ({"module": {}, "step": -1}, ValueError, "step must be a number of updates, got -1"),
    "bool": ({"module": {}, "step": True}, ValueError, "step must be a number of updates, got True"),
    "short": (
        {"shadow_params": [torch.ones(2, 2)], "optimization_step": 3},
        ValueError,
        "has 1 tensors, the average 2",
    ),
    "no_list": ({"shadow_params": None, "optimization_step": 3}, ValueError, "has None tensors, the average 2"),
    "uncounted": (
        {"shadow_params": [torch.ones(2, 2), torch.ones(2)]},
        ValueError,
        "optimization_step must be a number",
    ),
    "shape": (
        {"weight": torch.ones(2, 3), "bias": torch.ones(2)},
        ValueError,
        r"weight has shape \(2, 3\), expected",
    ),
}


@over(("state", "error", "message"), NOT_AVERAGES)
def test_what_is_no_average_is_named(state, error, message):
    ema = trainops.EMA(nn.Linear(2, 2))
    before = snapshot(ema.module)
    with pytest.raises(error, match=message):
        ema.load_state_dict(state)
    assert same_tensors(ema.module, before)
    assert ema.step == 0


def test_a_long_mismatch_is_told_in_short():
    ema, other = (trainops.EMA(nn.Sequential(*(nn.Linear(2, 2) for _ in range(n)))) for n in (2, 40))
    with pytest.raises(ValueError, match=r"unexpected \['10.bias', .*, and 72 more\]") as caught:
        ema.load_state_dict(other.state_dict())
    assert len(str(caught.value)) < 200


def test_forms_are_named():
    with pytest.raises(ValueError, match="form must be None or one of 'torch', 'timm', 'diffusers', got 'keras'"):
        trainops.EMA(nn.Linear(2, 2)).state_dict(form="keras")
