"""A guard against spikes: what it skips, what it learns, and what survives a checkpoint."""

import copy
import io
import math

import pytest
import torch
from process_groups import assert_same_on_all_ranks, forks, on_ranks
from targets import interpreted, over
from torch import nn

import trainops
from trainops import SpikeGuard, core
from trainops.adapters import _control
from trainops.spike_guard import GUARD, LEARNED

RULES = {"adamw": trainops.AdamW, "adam": trainops.Adam, "sgd": trainops.SGD}


class Expected:
    """The guard as it is documented, with Python's numbers."""

    def __init__(self, guard):
        self.guard, self.mean, self.variance, self.count, self.row = guard, 0.0, 0.0, 0, 0

    def skips(self, norm):
        guard = self.guard
        if not math.isfinite(norm):
            return True
        d = math.log(norm) - self.mean if norm > 0 else 0.0
        spike = guard.max_norm is not None and norm > guard.max_norm
        if norm > 0 and guard.deviations is not None and self.count >= guard.warmup:
            spike |= d > guard.deviations * max(math.sqrt(self.variance), 0.05)
        if norm <= 0:
            return spike
        if spike:
            self.row += 1
            if self.row == guard.patience:
                self.mean, self.variance, self.count, self.row = 0.0, 0.0, 0, 0
            return True
        rate = max(1 - guard.decay, 1 / (self.count + 1))
        self.mean += rate * d
        self.variance = (1 - rate) * (self.variance + rate * d * d)
        self.count, self.row = self.count + 1, 0
        return False


NORMS = {
    "spikes": [1.0, 1.1, 0.9, 1.2, 50.0, 1.0, 0.1, 1.3, math.nan, 1.1, 2.0, math.inf, 0.0, 1.05, 1.3],
    "rises_for_good": [1.0, 1.1, 0.9, 1.0, *[40.0, 41.0, 39.0, 40.0, 42.0, 38.0, 40.5, 400.0, 40.0]],
    "falls": [100.0 * 0.7**i for i in range(12)],
    "spikes_in_a_row_that_end": [1.0, 1.1, 0.9, 30.0, 30.0, 1.0, 30.0, 30.0, 1.1, 30.0],
}
GUARDS = {
    "deviations": SpikeGuard(3.0, decay=0.8, warmup=3, patience=3),
    "largest": SpikeGuard(None, max_norm=35.0, patience=2),
    "both": SpikeGuard(4.0, max_norm=45.0, decay=0.5, warmup=2, patience=2),
}


def give_grads(params, norm):
    for p in params:
        p.grad = torch.full_like(p, norm / math.sqrt(sum(x.numel() for x in params)))


def numbers(optimizer):
    return optimizer.param_groups[0]["trainops"]["spike_guard"]


@over("norms", NORMS)
@over("guard", GUARDS)
@interpreted(lambda norms, guard, **_: guard is GUARDS["both"])
def test_skips_and_learns_as_documented(target, norms, guard):
    params = [nn.Parameter(torch.ones(shape, device=target.device)) for shape in ((3, 7), (70,))]
    optimizer = trainops.SGD(params, lr=1e-3, spike_guard=guard, backend=target.backend)
    expected, skipped = Expected(guard), 0
    for norm in norms:
        before = [p.detach().clone() for p in params]
        give_grads(params, norm)
        optimizer.step()
        skips = expected.skips(norm)
        skipped += skips
        assert optimizer.skipped_steps == skipped
        unchanged = [torch.equal(p, old) for p, old in zip(params, before, strict=True)]
        assert all(unchanged) if skips or norm == 0 else not any(unchanged)
        learned = torch.tensor([expected.mean, expected.variance, expected.count, expected.row])
        torch.testing.assert_close(numbers(optimizer)[:LEARNED].cpu(), learned.double(), rtol=1e-5, atol=1e-6)


def learned_by(optimizer):
    return numbers(optimizer)[:LEARNED].clone()


def batches(poisoned):
    generator = torch.Generator().manual_seed(0)
    for i in range(60):
        x = torch.randn(16, 5, generator=generator)
        y = x.sum(1, keepdim=True) + 0.1 * torch.randn(16, 1, generator=generator)
        if i == 40:
            if poisoned is None:
                continue
            y = y * poisoned
        yield x, y


def trained(rule, target, poisoned, **options):
    torch.manual_seed(3)
    model = nn.Linear(5, 1).to(target.device)
    lr = 0.05
    optimizer = rule(model.parameters(), lr=lr, backend=target.backend, **options)
    for x, y in batches(poisoned):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x.to(target.device)), y.to(target.device)).backward()
        optimizer.step()
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(9)).to(target.device)
    return model, optimizer, nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).item()


