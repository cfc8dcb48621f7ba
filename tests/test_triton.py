"""The Triton kernels and their launcher: launches, tables, and what must not change a bit.

Where there is no GPU, Triton's interpreter runs them; its time goes with the number of operations, so tensors are
small here, and blocks smaller still.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from contract import assert_contract, exact, same_bits

import trainops
from trainops import device_table
from trainops.backends import AdamWGroup, StepControl, triton

pytestmark = pytest.mark.skipif(not triton.probe().available, reason=f"backend triton: {triton.probe().reason}")

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")
BLOCK, CHUNK = 64, 256  # under the interpreter, unless a test chooses others
NUMEL = CHUNK + BLOCK + 9  # two chunks; in the second, a whole block and a tail


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Each device that the backend serves here."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not triton.serves(request.param):
        pytest.skip(f"the interpreter is {'off' if request.param == 'cpu' else 'on'}")
    return torch.device(request.param, torch.cuda.current_device() if request.param == "cuda" else None)


@pytest.fixture
def divide(monkeypatch):
    """Chooses the elements per block and per chunk."""

    def choose(block, chunk):
        monkeypatch.setattr(triton._kernels()._common, "block_numel", lambda *_: block)
        monkeypatch.setattr(triton._kernels()._common, "CHUNK", chunk)

    return choose


@pytest.fixture(autouse=True)
def _small_blocks(divide):
    if triton.serves("cpu"):
        divide(BLOCK, CHUNK)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that were launched."""
    names, launch = [], triton._launch

    def record(kernel, *args, **kwargs):
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(triton, "_launch", record)
    return names


@pytest.fixture
def tables(monkeypatch):
    """The layouts of tables that were made."""
    made = []

    class Recorded(device_table.Layout):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(device_table, "Layout", Recorded)
    monkeypatch.setattr(device_table, "_layouts", device_table.Recent(32))
    return made


@pytest.fixture
def uploads(monkeypatch):
    """The settings that were uploaded."""
    words, upload = [], triton.uploaded

    def record(content, device):
        words.append(content)
        return upload(content, device)

    monkeypatch.setattr(triton, "uploaded", record)
    return words


class Model(torch.nn.Module):
    """Parameters and nothing else."""

    def __init__(self, tensors):
        super().__init__()
        self.params = torch.nn.ParameterList(torch.nn.Parameter(x) for x in tensors)


def model_of(sizes, device, dtype=FLOAT32):
    """Random parameters with random gradients; the sizes may be pairs of a shape and a dtype."""
    pairs = [size if size and isinstance(size[-1], torch.dtype) else (size, dtype) for size in sizes]
    model = Model([torch.randn(shape).to(device, kind) for shape, kind in pairs])
    for p, (shape, kind) in zip(model.params, pairs, strict=True):
        p.grad = torch.randn(shape).to(device, kind)
    return model


def twin(model):
    """The same parameters and gradients elsewhere."""
    copy = Model([p.detach().clone() for p in model.params])
    for p, q in zip(copy.params, model.params, strict=True):
        p.grad = q.grad.clone()
    return copy


def adamw(model, **options):
    return trainops.AdamW(model.parameters(), **({"lr": 0.1, "backend": "triton"} | options))


