"""What is the CUDA backend's own: its launches, and the same bits whatever a GPU does with its blocks.

Without a GPU, the kernels are compiled for the CPU and run by ``cuda_shim``.
"""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import cuda_shim
import pytest
import torch
from code_steps import every_step
from contract import DTYPES, same_bits
from norms import assert_norm, reduced
from table_fixtures import NO_PLACES, WORDS
from targets import SHIM, Target, thorough
from torch import nn
from training import at_offset

import trainops
from trainops import core
from trainops.adapters import cuda, select
from trainops.adapters._device import stage

needs_shim = pytest.mark.skipif(SHIM is None, reason="the CUDA kernels are not compiled for the CPU")
DEVICE = "cuda" if SHIM is None else "cpu"
TARGET = Target("cuda", DEVICE)

SHAPES = [(), (0,), (7,), (64, 3), (1025,), (3, 9001), (8192,), (2048,), *[(5,)] * 30]
STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def randn(shape, dtype, device=DEVICE):
    return torch.randn(shape).to(device, dtype)


def make_step(dtypes=(torch.float32,) * 3, place=lambda x, role: x.clone(), device=DEVICE, **options):
    """A step, ready to be taken, and the tensors that it may change. ``dtypes``: param and grad, state, average."""
    torch.manual_seed(0)
    dtype, state_dtype, average_dtype = dtypes
    model = nn.Module()
    model.params = nn.ParameterList(nn.Parameter(place(randn(s, dtype, device), 0)) for s in SHAPES)
    params = list(model.params)
    ema = trainops.EMA(model, 0.9, dtype=average_dtype, backend="cuda")
    options = {
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "amsgrad": True,
        "max_grad_norm": 1.0,
        "skip_nonfinite": True,
    } | options
    optimizer = trainops.AdamW(params, ema=ema, backend="cuda", **options)
    for p, average in zip(params, ema.module.params, strict=True):
        p.grad = place(randn(p.shape, dtype, device), 1)
        state = {name: place(randn(p.shape, state_dtype, device).abs(), i) for i, name in enumerate(STATES, start=2)}
        optimizer.state[p] = {"step": torch.tensor(3.0, device=device), **state}
        average.data = place(average.data, 5)
    states = [x for p in params for x in optimizer.state[p].values()]
    return optimizer, [*params, *states, *ema.module.params]


def assert_moved(tensors, before):
    """None of them has the bits that it had: equal bits say nothing of kernels that do nothing."""
    assert not any(same_bits(x, old) for x, old in zip(tensors, before, strict=True) if x.numel())


def after_steps(count=2, **how):
    optimizer, tensors = make_step(**how)
    moving = [x for x in tensors if not any(x is state["max_exp_avg_sq"] for state in optimizer.state.values())]
    before = [x.detach().clone() for x in moving]
    for _ in range(count):
        optimizer.step()
    assert_moved(moving, before)
    return [optimizer.grad_norm, optimizer.grad_norms, *tensors]


def with_rows(residual, branch, layer_scale):
    """DropPath and its derivative where the branch has every second sample alone, from the last on."""
    some = torch.arange(len(residual) - 1, -1, -2, device=DEVICE)
    mask = residual.new_zeros(len(residual), *[1] * (residual.ndim - 1))
    mask[some] = 1.5
    rows = torch.zeros(len(residual), dtype=torch.int64, device=DEVICE)
    rows[some] = torch.arange(len(some), device=DEVICE)
    kernels = select("cuda", DEVICE)
    of_branch, of_layer_scale = kernels.drop_path_backward(
        residual, branch[: len(some)], mask[some], layer_scale, some
    )
    results = [kernels.drop_path(branch[: len(some)], mask, residual, scale, rows) for scale in (None, layer_scale)]
    return [*results, of_branch, of_layer_scale, kernels.drop_path(residual, mask[some], None, None, some)]


