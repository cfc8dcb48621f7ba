"""Models with awkward tensors beside timm's ModelEmaV3: what its average does with them, ours does."""

import copy
import warnings

import pytest
import torch
from awkward import KINDS
from targets import over
from torch import nn

import trainops

utils = pytest.importorskip("timm.utils")

UPDATES = 200
# What timm's class makes no average of, or raises at its second update.
NOT_TIMMS = {"sparse", "sparse_changes", "csr", "float8", "float8_changes", "quantised_buffer", "nested", "expanded"}
NOT_TIMMS |= {"expanded_integers", "integers_grow", "integers_grow_in_place", "extra_bytes", "extra_none"}
NOT_TIMMS |= {"old_weight_norm", "old_spectral_norm", "pruned", "frozen_quantised", "frozen_float8"}
FOLLOWED = {"none_first", "none_later", "comes", "goes"}  # timm's has the buffers that there were


@torch.no_grad()
def train(model, generator):
    for p in model.parameters():
        if p.is_floating_point() and p.requires_grad:
            p.add_(torch.randn(p.shape, generator=generator))


def follow(kind, make_ours):
    """Both averages of a model after the updates, and their model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build, change = KINDS[kind]
        model = build()
        average = trainops.EMA(model, 0.9) if make_ours else utils.ModelEmaV3(model, 0.9)
        generator = torch.Generator().manual_seed(1)
        for step in range(1, UPDATES + 1):
            train(model, generator)
            if step == 2:
                change(model)
            average.update(model, step)
    return average, model


@over("kind", {kind: kind for kind in KINDS})
def test_what_timms_can(kind):
    torch.manual_seed(0)
    ours, model = follow(kind, True)
    if kind in NOT_TIMMS:
        with pytest.raises((RuntimeError, AttributeError)):
            follow(kind, False)
        return
    torch.manual_seed(0)
    theirs = follow(kind, False)[0]
    expected, got = theirs.module.state_dict(), ours.module.state_dict()
    if kind not in FOLLOWED:
        assert got.keys() == expected.keys()
    assert {name for name in got if name != "x"} >= {name for name in expected if name != "x"}
    for name, x in expected.items():
        if name in got and not (kind in FOLLOWED and name == "x"):
            torch.testing.assert_close(got[name], x)
    buffers = [dict(module.named_buffers()).keys() for module in (ours.module, model)]
    assert buffers[0] == buffers[1]


def test_adapters():
    """Those that train have timm's averages; of the others, timm keeps a second copy."""
    model = nn.Sequential(nn.Linear(32, 32).requires_grad_(False), nn.Linear(32, 4), nn.BatchNorm1d(4))
    twin = copy.deepcopy(model)
    ours, theirs = trainops.EMA(model, 0.9, trainable_only=True), utils.ModelEmaV3(twin, 0.9)
    for step in range(1, UPDATES + 1):
        for each, average in ((model, ours), (twin, theirs)):
            generator = torch.Generator().manual_seed(step)
            train(each, generator)
            each(torch.randn(8, 32, generator=generator))
            average.update(each, step)
    for name, x in theirs.module.state_dict().items():
        torch.testing.assert_close(ours.module.state_dict()[name], x)
    assert ours.module[0].weight is model[0].weight