def everything(optimizer):
    """All that a step writes."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [x for p in params for _, x in sorted(optimizer.state[p].items())]
    averages = [] if optimizer.ema is None else list(optimizer.ema.module.params)
    return [x.detach().clone() for x in (*params, *states, *averages)]


def assert_same(ours, others):
    for i, (x, y) in enumerate(zip(ours, others, strict=True)):
        assert same_bits(x, y), i


# Launches

WHOLE = {"max_grad_norm": 1.0, "skip_nonfinite": True}


@pytest.mark.parametrize("count", [1, 2, 20])
def test_a_whole_step_is_three_launches(device, launches, count):
    model = model_of([(i % 3,) for i in range(count)], device)
    ema = trainops.EMA(model, 0.9, backend="triton")
    optimizer = adamw(model, **WHOLE, ema=ema)
    for _ in range(2):
        optimizer.step()
    assert launches == ["partial_norms", "plan", "update"] * 2
    assert (ema.step, optimizer.skipped_steps) == (2, 0)


@pytest.mark.parametrize("options", [{}, {"found_inf": 0.0}, {"grad_scale": 2.0}, {"ema": True}])
def test_without_a_norm_a_step_is_two_launches(device, launches, options):
    model = model_of([(3,), (0,), (5,)], device)
    optimizer = adamw(model, ema=trainops.EMA(model, backend="triton") if "ema" in options else None)
    for name in options.keys() - {"ema"}:
        setattr(optimizer, name, torch.tensor(options[name], device=device))
    for _ in range(2):
        optimizer.step()
    assert launches == ["plan", "update"] * 2


def test_each_further_combination_of_types_is_two_launches_more(device, launches):
    kinds = [FLOAT32, BFLOAT16, FLOAT32, FLOAT64, BFLOAT16, FLOAT32]
    model = model_of([((3,), kind) for kind in kinds], device)
    optimizer = adamw(model, **WHOLE)
    optimizer.step()
    assert launches == ["partial_norms"] * 3 + ["plan"] + ["update"] * 3
    launches.clear()
    state = optimizer.state[model.params[1]]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].float(), state["exp_avg_sq"].float()
    optimizer.step()
    assert launches == ["partial_norms"] * 4 + ["plan"] + ["update"] * 4


def test_groups_are_no_launches_of_their_own(device, launches):
    model = model_of([(3,)] * 4, device)
    groups = [{"params": [p], "lr": 0.1 * i, "eps": 10.0**-i} for i, p in enumerate(model.params, start=1)]
    trainops.AdamW(groups, backend="triton").step()
    assert launches == ["plan", "update"]


def test_launches_of_other_functions(device, launches):
    model = model_of([(3,), (0,), (NUMEL,)], device)
    params = list(model.params)
    trainops.clip_grad_norm_(params, 0.5, backend="triton")
    trainops.clip_grad_value_(params, 0.5, backend="triton")
    trainops.ema_update_([p.detach().clone() for p in params], params, 0.5, backend="triton")
    assert launches == ["partial_norms", "finish_norms", "update_in_place", "update_in_place", "ema"]


# Bits: alignment, layout, division


ROLES = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "average")


def at_offset(x, offset):
    """A copy of ``x`` that begins so many elements into aligned memory."""
    return torch.cat((x.new_zeros(offset), x.flatten()))[offset:].view(x.shape)


def placed_step(device, dtype, numel, places):
    """A whole step on rows of the same numbers, each of whose tensors lies where ``places`` (one per row) says.

    Everything that was written, by row.
    """
    randoms = {role: torch.randn(numel).to(device, dtype) for role in ROLES}
    for role in ("exp_avg_sq", "max_exp_avg_sq"):
        randoms[role] = randoms[role].abs()
    arranged = [{role: place(randoms[role], role) for role in ROLES} for place in places]
    model = Model([row["param"] for row in arranged])
    ema = trainops.EMA(model, 0.9, backend="triton")
    ema.step = 5
    optimizer = adamw(model, amsgrad=True, **WHOLE, ema=ema)
    for p, average, row in zip(model.params, ema.module.params, arranged, strict=True):
        p.grad = row["grad"]
        average.data = row["average"]
        optimizer.state[p] = {"step": torch.tensor(3.0, device=device), **{name: row[name] for name in ROLES[2:5]}}
    optimizer.step()
    assert optimizer.skipped_steps == 0
    states = [optimizer.state[p] for p in model.params]
    return [
        [row["param"], norm, row["average"], *(state[name] for name in ("step", *ROLES[2:5]))]
        for row, norm, state in zip(arranged, optimizer.grad_norms, states, strict=True)
    ], randoms


@pytest.fixture
def tiny_blocks(divide):
    """Whole blocks in small tensors."""
    if triton.serves("cpu"):
        divide(32, 64)


@pytest.mark.usefixtures("tiny_blocks")
def test_unaligned_tensors_give_the_bits_of_aligned_ones(device, dtype):
    thorough = dtype == FLOAT32 or device.type == "cuda"  # interpreted, rows take their time
    choices = [(role, offset) for role in ROLES for offset in (range(1, 17) if thorough else (1, 8))]
    choices += [("all", offset) for offset in range(1, 17)]

    def place_at(role, offset):
        return lambda x, own: at_offset(x, offset if role in ("all", own) else 0)

    mixed = [lambda x, own, turn=turn: at_offset(x, (turn + ROLES.index(own)) % 16) for turn in range(0, 16, 5)]
    places = [lambda x, _: x.clone(), *(place_at(*choice) for choice in choices), *mixed]
    (aligned, *unaligned), randoms = placed_step(device, dtype, 32 + 5 if device.type == "cpu" else 2500, places)
    assert not any(same_bits(x, y) for x, y in zip(aligned[2:], list(randoms.values())[2:], strict=False))
    for results, choice in zip(unaligned, [*choices, *["mixed"] * 4], strict=True):
        for x, y in zip(results, aligned, strict=True):
            assert same_bits(x, y), choice


@pytest.mark.usefixtures("tiny_blocks")
def test_unaligned_tensors_give_the_same_bits_in_other_functions(device, dtype):
    numel = 32 + 5 if device.type == "cpu" else 2500
    x, y = (torch.randn(numel).to(device, dtype) for _ in range(2))
    offsets = range(17 if dtype in (FLOAT32, BFLOAT16) or device.type == "cuda" else 3)
    averages = [at_offset(x, offset) for offset in (*offsets, *[0] * len(offsets))]
    sources = [at_offset(y, offset) for offset in (*[0] * len(offsets), *offsets)]
    trainops.ema_update_(averages, sources, 0.7, backend="triton")
    assert all(same_bits(average, averages[0]) for average in averages)
    for norm_type in (1.0, 2.0, INF):
        _, norms = triton.grad_norms(sources, norm_type)
        assert all(same_bits(norm, norms[0]) for norm in norms)
    params = [torch.nn.Parameter(torch.zeros_like(source)) for source in sources]
    for p, source in zip(params, sources, strict=True):
        p.grad = source
    trainops.clip_grad_norm_(params, 1.0, backend="triton")
    assert not same_bits(sources[0], y)
    assert all(same_bits(source, sources[0]) for source in sources)
    trainops.clip_grad_value_(params, 0.01, backend="triton")
    assert sources[0].abs().max() <= torch.tensor(0.01, dtype=FLOAT64).to(dtype)
    assert all(same_bits(source, sources[0]) for source in sources)


def test_channels_last_gives_the_bits_of_contiguous(device, dtype):
    def run(arrange):
        torch.manual_seed(0)
        model = model_of([(2, 3, 5, 4), (4, 3, 1, 1)], device, dtype)
        for p in model.params:
            grad, p.grad = p.grad, None
            p.data, p.grad = arrange(p.detach()), arrange(grad)
        optimizer = adamw(model, amsgrad=True, **WHOLE, ema=trainops.EMA(model, 0.9, backend="triton"))
        for _ in range(2):
            optimizer.step()
        return [*everything(optimizer), optimizer.grad_norm, optimizer.grad_norms]

    channels_last = run(lambda x: x.contiguous(memory_format=torch.channels_last))
    same_memory = run(lambda x: x.permute(0, 2, 3, 1).contiguous())
    for x, y in zip(channels_last, same_memory, strict=True):
        assert same_bits(x.permute(0, 2, 3, 1) if x.ndim == 4 else x, y)


def test_the_same_inputs_give_the_same_bits(device, dtype):
    model = model_of([(NUMEL,), (), (0,), (3, 30)], device, dtype)
    results = []
    for _ in range(3):
        again = twin(model)
        optimizer = adamw(again, **WHOLE, ema=trainops.EMA(again, 0.9, backend="triton"))
        optimizer.step()
        results.append([*everything(optimizer), optimizer.grad_norm, optimizer.grad_norms])
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


DIVISIONS = {
    300: [(16, 64), (32, 256), (512, 512)],
    4101: [(512, 4096), (1024, 16384), (4096, 4096), (4096, 8192)],
}


@pytest.mark.parametrize("numel", DIVISIONS)
def test_the_division_into_blocks_and_chunks_changes_no_bit(device, divide, numel):
    model = model_of([(numel,), (), (0,), ((33,), BFLOAT16)], device)
    results, norms = [], []
    for division in DIVISIONS[numel]:
        divide(*division)
        again = twin(model)
        # The norm may differ in its last bits: it is measured, but never above infinity.
        ema = trainops.EMA(again, 0.9, backend="triton")
        optimizer = adamw(again, max_grad_norm=INF, skip_nonfinite=True, amsgrad=True, ema=ema)
        optimizer.grad_scale = torch.tensor(2.0, device=device)
        optimizer.step()
        trainops.clip_grad_value_(again.params, 0.5, backend="triton")
        trainops.ema_update_([p.grad for p in again.params], again.params, 0.3, backend="triton")
        results.append([*everything(optimizer), *(p.grad for p in again.params)])
        norms.append(torch.stack([optimizer.grad_norm, *optimizer.grad_norms]))
    for result, norm in zip(results, norms, strict=True):
        assert_same(result, results[0])
        torch.testing.assert_close(norm, norms[0], rtol=1e-6, atol=0)
    true = np.sqrt((exact(model.params[0].grad) ** 2).sum()) / 2
    assert norms[0][1].item() == pytest.approx(float(true), rel=1e-6)


def test_elements_beyond_32_bits(device):
    """The last chunk of a long tensor, whose memory is otherwise never touched."""
    if device.type == "cpu":
        pytest.skip("the interpreter's loops count in Python's integers, which it then takes for 32 bits")
    kernels, dtype, numel = triton._kernels(), BFLOAT16, 2**31 + 5
    x = torch.empty(numel, dtype=dtype, device=device)
    table = device_table.DeviceTable([[torch.ones(1, dtype=dtype, device=device), x]], None, 8192)
    first = (numel - 1) // 8192 * 8192
    x[first - 1 :] = 1.0
    x[first:] = 2.0
    rows, chunks = table.upload()
    shape = {"WORDS": table.row_words, "CHUNK": 8192, "BLOCK": 1024}
    types = {"DTYPE": triton._type(dtype), "WIDE": triton._type(FLOAT32)}
    partials = torch.zeros(table.chunk_count, dtype=FLOAT64, device=device)
    last = table.chunk_count - 1
    partial_norms, update_in_place = kernels.clip_grad_norm.partial_norms, kernels.clip_grad_norm.update_in_place
    triton._launch(partial_norms, 1, rows, chunks, last, partials, COLUMN=0, NORM=2, **types, **shape)
    assert partials[last] == 4.0 * (numel - first)
    assert partials[:last].count_nonzero() == 0
    three = torch.tensor(3.0, device=device)
    triton._launch(update_in_place, 1, rows, chunks, last, three, CLAMP=False, **types, **shape)
    assert (x[first:] == 6.0).all()
    assert x[first - 1] == 1.0


# Settings: learning rates on the device, groups, types


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
    assert len(tables) == 1
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
    assert launches == (["plan"] + ["update"] * 4) * 2  # with and without maximize, with and without amsgrad
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
@pytest.mark.parametrize("kind", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_a_grad_scale_is_taken_out(device, kind, shape):
    model = model_of([(NUMEL,), (), (0,)], device)
    scaled = twin(model)
    for p in scaled.params:
        p.grad *= 1024
    ours, other = adamw(scaled, max_grad_norm=0.5, skip_nonfinite=True), adamw(model, max_grad_norm=0.5)
    ours.grad_scale = torch.full(shape, 1024.0, dtype=kind, device=device)
    ours.found_inf = torch.zeros(shape, dtype=kind, device=device)
    ours.step()
    other.step()
    assert_same(everything(ours), everything(other))
    assert same_bits(ours.grad_norm, other.grad_norm)
    assert same_bits(ours.grad_norms, other.grad_norms)
    assert ours.skipped_steps == 0


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
    columns = {"params": [p], "grads": [grad], "exp_avgs": moments[:1], "exp_avg_sqs": moments[1:]}
    columns |= {"max_exp_avg_sqs": [None], "averages": [None], "steps": [step]}
    group = AdamWGroup(0.1, 0.9, 0.99, 1e-8, 0.0, False, 1, **columns)
    norm = torch.tensor(INF if skip else 4.0, device=device)
    control = StepControl(2.0, True, total_norm=norm, skipped_steps=skipped)
    result = triton.adamw_step([group], control, 0.0)
    assert result.total_norm is norm
    assert result.norms is None
    assert result.skipped == skipped == step.new_tensor(skip)
    torch.testing.assert_close(moments[0], torch.full_like(p, 0.0 if skip else 0.1 * 0.5))
    assert step == 1 - skip


# Tables are looked up


def test_equal_steps_make_no_table(device, tables, dtype):
    model = model_of([(5,), (0,), (3, 4)], device, dtype)
    optimizer = adamw(model, **WHOLE, ema=trainops.EMA(model, 0.9, backend="triton"))
    for _ in range(4):
        for p in model.params:
            p.grad.normal_()
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.step()
    assert len(tables) == 1


def test_tables_are_found_again_when_gradients_alternate(device, tables):
    model = model_of([(5,), (3, 4)], device)
    optimizer = adamw(model)
    buffers = [[p.grad for p in model.params], [torch.ones_like(p) for p in model.params]]
    for i in range(6):
        for p, grad in zip(model.params, buffers[i % 2], strict=True):
            p.grad = grad
        optimizer.step()
    assert len(tables) == 1  # which is the same for other addresses


def moved(x):
    return x.clone()


def transposed(x):
    return x.t()


def in_other_type(x):
    return x.view(BFLOAT16)


CHANGES = {f"{role} moves": ([role], moved) for role in (*ROLES, "step")}
CHANGES |= {f"{role} transposed": ([role], transposed) for role in ROLES}
CHANGES |= {
    "all transposed": (ROLES, transposed),
    "param and grad in another type": (ROLES[:2], in_other_type),
    "all in another type": (ROLES, in_other_type),
    "exp_avg in another type": (["exp_avg"], in_other_type),
    "average in another type": (["average"], in_other_type),
}


@pytest.mark.parametrize(("roles", "change"), CHANGES.values(), ids=CHANGES)
def test_changes_between_steps_are_followed(device, tables, roles, change):
    """Each to other memory, or to other strides or another type of the same memory."""
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = model_of([(3,), (4, 4)], device, FLOAT16)
        ema = trainops.EMA(model, 0.75, backend=backend)
        optimizer = adamw(model, amsgrad=True, ema=ema, backend=backend, eps=0.01)
        for _ in range(2):
            optimizer.step()
        made = len(tables)
        p, state = model.params[1], optimizer.state[model.params[1]]
        places = {"param": p, "grad": p.grad, "average": ema.module.params[1], **state}
        left = {role: places[role].detach() for role in roles}
        before = {role: x.clone() for role, x in left.items()}
        changed = {role: change(x) for role, x in left.items()}
        if "grad" in roles:
            p.grad = None
        for role, x in changed.items():
            if role in ("param", "average"):
                places[role].data = x
            elif role != "grad":
                state[role] = x
        if "grad" in roles:
            p.grad = changed["grad"]
        for role, x in changed.items():
            assert (x.data_ptr() == left[role].data_ptr()) == (change is not moved)
        optimizer.step()
        if backend == "triton" and change is not moved:
            assert len(tables) > made
        if change is moved:
            assert all(same_bits(left[role], before[role]) for role in roles)
        results.append(everything(optimizer))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.01)


def test_other_shapes_of_the_same_memory_and_strides_are_followed(device, tables):
    model = model_of([(6, 4)], device)
    (p,) = model.params
    optimizer = adamw(model)
    for _ in range(2):
        optimizer.step()
    state, grad = optimizer.state[p], p.grad
    kept = [p.detach().clone(), *(state[name].clone() for name in ROLES[2:4])]
    p.grad = None
    p.data, p.grad = p.data[:2], grad[:2]
    for name in ROLES[2:4]:
        state[name] = state[name][:2]
    made = len(tables)
    optimizer.step()
    assert len(tables) > made
    for x, before in zip((p.detach(), *(state[name] for name in ROLES[2:4])), kept, strict=True):
        whole = x.as_strided((6, 4), (4, 1))
        assert same_bits(whole[2:], before[2:])
        assert not same_bits(whole[:2], before[:2])


@pytest.mark.parametrize("role", ROLES[2:])
def test_state_that_shrinks_in_its_place_is_no_longer_taken(device, role):
    """A row's other tensors would be written beyond their ends."""
    model = model_of([(6, 4)], device)
    (p,) = model.params
    ema = trainops.EMA(model, 0.9, backend="triton")
    optimizer = adamw(model, amsgrad=True, ema=ema)
    for _ in range(2):
        optimizer.step()
    if role == "average":
        ema.module.params[0].data = ema.module.params[0].data[:2]
    else:
        optimizer.state[p][role] = optimizer.state[p][role][:2]
    before = p.detach().clone()
    with pytest.raises((RuntimeError, ValueError), match="shape"):
        optimizer.step()
    assert same_bits(p.detach(), before)