def after_steps_of_other_rules(dtype, place):
    """What Adam and SGD make of such tensors in two steps."""
    results = []
    for make, options in ((trainops.Adam, {"amsgrad": True}), (trainops.SGD, {"momentum": 0.9, "nesterov": True})):
        params = [nn.Parameter(place(randn(s, dtype), 0)) for s in SHAPES]
        for i, p in enumerate(params):
            p.grad = place(randn(p.shape, dtype), i % 3)
        before = [p.detach().clone() for p in params]
        optimizer = make(params, lr=0.1, weight_decay=0.1, max_grad_norm=0.5, backend="cuda", **options)
        for _ in range(2):
            optimizer.step()
        assert_moved([p.detach() for p in params], before)
        results += [*(p.detach() for p in params), *(x for p in params for x in optimizer.state[p].values())]
    return results


def after_steps_with_averages(dtype, place=lambda x, role: x.clone()):
    """What two steps make of three averages, and of buffers that are averaged or copied.

    The state is of another type: threads take other elements for the step than for further averages.
    """
    torch.manual_seed(3)
    model = nn.Module()
    model.params = nn.ParameterList(nn.Parameter(place(randn(s, dtype), 0)) for s in ((7,), (1025,), (4100,)))
    model.register_buffer("mean", place(randn((1027,), dtype), 1))
    model.register_buffer("count", place(torch.arange(700, device=DEVICE), 2))
    emas = [trainops.EMA(model, 0.9, dtype=own, backend="cuda") for own in (None, torch.float32, torch.float64)]
    state_dtype = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    optimizer = trainops.AdamW(model.params, lr=0.1, state_dtype=state_dtype, ema=emas, backend="cuda")
    optimizer.init_state()
    before = [[x.detach().clone() for x in (*ema.module.params, *ema.module.buffers())] for ema in emas]
    for _ in range(2):
        model.mean += 1
        model.count += 2**40
        for p in model.params:
            p.grad = place(randn(p.shape, dtype), 3)
        optimizer.step()
    after = [[x.detach() for x in (*ema.module.params, *ema.module.buffers())] for ema in emas]
    for its, old in zip(after, before, strict=True):
        assert_moved(its, old)
    return [*(p.detach() for p in model.params), *(x for its in after for x in its)]


def everything(dtype, place=lambda x, role: x.clone()):
    """What every kernel makes of such tensors."""
    results = after_steps(dtypes=(dtype,) * 3, place=place)
    results += after_steps_with_averages(dtype, place)
    results += every_step(DEVICE, dtype, place)
    torch.manual_seed(2)
    results += after_steps_of_other_rules(dtype, place)
    torch.manual_seed(1)
    params = [nn.Parameter(place(randn(s, dtype), 1)) for s in SHAPES]
    for i, p in enumerate(params):
        p.grad = place(randn(p.shape, dtype), i % 3)
    grads = [p.grad for p in params]
    before = [x.clone() for x in grads]
    norms = [trainops.clip_grad_norm_(params, 0.5, p, backend="cuda") for p in (1.0, 2.0, float("inf"))]
    long_row = place(randn(8 * cuda._cuda.CHUNK_NUMEL + 5, dtype), 1)  # several chunks
    norms += [x for p in (1.0, 2.0, math.inf) for x in reduced(TARGET, [long_row], p)]
    assert_moved(grads, before)
    scaled = [x.clone() for x in grads]
    trainops.clip_grad_value_(params, 3e-6, backend="cuda")
    assert_moved(grads, scaled)
    averages = [place(randn(s, dtype), 3) for s in SHAPES]
    before = [x.clone() for x in averages]
    trainops.ema_update_(averages, grads, 0.9, backend="cuda")
    assert_moved(averages, before)
    dropped = []
    for shape in [(6, 33, 64), (3, 5, 7), (5, 1000, 8), (9, 16), (300, 1, 2)]:
        residual, branch = (place(randn(shape, dtype), role) for role in (0, 1))
        layer_scale = place(randn(shape[-1], dtype), 2)
        operands = [x.requires_grad_() for x in (residual, branch, layer_scale)]
        out = trainops.drop_path_add(residual, branch, 0.4, True, layer_scale=layer_scale, backend="cuda")
        dropped += [out, *torch.autograd.grad(out, operands, randn(shape, dtype))]
        dropped.append(trainops.drop_path(branch.detach(), 0.4, True, backend="cuda"))
        dropped += with_rows(*(x.detach() for x in operands))
    stats = trainops.tensor_stats([*scaled, long_row], histogram=True, backend="cuda")
    watched = [stats.rows, stats.histogram, guarded_weight(dtype, place)]
    return [*results, *norms, *scaled, *grads, *averages, *dropped, *watched]