@over("rule", RULES)
@interpreted(lambda rule, **_: rule is trainops.AdamW)
def test_one_poisoned_batch_does_nothing(target, rule):
    momentum = {"momentum": 0.9} if rule is trainops.SGD else {}
    guard = SpikeGuard(6.0, warmup=20)
    ruined = trained(rule, target, 1e6, **momentum)[2]
    model, optimizer, guarded = trained(rule, target, 1e6, spike_guard=guard, **momentum)
    without, _, clean = trained(rule, target, None, spike_guard=guard, **momentum)
    assert optimizer.skipped_steps == 1
    for p, q in zip(model.parameters(), without.parameters(), strict=True):
        assert torch.equal(p, q)
    assert guarded == clean < 1.0
    assert ruined > 10 * guarded


def test_a_float_is_a_number_of_deviations():
    optimizer = trainops.AdamW([nn.Parameter(torch.ones(2))], spike_guard=5)
    assert optimizer.spike_guard == SpikeGuard(5.0)
    assert "spike_guard: SpikeGuard(deviations=5.0" in repr(optimizer)
    optimizer.spike_guard = None
    assert optimizer.spike_guard is None


def test_settings_may_change_between_steps(target):
    p = nn.Parameter(torch.ones(4, device=target.device))
    optimizer = trainops.SGD([p], spike_guard=SpikeGuard(None, max_norm=10.0), backend=target.backend)
    held = numbers(optimizer)
    give_grads([p], 5.0)
    optimizer.step()
    optimizer.spike_guard = SpikeGuard(None, max_norm=1.0)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert numbers(optimizer) is held
    assert held[2] == 1


def test_the_norm_is_that_of_unscaled_gradients(target):
    p = nn.Parameter(torch.ones(4, device=target.device))
    optimizer = trainops.SGD([p], spike_guard=SpikeGuard(None, max_norm=2.0), backend=target.backend)
    optimizer.grad_scale = torch.tensor(1024.0, device=target.device)
    for norm, found_inf, count, skipped in ((1.0, 0.0, 1, 0), (1.0, 1.0, 1, 1), (3.0, 0.0, 1, 2), (1.0, 0.0, 2, 2)):
        optimizer.found_inf = torch.tensor(found_inf, device=target.device)
        give_grads([p], 1024 * norm)
        optimizer.step()
        assert (numbers(optimizer)[2], optimizer.skipped_steps) == (count, skipped)


def test_a_norm_that_is_given(target):
    p = nn.Parameter(torch.ones(4, device=target.device))
    optimizer = trainops.SGD([p], spike_guard=SpikeGuard(None, max_norm=2.0), backend=target.backend)
    give_grads([p], 1.0)
    for norm, skipped in ((1.5, 0), (2.5, 1), (math.nan, 2)):
        optimizer.step(total_norm=torch.tensor(norm, device=target.device))
        assert optimizer.skipped_steps == skipped
    torch.testing.assert_close(numbers(optimizer)[0].item(), math.log(1.5))


