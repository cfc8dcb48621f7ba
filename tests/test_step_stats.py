"""Statistics of a step: what is measured, when, and that it changes nothing."""

import copy
import math
import pickle

import pytest
import torch
from contract import DTYPES
from process_groups import forks, on_ranks
from targets import interpreted, over
from torch import nn

import trainops
from trainops import tensor_stats

RULES = {"adamw": trainops.AdamW, "sgd": trainops.SGD}


def parameters(target, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    shapes = [(5, 3), (0,), (33,), (2, 2)]
    return [nn.Parameter(torch.randn(x, generator=generator).to(target.device, dtype)) for x in shapes]


def give_grads(params, seed=0, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (factor * torch.randn(p.shape, generator=generator)).to(p)


def assert_same(ours, tensors, **tolerances):
    expected = tensor_stats([x.double() for x in tensors], backend="reference")
    torch.testing.assert_close(ours.rows.double().cpu(), expected.rows.cpu(), **tolerances)


@over("rule", RULES)
@interpreted(lambda rule, dtype, **_: rule is trainops.AdamW and dtype == torch.bfloat16)
def test_what_is_collected(target, rule, dtype):
    params, twins = parameters(target, dtype), parameters(target, dtype)
    options = {"lr": 0.1, "max_grad_norm": 0.5, "backend": target.backend}
    optimizer, plain = rule(params, stats="norms", **options), rule(twins, **options)
    for seed in range(3):
        give_grads(params, seed)
        give_grads(twins, seed)
        before = [p.detach().to(torch.float64, copy=True) for p in params]
        optimizer.step()
        plain.step()
        stats = optimizer.stats
        assert (stats.step, stats.params) == (seed + 1, (0, 1, 2, 3))
        assert_same(stats.grads, [p.grad for p in params], rtol=1e-5, atol=1e-6)
        assert_same(stats.weights, before, rtol=1e-5, atol=1e-6)
        updates = [p.detach().double() - old for p, old in zip(params, before, strict=True)]
        assert_same(stats.updates, updates, rtol=1e-5, atol=1e-6)
        for p, q in zip(params, twins, strict=True):
            assert torch.equal(p, q), "statistics change nothing"
            assert torch.equal(p.grad, q.grad)
    ratio = updates[2].norm() / before[2].norm()
    torch.testing.assert_close(stats.update_ratios[2].double().cpu(), ratio.cpu(), rtol=1e-5, atol=0)
    assert stats.lost_updates is None
    assert stats.grads.histogram is None


def test_every_so_many_steps_and_resuming(target):
    params = parameters(target)
    optimizer = trainops.AdamW(params, stats="norms", stats_every=3, backend=target.backend)
    give_grads(params)
    assert optimizer.stats is None
    seen = []
    for _ in range(7):
        optimizer.step()
        seen.append(None if optimizer.stats is None else optimizer.stats.step)
    assert seen == [None, None, 3, 3, 3, 6, 6]
    others = parameters(target)
    resumed = trainops.AdamW(others, stats="norms", stats_every=3, backend=target.backend)
    state = optimizer.state_dict()
    resumed.load_state_dict(copy.deepcopy(state))
    give_grads(others)
    for expected in (None, 9):
        resumed.step()
        assert expected == (resumed.stats and resumed.stats.step)
    optimizer.step()
    assert state["param_groups"][0]["trainops"]["stats_step"] == 7, "a state that was taken stays as it is"
    torch.optim.AdamW(parameters(target)).load_state_dict(state)
    assert pickle.loads(pickle.dumps(resumed)).stats.step == 9


def test_between_collections_nothing_is_measured(monkeypatch):
    params = [nn.Parameter(torch.ones(3))]
    optimizer = trainops.AdamW(params, stats="norms", stats_every=2)
    give_grads(params)
    calls = []
    measured = trainops.step_stats.tensor_stats
    monkeypatch.setattr(trainops.step_stats, "tensor_stats", lambda *a, **k: calls.append(1) or measured(*a, **k))
    monkeypatch.setattr(optimizer, "float32_weight", lambda p: calls.append(2) or p)
    optimizer.step()
    assert not calls
    optimizer.step()
    assert calls.count(1) == 3


def test_full_has_histograms_and_lost_updates(target):
    params = parameters(target, torch.bfloat16)
    optimizer = trainops.AdamW(params, lr=1e-4, stats="full", max_grad_norm=0.1, backend=target.backend)
    give_grads(params)
    lost = optimizer.lost_updates()
    optimizer.step()
    assert torch.equal(optimizer.stats.lost_updates, lost)
    assert lost.max() > 0.5
    for part in (optimizer.stats.grads, optimizer.stats.weights, optimizer.stats.updates):
        counted = part.histogram.sum(1)
        assert torch.equal(counted, part.numel - part.zeros - part.nonfinite)
    assert optimizer.stats.to_dict()["update/lost/2"] == lost[2].item()


@over("scale", {"unscaled": None, "scaled": 64.0})
def test_lost_updates_are_those_of_the_norm_that_the_step_was_given(target, scale):
    """A large one clips to next to nothing, all of which is lost."""
    lost = []
    for given in (None, 1e7):
        params = parameters(target, torch.bfloat16)
        optimizer = trainops.SGD(params, lr=1.0, stats="full", max_grad_norm=1.0, backend=target.backend)
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale, device=target.device)
            optimizer.found_inf = torch.tensor(0.0, device=target.device)
        give_grads(params, factor=scale or 1.0)
        optimizer.step(total_norm=given)
        lost.append(optimizer.stats.lost_updates)
    assert lost[0].max() < 0.5
    assert lost[1].tolist() == [1.0, 0.0, 1.0, 1.0]  # the second one has no elements


@over("scale", {"power_of_2": 1024.0, "other": 1000.0})
def test_scaled_gradients(target, scale):
    params = parameters(target)
    optimizer = trainops.SGD(params, lr=0.1, skip_nonfinite=True, stats="full", backend=target.backend)
    optimizer.grad_scale = torch.tensor(scale, device=target.device)
    optimizer.found_inf = torch.tensor(0.0, device=target.device)
    give_grads(params, factor=scale)
    optimizer.step()
    unscaled = [p.grad.double() / scale for p in params]
    assert_same(optimizer.stats.grads, unscaled, rtol=1e-5, atol=1e-6)
    if scale == 1024.0:
        expected = tensor_stats(unscaled, True, backend="reference").histogram
        assert torch.equal(optimizer.stats.grads.histogram, expected)


def test_a_skipped_step_updates_nothing(target):
    params = parameters(target)
    optimizer = trainops.AdamW(params, skip_nonfinite=True, stats="norms", backend=target.backend)
    give_grads(params)
    params[2].grad[4] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.stats.updates.zeros.tolist() == [x.numel() for x in params]
    assert optimizer.stats.grads.nonfinite.tolist() == [0, 0, 1, 0]


def test_groups_and_missing_gradients(target):
    params = parameters(target)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    optimizer = trainops.SGD(groups, lr=0.1, stats="norms", backend=target.backend)
    give_grads(params)
    params[1].grad = None
    optimizer.step()
    stats = optimizer.stats
    assert stats.params == (0, 2, 3)
    assert_same(stats.grads, [params[i].grad for i in stats.params], rtol=1e-5, atol=1e-6)
    found = stats.to_dict(["a", "b", "c", "d"])
    assert "grad/l2_norm/c" in found
    assert "update/ratio/d" in found
    assert not any(key.endswith("/b") for key in found)
    with pytest.raises(ValueError, match="there are 3 names, but parameter 3 was measured"):
        stats.to_dict(["a", "b", "c"])
    for p in params:
        p.grad = None
    optimizer.step()
    assert optimizer.stats.params == ()
    assert optimizer.stats.to_dict() == {}


@over("master", {"split": "split", "float32": "float32"})
def test_masters_count_in_full(target, master):
    params = [nn.Parameter(torch.ones(40, dtype=torch.bfloat16, device=target.device))]
    optimizer = trainops.AdamW(params, lr=1e-5, master=master, stats="norms", backend=target.backend)
    give_grads(params)
    optimizer.step()
    torch.testing.assert_close(optimizer.stats.updates.amax[0].item(), 1e-5 + 1e-7, rtol=0.02, atol=0)


def sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(1)
    weights, grads = ([torch.randn(7, 3), torch.randn(9)] for _ in range(2))
    params = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in weights]
    wholes = [nn.Parameter(x.clone()) for x in weights]
    runs = [(params, [distribute_tensor(x, mesh, [Shard(0)]) for x in grads]), (wholes, grads)]
    found = []
    for its, own_grads in runs:
        optimizer = trainops.AdamW(its, lr=0.1, max_grad_norm=1.0, stats="norms")
        for p, g in zip(its, own_grads, strict=True):
            p.grad = g
        optimizer.step()
        found.append(optimizer.stats)
    for part in ("grads", "weights", "updates"):
        torch.testing.assert_close(getattr(found[0], part).rows, getattr(found[1], part).rows, rtol=1e-5, atol=1e-7)