@pytest.mark.parametrize("change", ["maximize", "amsgrad", "grouping", "grad is None", "order"])
def test_changes_of_the_groups_are_followed(device, change):
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = model_of([(5,), (5,), (3,)], device)
        first, second, third = model.params
        groups = [{"params": [first, second], "weight_decay": 0.1}, {"params": [third], "lr": 0.2}]
        optimizer = trainops.AdamW(groups, lr=0.1, backend=backend)
        for _ in range(2):
            optimizer.step()
        if change in ("maximize", "amsgrad"):
            optimizer.param_groups[1][change] = True
        if change == "amsgrad":
            optimizer.state[third]["max_exp_avg_sq"] = torch.ones(3, device=device)
        if change == "grouping":
            optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
        if change == "grad is None":
            second.grad = None
        if change == "order":
            optimizer.param_groups.reverse()
        optimizer.step()
        results.append([*model.params, *(x for p in model.params for x in optimizer.state[p].values())])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("warm", [False, True])
def test_an_upload_that_fails_changes_nothing(device, monkeypatch, failing, warm):
    """As for a step that is captured in a CUDA graph, and was not taken before: of rows, chunks or settings."""
    model = model_of([(5,), (3,)], device)
    ema = trainops.EMA(model, 0.9, backend="triton")
    optimizer = adamw(model, **WHOLE, ema=ema)
    for _ in range(2 * warm):
        optimizer.step()
    before = [*[p.detach().clone() for p in model.params], *[x.detach().clone() for x in ema.module.params]]
    before += [x.clone() for state in optimizer.state.values() for x in state.values()]
    steps, calls, upload = ema.step, [], triton.uploaded

    def fail(*args):
        calls.append(args)
        if len(calls) == failing + 1:
            raise RuntimeError("no spare")
        return upload(*args)

    with monkeypatch.context() as patch:
        for module in (triton, device_table):
            patch.setattr(module, "uploaded", fail)
        with pytest.raises(RuntimeError, match="no spare"):
            optimizer.step()
    after = [*model.params, *ema.module.params, *(x for state in optimizer.state.values() for x in state.values())]
    assert_same([x.detach() for x in after], before)
    assert (ema.step, optimizer.skipped_steps) == (steps, 0)
    optimizer.step()
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0 * warm + 1}


