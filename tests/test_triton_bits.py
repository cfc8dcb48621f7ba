"""What must not change a bit of what Triton kernels write: alignment, layout, division into blocks."""

import numpy as np
import pytest
import torch
from contract import exact, same_bits
from training import Model, at_offset
from triton_fixtures import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    INF,
    NORMS,
    NUMEL,
    ROLES,
    WHOLE,
    adamw,
    assert_moved,
    assert_same,
    everything,
    model_of,
    twin,
)

import trainops
from trainops import core
from trainops.adapters import _triton, triton
from trainops.uploads import uploaded

pytestmark = pytest.mark.usefixtures("small_blocks")


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
    if triton._device_type() == "cpu":
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
    for norm in NORMS:
        _, norms = triton.reduce(norm, sources)
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


def coded_steps(params, grads, place=lambda x: x.clone()):
    """What two steps with 8-bit state make of parameters, whose tensors lie where ``place`` says."""
    model = Model([place(p) for p in params])
    ema = trainops.EMA(model, 0.9, update_after_step=-2, backend="triton")
    optimizer = adamw(model, amsgrad=True, state_dtype="int8", seed=3, ema=ema)
    optimizer.init_state()
    for p, average, grad in zip(model.params, ema.module.params, grads, strict=True):
        p.grad, average.data = place(grad), place(average.data)
        optimizer.state[p] |= {name: place(x) for name, x in optimizer.state[p].items() if name.endswith("_codes")}
    for _ in range(2):
        optimizer.step()
    return everything(optimizer)


@pytest.mark.usefixtures("tiny_blocks")
def test_unaligned_tensors_give_the_same_codes(device):
    numel = 3 * 32 + 5 if device.type == "cpu" else 2500
    params, grads = [torch.randn(numel).to(device)], [torch.randn(numel).to(device)]
    aligned = coded_steps(params, grads)
    assert aligned[1].any()
    for offset in range(1, 17):
        assert_same(coded_steps(params, grads, lambda x, offset=offset: at_offset(x, offset)), aligned)


def test_the_division_into_blocks_and_chunks_changes_no_code(device, divide):
    shapes, results = [(300,), (), (0,), (31,), (33, 31)], []
    params, grads = ([torch.randn(shape).to(device) for shape in shapes] for _ in range(2))
    for division in ((32, 64), (64, 1024), (512, 512), (1024, 8192)):
        divide(*division)
        results.append(coded_steps(params, grads))
        assert_same(results[-1], results[0])


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
    assert_moved(results[0], model.params)
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
        assert_moved(results[-1], model.params)
        assert_moved(results[-1][-len(model.params) :], [p.grad for p in model.params])
        norms.append(torch.stack([optimizer.grad_norm, *optimizer.grad_norms]))
    for result, norm in zip(results, norms, strict=True):
        assert_same(result, results[0])
        torch.testing.assert_close(norm, norms[0], rtol=1e-6, atol=0)
    true = np.sqrt((exact(model.params[0].grad) ** 2).sum()) / 2
    assert norms[0][1].item() == pytest.approx(float(true), rel=1e-6)


@pytest.mark.large
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_elements_beyond_32_bits(device):
    """The last chunk of a long tensor, whose memory is otherwise never touched.

    The interpreter's loops count in Python's integers, which it then takes for 32 bits.
    """
    kernels, dtype, numel = _triton.kernels(), BFLOAT16, 2**31 + 5
    x = torch.empty(numel, dtype=dtype, device=device)
    table = core.table("transform", {"tensor": [torch.ones(1, dtype=dtype, device=device), x]}, device.type)
    words = table.words(chunk_numel=8192, by_kind=True)
    first = (numel - 1) // 8192 * 8192
    x[first - 1 :] = 1.0
    x[first:] = 2.0
    last = words.chunk_count - 1
    chunk = uploaded(words.rows, device), uploaded(words.chunks, device), last
    shape = {"WORDS": len(core.words("row")) + 1, "CHUNK": 8192, "BLOCK": 1024}
    types = {"DTYPE": _triton.type_of(dtype), "WIDE": _triton.type_of(FLOAT32)}
    partials = torch.zeros(words.chunk_count, dtype=FLOAT64, device=device)
    norm = {"STATISTIC": "l2_norm", "COLUMN": 0}
    _triton.launch(kernels.reduce.partial_results, 1, *chunk, partials, **norm, **types, **shape)
    assert partials[last] == 4.0 * (numel - first)
    assert partials[:last].count_nonzero() == 0
    three = torch.tensor(3.0, device=device)
    _triton.launch(kernels.transform.transform, 1, *chunk, three, CLAMP=False, **types, **shape)
    assert (x[first:] == 6.0).all()
    assert x[first - 1] == 1.0
