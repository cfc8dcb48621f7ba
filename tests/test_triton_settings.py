"""What a step of the Triton backend is told: learning rates, groups, types, loss scales, and when to skip."""

import numpy as np
import pytest
import torch
from contract import exact, same_bits
from training import Model
from triton_fixtures import (
    BFLOAT16,
    BLOCK,
    CHUNK,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INF,
    NAN,
    NUMEL,
    ROLES,
    WHOLE,
    adamw,
    assert_same,
    everything,
    model_of,
    same_object,
    twin,
)

import trainops
from trainops.adapters import Group, StepControl, triton

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-element"])
@pytest.mark.parametrize("kind", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_a_learning_rate_on_the_device_stays_there(device, tables, uploads, kind, shape):
    model = model_of([(5,), (3,)], device)
    lr = torch.full(shape, 0.1, dtype=kind, device=device)
    ours, other = adamw(model, lr=lr), adamw(twin(model))
    rates = [0.1, 0.03, 0.0, 7.0]
    for rate in rates:
        lr.fill_(rate)
        ours.step()
    assert same_object(tables.rows)
    assert same_object(tables.chunks)
    assert len({len(words) for words in uploads}) == len(set(uploads)) == 1
    for rate in rates:
        other.param_groups[0]["lr"] = torch.tensor(rate, dtype=kind).item()
        other.step()
    assert len(set(uploads)) == 1 + len(rates)
    assert_same(everything(ours), everything(other))


@pytest.mark.parametrize("kind", [BFLOAT16, FLOAT16, torch.int64], ids=str)
def test_a_learning_rate_of_another_type_is_read(device, kind):
    model = model_of([(5,)], device)
    ours, other = adamw(model, lr=torch.tensor(2, dtype=kind, device=device)), adamw(twin(model), lr=2.0)
    ours.step()
    other.step()
    assert_same(everything(ours), everything(other))


GROUPS = [
    {},
    {"lr": 0.3, "weight_decay": 0.5},
    {"betas": (0.3, 0.4), "eps": 1e-3},
    {"maximize": True},
    {"amsgrad": True},
    {"lr": 0.01, "betas": (0.0, 0.0), "eps": 1e-4, "weight_decay": 0.0, "maximize": True, "amsgrad": True},
    {"betas": (0.6, 0.999)},
]


def test_groups_of_one_step_give_the_bits_of_steps_of_their_own(device, launches):
    model = model_of([(BLOCK + 3,)] * len(GROUPS), device)
    alone = twin(model)
    groups = [{"params": [p], **settings} for p, settings in zip(model.params, GROUPS, strict=True)]
    groups.insert(3, {"params": [], "lr": 99.0, "maximize": True})
    together = trainops.AdamW(groups, lr=0.1, backend="triton")
    for _ in range(2):
        together.step()
    assert launches == (["plan"] + ["update"] * 2) * 2  # with and without amsgrad
    results = []
    for p, settings in zip(alone.params, GROUPS, strict=True):
        optimizer = trainops.AdamW([p], **({"lr": 0.1, "backend": "triton"} | settings))
        for _ in range(2):
            optimizer.step()
        results.append((p, optimizer.state[p]))
    for (p, state), q in zip(results, model.params, strict=True):
        assert same_bits(p, q)
        assert state.keys() == together.state[q].keys()
        assert all(same_bits(state[name], together.state[q][name]) for name in state)


@pytest.mark.parametrize("narrow", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
def test_moments_and_averages_in_float32_of_16_bit_parameters(device, narrow):
    """The step in float32, of which the parameter alone is rounded, and the average follows that."""
    model = model_of([(NUMEL,), ()], device, narrow)
    wide = Model([p.detach().float() for p in model.params])
    ema = trainops.EMA(model, 0.9, dtype=FLOAT32, backend="triton")
    ema.step = 5
    ours, other = adamw(model, ema=ema, amsgrad=True), adamw(wide, amsgrad=True)
    averages = [x.detach().clone() for x in ema.module.params]
    for p, q in zip(model.params, wide.params, strict=True):
        q.grad = p.grad.float()
        for optimizer, param in ((ours, p), (other, q)):
            moments = {name: torch.full_like(q, 0.5) for name in ROLES[2:5]}
            optimizer.state[param] = {"step": torch.tensor(4.0, device=device), **moments}
    for _ in range(2):
        ours.step()
        other.step()
        trainops.ema_update_(averages, model.params, 0.9, backend="triton")
        assert_same([p.detach() for p in model.params], [q.detach().to(narrow) for q in wide.params])
        for p, q in zip(model.params, wide.params, strict=True):
            assert ours.state[p].keys() == other.state[q].keys()
            assert all(same_bits(ours.state[p][name], other.state[q][name]) for name in ours.state[p])
            q.data.copy_(p)
        assert_same([x.detach() for x in ema.module.params], averages)
    assert {x.dtype for x in averages} == {FLOAT32}


def test_mixed_types_give_the_bits_of_steps_of_their_own(device):
    """Norm layers in float32 in a bfloat16 model, and float64 and float16 beside them."""
    kinds = [BFLOAT16, FLOAT32, BFLOAT16, FLOAT64, FLOAT16, FLOAT32]
    model = model_of([((BLOCK + i,), kind) for i, kind in enumerate(kinds)], device)
    again = twin(model)
    ema = trainops.EMA(model, 0.5, backend="triton")
    together = adamw(model, max_grad_norm=INF, ema=ema)
    for _ in range(2):
        together.step()
    assert together.grad_norm.dtype == together.grad_norms.dtype == FLOAT64
    norms = [np.sqrt((exact(p.grad) ** 2).sum()) for p in model.params]
    np.testing.assert_allclose(together.grad_norms.cpu(), np.array(norms, float), rtol=1e-6)
    assert together.grad_norm.item() == pytest.approx(float(np.sqrt(sum(norm * norm for norm in norms))), rel=1e-6)
    for p, q, average in zip(model.params, again.params, ema.module.params, strict=True):
        alone = Model([q.detach()])
        alone.params[0].grad = q.grad
        own = adamw(alone, ema=trainops.EMA(alone, 0.5, backend="triton"))
        for _ in range(2):
            own.step()
        states = [x for _, x in sorted(together.state[p].items())]
        assert_same([p.detach(), *states, average.detach()], everything(own))


@pytest.mark.parametrize(("kind", "average"), [(FLOAT32, FLOAT64), (FLOAT64, FLOAT32), (BFLOAT16, FLOAT64)], ids=str)
def test_averages_of_another_type(device, kind, average):
    model = model_of([(BLOCK + 3,)], device, kind)
    ema = trainops.EMA(model, 0.9, dtype=average, backend="triton")
    ema.step = 5
    separate = ema.module.params[0].detach().clone()
    adamw(model, ema=ema).step()
    trainops.ema_update_([separate], [model.params[0]], 0.9, backend="triton")
    assert same_bits(ema.module.params[0].detach(), separate)
    assert separate.dtype == average
    assert not same_bits(separate, model.params[0].detach().to(average))


# Scaling and skipping


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-element"])
def test_found_inf_skips(device, shape):
    model = model_of([(5,), ()], device)
    optimizer = adamw(model, ema=trainops.EMA(model, 0.9, backend="triton"))
    optimizer.step()
    before = everything(optimizer)
    for count, found in enumerate((1.0, 2.0, NAN), start=1):
        optimizer.found_inf = torch.full(shape, found, device=device)
        optimizer.step()
        assert_same(everything(optimizer), before)
        assert optimizer.skipped_steps == count
    optimizer.found_inf = torch.zeros(shape, device=device)
    optimizer.step()
    assert optimizer.skipped_steps == 3
    assert not any(map(same_bits, everything(optimizer), before))


def test_one_bad_gradient_anywhere_skips_everything(device, launches):
    """At the ends of blocks, tails and chunks, in every type and row."""
    kinds = [FLOAT32, BFLOAT16, FLOAT64, FLOAT16]
    shapes = [((NUMEL,), FLOAT32), ((0,), FLOAT32), *(((BLOCK + 1,), kind) for kind in kinds), ((), FLOAT32)]
    model = model_of(shapes, device)
    optimizer = adamw(model, skip_nonfinite=True, amsgrad=True, ema=trainops.EMA(model, 0.9, backend="triton"))
    optimizer.step()
    before, last, count = everything(optimizer), len(shapes) - 1, 0
    places = [(0, i) for i in (0, BLOCK - 1, CHUNK - 1, CHUNK, NUMEL - 10, NUMEL - 9, NUMEL - 1)]
    places += [(row, i) for row in range(2, last) for i in (0, BLOCK)] + [(last, 0)]
    for row, i in places:
        grad = model.params[row].grad.view(-1)
        saved = grad[i].clone()
        grad[i] = (NAN, INF, -INF)[count % 3]
        optimizer.step()
        grad[i] = saved
        count += 1
        assert optimizer.skipped_steps == count, (row, i)
        assert not optimizer.grad_norm.isfinite()
    assert_same(everything(optimizer), before)
    assert {state["step"].item() for state in optimizer.state.values()} == {1.0}
    optimizer.step()
    assert optimizer.skipped_steps == count
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}
    assert launches.count("update") == 4 * (count + 2)  # it is the kernel that does not write


def test_the_first_step_may_be_skipped(device):
    model = model_of([(5,), (3,)], device)
    before = [p.detach().clone() for p in model.params]
    model.params[1].grad[2] = NAN
    optimizer = adamw(model, **WHOLE)
    optimizer.step()
    assert_same([p.detach() for p in model.params], before)
    assert all(x.count_nonzero() == 0 for state in optimizer.state.values() for x in state.values())


@pytest.mark.parametrize("skip", [False, True])
def test_known_norms(device, skip):
    """A step that is told its norm, as on several devices."""
    p, grad = torch.ones(5, device=device), torch.ones(5, device=device)
    moments = [torch.zeros(5, device=device) for _ in range(2)]
    step, skipped = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
    columns = {"param": [p], "grad": [grad], "average": [None], "step": [step]}
    columns |= {"exp_avg": moments[:1], "exp_avg_sq": moments[1:]}
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "maximize": 0.0}
    norm = torch.tensor(INF if skip else 4.0, device=device)
    control = StepControl(2.0, True, total_norm=norm, skipped_steps=skipped)
    result = triton.update("adamw", [Group(settings, 1, columns)], control, [0.0])
    assert result.total_norm is norm
    assert result.norms is None
    assert result.skipped == skipped == step.new_tensor(skip)
    torch.testing.assert_close(moments[0], torch.full_like(p, 0.0 if skip else 0.1 * 0.5))
    assert step == 1 - skip