# Numbers


def exact_step(param, grad, state, lr, betas, eps, weight_decay):
    """One step from any state, in extended precision: the parameter and the moments."""
    (beta1, beta2), t = map(np.longdouble, betas), np.longdouble(state["step"].item()) + 1
    g = exact(grad)
    m = beta1 * exact(state["exp_avg"]) + (1 - beta1) * g
    v = beta2 * exact(state["exp_avg_sq"]) + (1 - beta2) * g * g
    update = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + np.longdouble(eps))
    return exact(param) * (1 - np.longdouble(lr) * np.longdouble(weight_decay)) - np.longdouble(lr) * update, m, v


def narrow_enough(dtype, scale):
    return dtype != FLOAT16 or 1e-3 < scale < 10


@pytest.mark.parametrize("step", [0, 1, 10, 100_000])
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e-6, 1.0, 1e15])
def test_error_at_any_step_count_and_scale(device, dtype, step, scale):
    """Of the numbers that training may meet late, or with tiny or large gradients."""
    if not narrow_enough(dtype, scale):
        pytest.skip("beyond the range of float16")
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-4 if dtype == FLOAT16 else 1e-8, "weight_decay": 0.1}
    numel = BLOCK + 9
    p, grad = torch.randn(numel).to(dtype), (scale * torch.randn(numel)).to(dtype)
    moments = {"exp_avg": (0.3 * scale * torch.randn(numel)).to(dtype)} if step else {"exp_avg": torch.zeros_like(p)}
    second = scale * scale * torch.rand(numel, dtype=FLOAT64) if step else torch.zeros(numel)
    state = {"step": torch.tensor(float(step)), **moments, "exp_avg_sq": second.to(dtype)}
    true = exact_step(p, grad, state, **options)
    results = []
    for make, chosen in ((trainops.AdamW, {"backend": "triton"}), (torch.optim.AdamW, {"foreach": False})):
        param = torch.nn.Parameter(p.to(device, copy=True))
        param.grad = grad.to(device)
        optimizer = make([param], **options, **chosen)
        optimizer.state[param] = {name: x.to(device, copy=True) for name, x in state.items()}
        if make is torch.optim.AdamW:
            optimizer.state[param]["step"] = state["step"].clone()
        optimizer.step()
        own = optimizer.state[param]
        assert own["step"] == step + 1
        results.append((param.detach(), own["exp_avg"], own["exp_avg_sq"]))
    for ours, torchs, truth, what in zip(*results, true, ("param", "exp_avg", "exp_avg_sq"), strict=True):
        assert_contract(ours, truth, torchs, what)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.999, 1 - 1e-7])