@forks
def test_shards_are_merged(tmp_path):
    on_ranks(2, tmp_path, sharded)


def some_missing(rank, kind):
    """A parameter has a gradient on one rank alone, another one on none."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(1)
    wholes = [torch.randn(7, 3), torch.randn(9), torch.randn(5, 2)]
    params = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in wholes]
    params[0].grad = distribute_tensor(wholes[0].clone(), mesh, [Shard(0)])
    if rank == 0:
        params[1].grad = DTensor.from_local(torch.full((5,), 2.0), mesh, [Shard(0)], shape=(9,), stride=(1,))
    optimizer = trainops.AdamW(params, lr=0.1, stats="full" if kind == "stats" else None)
    monitor = trainops.Monitor(nn.ParameterList(params), optimizer) if kind == "monitor" else None
    optimizer.step()
    grads = optimizer.stats.grads if monitor is None else monitor.last().grads
    assert grads.numel.tolist() == [21, 5, 0]
    torch.testing.assert_close(grads.l2_norm[:2].tolist(), [wholes[0].norm().item(), math.sqrt(20.0)])
    if monitor is None:
        assert optimizer.stats.lost_updates.shape == (3,)
    else:
        assert not [finding for finding in monitor.findings() if finding.name.startswith("2")]


@forks
@pytest.mark.parametrize("kind", ["stats", "monitor"])
def test_gradients_that_some_ranks_lack(tmp_path, kind):
    on_ranks(2, tmp_path, some_missing, kind)


def test_bad_input():
    params = [nn.Parameter(torch.ones(3))]
    for options, error, message in (
        ({"stats": "all"}, ValueError, "stats must be 'norms' or 'full'"),
        ({"stats": "norms", "stats_every": 0}, ValueError, "at least 1"),
        ({"stats": "norms", "stats_every": 1.5}, TypeError, "must be an integer"),
        ({"stats_every": 2}, ValueError, "of no use without stats"),
        ({"stats": "norms", "differentiable": True}, ValueError, "differentiable"),
    ):
        with pytest.raises(error, match=message):
            trainops.AdamW(params, **options)
    optimizer = trainops.SGD(params, lr=0.1, stats="norms")
    params[0].grad = torch.eye(3)[0].to_sparse()
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="no statistics of sparse gradients"):
        optimizer.step()
    assert torch.equal(params[0], before)
    params[0].grad = torch.ones(3)
    for name, value in (("stats_every", 0), ("collects", "all")):
        optimizer = trainops.SGD(params, lr=0.1, stats="norms")
        setattr(optimizer, name, value)
        with pytest.raises(ValueError, match="stats"):
            optimizer.step()
        assert torch.equal(params[0], before)
    assert len(DTYPES) >= 4