def guarded_weight(dtype, place):
    """A weight after steps with a guard, whose norms are known."""
    param = nn.Parameter(place(randn((33,), dtype), 0))
    guard = trainops.SpikeGuard(max_norm=10.0)
    optimizer = trainops.AdamW([param], 0.1, spike_guard=guard, max_grad_norm=1.0, backend="cuda")
    weights = []
    for norm in (1.0, 20.0, 1.0):
        param.grad = place(randn((33,), dtype), 1)
        optimizer.step(total_norm=torch.tensor(norm))
        weights.append(param.detach().clone())
    assert same_bits(weights[1], weights[0])
    assert not same_bits(weights[2], weights[1])
    return weights[2]


@functools.cache
def expected(dtype):
    """The same, of aligned tensors and with as many blocks as a launch has, one after the other."""
    return everything(dtype)


@needs_shim
@pytest.mark.parametrize(
    ("options", "launches"),
    [
        ({}, ["l2_norm", "adamw"]),
        ({"skip_nonfinite": False}, ["l2_norm", "adamw"]),
        ({"skip_nonfinite": False, "max_grad_norm": None}, ["adamw"]),
    ],
    ids=["clip_and_skip", "clip", "plain"],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_launches_of_a_step(options, launches, mixed):
    optimizer, _ = make_step(**options)
    if mixed:
        more = [nn.Parameter(randn(9, dtype)) for dtype in DTYPES]
        for i in range(20):  # more groups than a launch carries
            optimizer.add_param_group({"params": more if i == 0 else [], "maximize": True, "amsgrad": False})
        for p in more:
            p.grad = torch.ones_like(p)
    optimizer.step()
    SHIM.launches()
    optimizer.step()
    assert SHIM.launches() == launches


def test_equal_words_alone_are_taken_for_those_of_another_table():
    """Those that are remembered have as many words: of as many rows, of other sizes and at other addresses."""
    assert [*WORDS] == ["numel", "first_chunk", "group", "dtypes", *NO_PLACES]  # and then the address
    for sizes in ((5, 20_000, 3), (5, 20_000, 3), (9_000, 7, 3)):
        tensors = [torch.ones(size, device=DEVICE) for size in sizes]
        table = core.table("reduce", {"tensor": tensors}, DEVICE)
        rows, chunks, *_ = stage(table, tensors[0].device, cuda._cuda.CHUNK_NUMEL, by_kind=False)
        chunk_numel = cuda._cuda.CHUNK_NUMEL
        first_chunks = [sum(-(-size // chunk_numel) for size in sizes[:row]) for row in range(3)]
        of_rows = zip(tensors, first_chunks, strict=True)
        words = [[x.numel(), first, 0, 0, *NO_PLACES.values(), x.data_ptr()] for x, first in of_rows]
        assert rows.view(-1, len(words[0])).tolist() == words
        each = [(i, begin) for i in range(3) for begin in range(0, sizes[i], chunk_numel)]
        each.sort(key=lambda chunk: -min(chunk_numel, sizes[chunk[0]] - chunk[1]))
        assert chunks.view(-1, 2).tolist() == [list(chunk) for chunk in each]


def test_addresses_are_refused_without_their_names():
    table = core.table("reduce", {"tensor": [torch.ones(4, device=DEVICE)]}, DEVICE)
    rows, chunks, chunk_count, all_chunks, _ = words = stage(
        table, torch.device(DEVICE), cuda._cuda.CHUNK_NUMEL, by_kind=False
    )
    arguments = {"words": words, "rows": rows.data_ptr(), "chunks": chunks.data_ptr()}
    arguments |= {"chunk_count": chunk_count, "all_chunks": all_chunks, "stream": 0}
    with pytest.raises(TypeError):
        cuda._cuda.StagedTable(table, *arguments.values())
    staged = cuda._cuda.StagedTable(table, **arguments)
    with pytest.raises(TypeError):
        cuda._cuda.ema(staged, 0.5, 0)


def is_no_sample_of_orders(dtype, blocks, order):
    """One block has no order; what blocks do does not depend on the type."""
    few = [(1, 1), (3, 2), (2**31, 1)] if dtype == torch.float32 else [(3, 3)]
    return (blocks, order) not in few


@needs_shim
@thorough(is_no_sample_of_orders)
@pytest.mark.parametrize("order", [1, 2, 3], ids=["backwards", "shuffled", "shuffled_otherwise"])
@pytest.mark.parametrize("blocks", [1, 3, 2**31])
def test_any_order_and_number_of_blocks_gives_the_same_bits(blocks, order, dtype):
    with SHIM.blocks(blocks, order):
        results = everything(dtype)
    assert all(map(same_bits, results, expected(dtype)))


@thorough(lambda dtype, offset, shift: (offset, shift) not in [(1, 0), (3, 1)])
@pytest.mark.parametrize("offset", [1, 3, 8])
@pytest.mark.parametrize("shift", [0, 1], ids=["alike", "each"])
def test_unaligned_addresses_give_the_same_bits(dtype, offset, shift):
    """All tensors alike, and each at an offset of its own."""
    unaligned = everything(dtype, lambda x, role: at_offset(x, (offset + shift * role) % 9))
    assert all(map(same_bits, unaligned, expected(dtype)))


MIXED = [
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.float64),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float64, torch.float64),
    (torch.float64, torch.float32, torch.float16),
]


@pytest.mark.parametrize("dtypes", [(dtype,) * 3 for dtype in DTYPES] + MIXED, ids=str)
@pytest.mark.parametrize("aligned", [True, False])
def test_a_step_is_that_of_the_cpu_backend(dtypes, aligned):
    """The formulas are the same: with a coefficient that both know exactly, so are the bits."""
    results = []
    for backend, device in (("cuda", DEVICE), ("cpu", "cpu")):
        optimizer, tensors = make_step(
            dtypes,
            (lambda x, role: x.clone()) if aligned else at_offset,
            device,
            max_grad_norm=None,
            skip_nonfinite=False,
        )
        optimizer.backend = optimizer.ema.backend = backend
        optimizer.step()
        results.append(tensors)
    for ours, cpus in zip(*results, strict=True):
        assert same_bits(ours, cpus)


# All threads of a block add up the partial results of a row, each every 256th, four at a time.
@thorough(lambda chunks, norm_type: chunks > 200 and (chunks, norm_type) != (257, 2.0))
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("chunks", [1, 2, 9, 256, 257, 1025])
def test_norms_of_long_rows(chunks, norm_type):
    numel = cuda._cuda.CHUNK_NUMEL * (chunks - 1) + 5
    tensors = [randn(100, torch.float32), randn(numel, torch.bfloat16), randn(numel, torch.float32)]
    total, norms = reduced(TARGET, tensors, norm_type)
    for got, its in zip([total, *norms], [tensors, *([x] for x in tensors)], strict=True):
        assert_norm(TARGET, got, its, norm_type)


def test_rows_of_another_number_follow(dtype):
    """The counters and partial results of one table are in the memory of the next."""
    for shapes in ([(70_000,)], [(5,)] * 700, [(70_000,), (5,), (70_000,)], [(3,)] * 1500, [(140_000,)]):
        tensors = [randn(shape, dtype) for shape in shapes]
        assert_norm(TARGET, reduced(TARGET, tensors)[0], tensors)


def test_every_run_gives_the_same_bits(dtype):
    assert all(map(same_bits, everything(dtype), expected(dtype)))


def test_groups_keep_their_settings_at_one_step_count():
    """Chunks of one size follow each other, each of another group."""
    params = [nn.Parameter(torch.ones(100, device=DEVICE)) for _ in range(6)]
    groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(params)]
    optimizer = trainops.AdamW(groups, weight_decay=0.0, backend="cuda")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for i, p in enumerate(params):
        torch.testing.assert_close(p.detach(), torch.full_like(p, 1 - 0.1 * i))


@pytest.mark.parametrize("how", ["nan", "found_inf"])
def test_a_skipped_step_leaves_every_bit(how, dtype):
    optimizer, tensors = make_step((dtype,) * 3)
    before = [x.detach().clone() for x in tensors]
    if how == "nan":
        optimizer.param_groups[0]["params"][5].grad[-1, -1] = float("nan")
    else:
        optimizer.found_inf = torch.ones((), device=DEVICE)
    for skipped in (1, 2):
        optimizer.step()
        assert all(map(same_bits, tensors, before))
        assert optimizer.skipped_steps == skipped


@needs_shim
@pytest.mark.parametrize(("launch", "kernel"), [(1, "l2_norm"), (2, "adamw")])
def test_an_error_of_a_launch_names_the_kernel(launch, kernel):
    optimizer, _ = make_step()
    SHIM.fail(launch)
    with pytest.raises(RuntimeError, match=f"kernel {kernel}: unspecified launch failure"):
        optimizer.step()
    optimizer.step()


def test_a_learning_rate_in_memory(dtype):
    results = []
    for lr in (0.01, torch.tensor(0.01, device=DEVICE), torch.tensor(0.01, dtype=torch.float64, device=DEVICE)):
        optimizer, tensors = make_step((dtype,) * 3, capturable=isinstance(lr, torch.Tensor))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        results.append(tensors)
    assert all(map(same_bits, results[0], results[2]))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected)