def test_error_of_the_bias_correction(device, beta):
    """A first step from nothing is ``lr`` long, whatever the betas: the corrections cancel what they correct."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=FLOAT64, device=device))
    p.grad = torch.tensor([1.0, -2.0, 1e-3], dtype=FLOAT64, device=device)
    trainops.AdamW([p], lr=0.5, betas=(beta, beta), eps=0.0, backend="triton").step()
    torch.testing.assert_close(p.detach(), -0.5 * p.grad.sign(), rtol=1e-8, atol=0)


def test_nan_and_infinity_pass_through_as_in_torch(device, dtype):
    grad = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0]).to(device, dtype)
    results = []
    for make, chosen in ((trainops.AdamW, {"backend": "triton"}), (torch.optim.AdamW, {"foreach": False})):
        param = torch.nn.Parameter(torch.ones(6, dtype=dtype, device=device))
        param.grad = grad.clone()
        optimizer = make([param], lr=0.1, eps=1e-3, amsgrad=True, **chosen)
        for _ in range(2):
            optimizer.step()
        results.append((param.detach(), *(optimizer.state[param][name] for name in ROLES[2:5])))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, equal_nan=True)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_norms_of_nonfinite_numbers(device, norm_type, bad):
    for place in (0, BLOCK - 1, CHUNK, NUMEL - 1):
        tensors = [torch.ones(3, device=device), torch.ones(NUMEL, device=device)]
        tensors[1][place] = bad
        total, norms = triton.grad_norms(tensors, norm_type)
        expected, each = triton.reference.grad_norms(tensors, norm_type)
        torch.testing.assert_close(total, expected, equal_nan=True)
        torch.testing.assert_close(norms, each, equal_nan=True)


@pytest.mark.parametrize("kind", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_norms_whose_squares_float32_cannot_hold(device, kind):
    tensors = [torch.full((NUMEL,), 1e30, device=device, dtype=kind), torch.ones(3, device=device, dtype=kind)]
    total, norms = triton.grad_norms(tensors, 2.0)
    expected = NUMEL**0.5 * tensors[0][0].item()
    assert total.item() == norms[0].item() == pytest.approx(expected, rel=1e-6)
    assert norms[1].item() == pytest.approx(3**0.5)


def every_number(narrow):
    """All numbers of 16 bits in float32, what lies midway between neighbours, and next to that."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(narrow)
    finite = numbers[numbers.isfinite()].double().unique()
    gaps = finite.diff()
    middle = torch.cat((finite[1:] - gaps / 2, finite[-1:] + gaps[-1:] / 2, finite[:1] - gaps[:1] / 2)).float()
    infinity = torch.full_like(middle, INF)
    small = torch.tensor([1, 2, 2**22, 2**23 - 1], dtype=torch.int32).view(FLOAT32)  # subnormal, also in bfloat16
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32).view(FLOAT32)
    others = torch.tensor([0.0, -0.0, INF, -INF, NAN, torch.finfo(FLOAT32).max, torch.finfo(narrow).max])
    near = (middle.nextafter(infinity), middle.nextafter(-infinity))
    return torch.cat((numbers.float(), middle, *near, small, -small, payloads, others))