def state_dict_of(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


HOW = {"state_dict": state_dict_of, "saved": saved}


def seen(optimizer, params, norms):
    for norm in norms:
        give_grads(params, norm)
        optimizer.step()


@over("how", HOW)
def test_resumes(target, how):
    guard = SpikeGuard(3.0, warmup=3, decay=0.8)
    runs = []
    for _ in range(2):
        params = [nn.Parameter(torch.ones(5, device=target.device))]
        runs.append((trainops.AdamW(params, spike_guard=guard, backend=target.backend), params))
    (one, its), (other, others) = runs
    seen(one, its, [1.0, 1.2, 0.8, 1.1, 90.0])
    others[0].data.copy_(its[0])
    held = numbers(other)
    other.load_state_dict(how(one))
    assert numbers(other) is held, "captured steps know its address"
    assert numbers(one) is not held
    assert torch.equal(learned_by(other), learned_by(one))
    for optimizer, params in runs:
        seen(optimizer, params, [80.0, 1.3, 100.0])
    assert torch.equal(learned_by(one), learned_by(other))
    assert torch.equal(its[0], others[0])
    assert (one.skipped_steps, other.skipped_steps) == (3, 2)


def test_states_of_others_and_without_a_guard():
    p = nn.Parameter(torch.ones(5))
    guarded, plain = trainops.AdamW([p], spike_guard=4.0), trainops.AdamW([p])
    torchs = torch.optim.AdamW([p])
    seen(guarded, [p], [1.0, 1.1])
    learned = learned_by(guarded)
    assert learned.any()
    for optimizer in (torchs, plain):
        optimizer.load_state_dict(guarded.state_dict())
        optimizer.step()
    for state in (
        torchs.state_dict(),
        plain.state_dict(),
    ):  # of another point, whose norms nobody knows: it begins anew
        with_guard = copy.deepcopy(guarded)
        held = numbers(with_guard)
        with_guard.load_state_dict(
            {
                **state,
                "param_groups": [{k: v for k, v in g.items() if k != "trainops"} for g in state["param_groups"]],
            }
        )
        assert numbers(with_guard) is held, "captured steps know its address"
        assert not learned_by(with_guard).any()
    broken = guarded.state_dict()
    broken["param_groups"][0] = {**broken["param_groups"][0], "trainops": {"spike_guard": torch.zeros(3)}}
    with pytest.raises(ValueError, match="is 10 numbers"):
        guarded.load_state_dict(broken)
    broken["param_groups"][0]["trainops"]["spike_guard"] = torch.full((10,), torch.nan)
    with pytest.raises(ValueError, match="has a NaN"):
        guarded.load_state_dict(broken)
    assert torch.equal(learned_by(guarded), learned)
    twin = copy.deepcopy(guarded)
    assert twin.spike_guard == guarded.spike_guard
    seen(twin, [twin.param_groups[0]["params"][0]], [1.0])
    assert numbers(twin)[2] == 3
    assert numbers(guarded)[2] == 2


def test_distributed_checkpoints_carry_it(tmp_path):
    pytest.importorskip("torch.distributed.checkpoint.state_dict")
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    one, other = (trainops.AdamW(m.parameters(), spike_guard=SpikeGuard(3.0, warmup=2)) for m in models)
    seen(one, list(models[0].parameters()), [1.0, 1.1, 0.9])
    seen(other, list(models[1].parameters()), [5.0])
    set_optimizer_state_dict(models[1], other, get_optimizer_state_dict(models[0], one))
    assert torch.equal(learned_by(one), learned_by(other))


def guarded_ranks(rank, backend):
    p = nn.Parameter(torch.ones(4))
    guard = SpikeGuard(4.0, warmup=2, max_norm=100.0)
    optimizer = trainops.SGD([p], lr=0.1, norm_group="world", spike_guard=guard, backend=backend)
    for i, norm in enumerate([1.0, 1.1, 0.9, 1.0]):
        give_grads([p], 500.0 if rank == 1 and i == 2 else norm)
        if i == 3 and rank == 0:
            p.grad = None
        optimizer.step()
        assert_same_on_all_ranks(numbers(optimizer))
        assert_same_on_all_ranks(optimizer.skipped_steps)
    assert optimizer.skipped_steps == 1


@forks
@pytest.mark.parametrize("backend", ["reference", "foreach", "cpu"])
def test_all_ranks_decide_alike(tmp_path, backend):
    if not trainops.backends()[backend].available:
        pytest.skip(f"no {backend}")
    on_ranks(2, tmp_path, guarded_ranks, backend)


def test_a_step_without_gradients(target):
    p = nn.Parameter(torch.ones(4, device=target.device))
    optimizer = trainops.SGD([p], spike_guard=3.0, backend=target.backend)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert numbers(optimizer)[2] == 0


BAD = {
    "text": ("yes", TypeError, "spike_guard must be a number"),
    "flag": (True, TypeError, "spike_guard must be a number"),
    "negative": (-1.0, ValueError, "deviations of a SpikeGuard is out of range"),
    "nan": (math.nan, ValueError, "deviations of a SpikeGuard is out of range"),
}


@over("case", BAD)
def test_bad_guards(case):
    value, error, message = case
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=message):
        trainops.AdamW([p], spike_guard=value)
    optimizer = trainops.AdamW([p], spike_guard=4.0)
    with pytest.raises(error, match=message):
        optimizer.spike_guard = value
    assert optimizer.spike_guard == SpikeGuard(4.0)


def test_bad_settings():
    for settings, error in (
        ({"decay": 1.0}, ValueError),
        ({"warmup": 1}, ValueError),
        ({"warmup": 2.5}, TypeError),
        ({"patience": 0}, ValueError),
        ({"max_norm": "1"}, TypeError),
        ({"deviations": None}, ValueError),
    ):
        with pytest.raises(error):
            SpikeGuard(**settings)
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="is a setting of the optimizer"):
        trainops.AdamW([{"params": [p], "spike_guard": 3.0}])


@pytest.mark.skipif(not core.available, reason="no compiled core")
def test_the_order_of_numbers_is_that_of_the_kernels():
    assert list(GUARD) == core.GUARD
    assert core.LEAST_DEVIATION == _control.LEAST_DEVIATION