# Runs every kernel, in a process of its own because a sanitizer has to be there before anything else.
UNDER_A_SANITIZER = """
import sys
sys.path.insert(0, {tests!r})
import contract, test_cuda
for dtype in contract.DTYPES:
    aligned = test_cuda.everything(dtype)
    unaligned = test_cuda.everything(dtype, lambda x, role: test_cuda.at_offset(x, (3 + role) % 9))
    assert all(map(contract.same_bits, aligned, unaligned))
for dtypes in test_cuda.MIXED:
    test_cuda.after_steps(dtypes=dtypes)
print("done")
"""


@needs_shim
@thorough(lambda **_: True)
@pytest.mark.parametrize(("sanitizer", "library"), [("undefined", "libubsan.so"), ("address", "libasan.so")])
def test_under_a_sanitizer(sanitizer, library, monkeypatch):
    answer = subprocess.run(
        [*cuda_shim.compiler(), f"-print-file-name={library}"], capture_output=True, text=True, check=True
    )
    found = Path(answer.stdout.strip())
    if not found.is_absolute():
        pytest.skip(f"the compiler has no {library}")
    monkeypatch.setenv("LD_PRELOAD", str(found))
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRAINOPS_SHIM_FLAGS", f"-fsanitize={sanitizer} -fno-sanitize-recover=all -g1")
    script = UNDER_A_SANITIZER.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("done\n")


# Run in an interpreter of its own, which finds what `setup.py` built.
PROBE = """
import json, torch, trainops
from trainops.adapters import cuda
found = trainops.backends()["cuda"]
try:
    trainops.get_total_norm(torch.ones(3), backend="cuda")
except RuntimeError as error:
    answer = str(error)
else:
    answer = ""
print(json.dumps([cuda._cuda is not None, found.available, found.reason, answer]))
"""


def test_what_is_said_where_no_gpu_is_seen():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
    is_loaded, available, reason, answer = json.loads(done.stdout)
    assert reason
    assert not available
    assert answer.startswith(f"backend 'cuda' is not available: {reason}")
    assert not is_loaded or "no NVIDIA driver" in reason or "no CUDA-capable device" in reason