@pytest.mark.parametrize("narrow", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("wide", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_rounding_is_that_of_torch(device, divide, narrow, wide):
    """Of the interpreter too, which ``conftest.py`` corrects."""
    if triton.serves("cpu"):
        divide(16384, 16384)
    x = every_number(narrow).to(wide)
    if wide == FLOAT64:
        x = torch.cat([x * (1 + sign * 2.0**-40) for sign in (-1, 0, 1)])  # rounds to float32 first, as in torch
    rounded = torch.full_like(x, 3.0, dtype=narrow, device=device)
    trainops.ema_update_([rounded], [x.to(device)], 0.0, backend="triton")
    expected, rounded = x.to(narrow), rounded.cpu()
    assert torch.equal(rounded.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert same_bits(rounded[finite], expected[finite])


@pytest.mark.parametrize("narrow", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("wide", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_16_bit_numbers_widen_exactly(device, divide, narrow, wide):
    if triton.serves("cpu"):
        divide(16384, 16384)
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(narrow)
    widened = torch.full_like(x, 3.0, dtype=wide, device=device)
    trainops.ema_update_([widened], [x.to(device)], 0.0, backend="triton")
    widened, numbers = widened.cpu(), ~x.isnan()
    assert same_bits(widened[numbers], x.to(wide)[numbers])
    assert widened[~numbers].isnan().all()


# What is around it


def test_dtensors_are_updated_where_they_lie(device):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or device.type != "cpu":
        pytest.skip("one process with gloo, on the CPU")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = model_of([(5, 3)], device)
        sharded = Model([distribute_tensor(plain.params[0].detach().clone(), mesh, [Shard(0)])])
        sharded.params[0].grad = distribute_tensor(plain.params[0].grad.clone(), mesh, [Shard(0)])
        for model in (plain, sharded):
            optimizer = adamw(model)
            for _ in range(2):
                optimizer.step()
        assert same_bits(sharded.params[0].detach().to_local(), plain.params[0].detach())
    finally:
        distributed.destroy_process_group()


def test_another_default_device_is_no_matter(device):
    model = model_of([(5,), (3,)], device)
    optimizer = adamw(model, **WHOLE, ema=trainops.EMA(model, 0.9, backend="triton"))
    with torch.device("meta"):
        optimizer.step()
        norm = trainops.clip_grad_norm_(model.params, 0.5, backend="triton")
    assert norm.device == optimizer.grad_norm.device == optimizer.skipped_steps.device == model.params[0].device
    assert norm.item() > 0


def test_inference_mode_makes_nothing_that_training_cannot_use(device):
    model = model_of([(5,)], device)
    with torch.inference_mode():
        triton.grad_norms([p.detach() for p in model.params])
        triton.clamp_([torch.ones(3, device=device)], 0.5)
    optimizer = adamw(model, **WHOLE)
    optimizer.step()
    trainops.clip_grad_value_(model.params, 0.5, backend="triton")
    assert optimizer.grad_norm.isfinite()


def test_a_gradient_that_becomes_sparse_raises_and_changes_nothing(device):
    model = model_of([(3, 2), (3, 2)], device)
    optimizer = adamw(model)
    optimizer.step()
    before = everything(optimizer)
    model.params[1].grad = torch.ones(3, 2, device=device).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert_same(everything(optimizer), before)


def test_lists_without_elements(device):
    empty = [torch.nn.Parameter(torch.ones(0, 3, device=device)) for _ in range(2)]
    for p in empty:
        p.grad = torch.ones(0, 3, device=device)
    optimizer = trainops.AdamW(empty, **WHOLE, backend="triton")
    optimizer.step()
    optimizer.step()
    assert optimizer.grad_norm == 0
    assert optimizer.grad_norms.tolist() == [0, 0]
    assert [state["step"].item() for state in optimizer.state.values()] == [2, 2]
    assert trainops.clip_grad_norm_(empty, 1.0, backend="triton") == 0
    assert trainops.clip_grad_norm_([], 1.0, backend="triton") == 0
    trainops.clip_grad_value_([], 1.0, backend="triton")
    trainops.ema_update_([], [], 0.5, backend="triton")
    triton.ema_([], [], 0.5)


def test_other_devices_are_not_served():
    other = "meta"
    assert not triton.serves(other)
    p = torch.nn.Parameter(torch.ones(3, device=other))
    p.grad = torch.ones(3, device=other)
    with pytest.raises(RuntimeError, match="'triton' does not take tensors on 'meta'"):
        trainops.AdamW([p], backend="triton").step()


WITHOUT_A_GPU = """
import sys
import torch
loaded = "triton" in sys.modules
import trainops
found = trainops.backends()["triton"]
assert not found.available
assert found.reason == "PyTorch finds no GPU", found
try:
    trainops.AdamW([torch.nn.Parameter(torch.ones(3))], backend="triton")
except RuntimeError as error:
    assert "backend 'triton' is not available: PyTorch finds no GPU" in str(error), error
else:
    raise AssertionError
trainops.clip_grad_norm_([torch.ones(3)], 1.0)
assert loaded or "triton" not in sys.modules
assert "trainops.backends.triton" in sys.modules
assert "trainops.triton_kernels" not in sys.modules
"""


def test_without_a_gpu_the_backend_is_missing_and_triton_is_not_imported():
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    environment = {name: x for name, x in os.environ.items() if name not in ("TRITON_INTERPRET", "TRAINOPS_BACKEND")}
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_A_GPU], check=True, env=environment | hidden)


@pytest.fixture
def probe():
    """The question asked anew."""
    return triton.probe.__wrapped__


def test_without_triton_the_backend_is_missing(monkeypatch, probe):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert probe() == trainops.backends()["triton"].__class__(available=False, reason="Triton is not installed")


def test_a_broken_triton_is_no_secret(monkeypatch, probe):
    def broken():
        raise ImportError("libtriton.so: cannot open")

    monkeypatch.setattr(triton, "_kernels", broken)
    with pytest.warns(RuntimeWarning, match="without its triton backend: .*does not work: libtriton.so"):
        found = probe()
    assert (found.available, found.reason) == (
        False,
        "Triton is installed but does not work: libtriton.so: cannot open",
    )


@pytest.mark.parametrize("value", ["1", "true", "ON", "yes", "y", "0", "", "false", None])
def test_the_interpreter_is_chosen_as_triton_chooses_it(monkeypatch, value):
    from triton import knobs

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert triton._interpreted() == knobs.runtime.interpret
