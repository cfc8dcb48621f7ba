"""The CUDA kernels have no races; each barrier and fence that is taken out, and other faults, are noticed."""

import functools

import pytest
import test_stochastic_averages
import test_stochastic_rounding
import torch
from code_steps import every_step
from contract import same_bits
from exact import STATISTICS
from ptx import build
from ptx.backend import api_of_torch, see_tensors
from ptx_fixtures import backend
from scratch import ROOT
from targets import Target, thorough
from test_cuda import after_steps, after_steps_with_averages, everything, make_step, with_rows
from torch import nn
from training import at_offset

import trainops
from trainops import core
from trainops.adapters import _cuda_memory, select


@pytest.fixture
def cuda():
    return backend()


def own_offset(x, role):
    return at_offset(x, (3 + role) % 9)


@thorough(lambda seed, dtype: (dtype, seed) != (torch.bfloat16, 1))
@pytest.mark.parametrize("seed", range(6))
def test_no_race(cuda, dtype, seed):
    with cuda.active(), cuda.machine.schedule(resident=8, seed=seed, races=True):
        everything(dtype)
        everything(dtype, own_offset)


@thorough(lambda seed: seed > 0)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_race_between_barriers(cuda, seed):
    with cuda.active(), cuda.machine.schedule(resident=8, seed=seed, races=True):
        for work in WORK.values():
            work(cuda)


@thorough(lambda resident: resident == 2)
@pytest.mark.parametrize("resident", [1, 2, 3])
def test_few_blocks_at_a_time(cuda, resident):
    """They draw the chunks of those that have not begun, and leave the counters as the next launch needs them."""
    every = (step_of_groups, averages_of_many, transforms_of_many, norms)
    with cuda.active():
        true = [x for work in every for x in work(cuda)]
    with cuda.active(), cuda.machine.schedule(resident=resident, seed=resident, races=True):
        results = [x for work in every for x in work(cuda)]
        assert all(scratch[0].eq(0).all() for scratch in _cuda_memory.scratches.values())
    assert all(map(same_bits, results, true))


# What takes every path between barriers. The machine runs 8 blocks at a time, and no more are launched.


def step_of_groups(_):
    """More chunks than blocks, whose groups and step counts change from one to the next."""
    params = [nn.Parameter(torch.ones(100)) for _ in range(20)]
    optimizer = trainops.AdamW([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(params)], backend="cuda")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    return params


def skipped_step():
    """As many chunks, of which none is taken."""
    params = [nn.Parameter(torch.ones(100)) for _ in range(20)]
    optimizer = trainops.AdamW(params, skip_nonfinite=True, backend="cuda")
    for p in params:
        p.grad = torch.full_like(p, torch.inf)
    optimizer.step()
    return [*params, optimizer.skipped_steps]


def guarded_steps():
    """A spike after steps that a guard has learned, measured and with a norm that is known."""
    params = [nn.Parameter(torch.ones(100)) for _ in range(20)]
    guard = trainops.SpikeGuard(3.0, warmup=2)
    optimizer = trainops.AdamW(params, spike_guard=guard, backend="cuda")
    for size in (1.0, 1.1, 1e3, 1.0):
        for p in params:
            p.grad = torch.full_like(p, size)
        optimizer.step()
        optimizer.step(total_norm=torch.tensor(45.0 * size))
    assert optimizer.skipped_steps == 2
    return [*params, optimizer.skipped_steps, optimizer.param_groups[0]["trainops"]["spike_guard"]]


def stage(cuda, kind, tensors):
    """A table of tensors, and its words, which may be changed: by row, and those of the chunks."""
    table = core.table(kind, {"tensor": tensors}, "cpu")
    words = table.words(chunk_numel=cuda.module.CHUNK_NUMEL, by_kind=False)
    rows, chunks = (torch.frombuffer(bytearray(x), dtype=torch.int64).clone() for x in (words.rows, words.chunks))
    staged = cuda.module.StagedTable(
        table,
        words=(rows, chunks),
        rows=rows.data_ptr(),
        chunks=chunks.data_ptr(),
        chunk_count=words.chunk_count,
        all_chunks=words.all_chunks,
        stream=0,
    )
    return staged, rows.view(len(tensors), -1)


def norms_of_long_rows(cuda, kind, counts):
    """Rows of so many chunks. All but the first have been added up and counted before."""
    staged, rows = stage(cuda, "reduce", [torch.ones(cuda.module.CHUNK_NUMEL) for _ in counts])
    counts = torch.tensor(counts)
    rows[:, 0] = cuda.module.CHUNK_NUMEL * counts
    rows[:, 1] = counts.cumsum(0) - counts
    partials = torch.ones(int(counts.sum()), dtype=torch.float64)
    counters = torch.cat((torch.zeros(2, dtype=torch.int32), counts.int() - 1))
    total, total_out, norms = torch.empty((), dtype=torch.float64), torch.empty(()), torch.empty(len(counts))
    cuda.module.reduce(
        staged,
        statistic=kind,
        grad_scale=0,
        counters=counters.data_ptr(),
        partials=partials.data_ptr(),
        total=total.data_ptr(),
        total_out=total_out.data_ptr(),
        rows_out=norms.data_ptr(),
    )
    assert counters.eq(0).all()
    return [total, norms]


def norms(cuda):
    """Rows that blocks finish together, second looks, and more rows than a block has threads.

    What takes longest comes last: most faults show before.
    """
    results = [x for kind in STATISTICS.values() for x in norms_of_long_rows(cuda, kind, [2100, 20, 3])]
    several = 2 * cuda.module.CHUNK_NUMEL + 5
    for pairs in (2, 130):
        tensors = [torch.ones(several, dtype=torch.float64), torch.full((several,), 3e38)]
        tensors += [torch.full((3,), 1e-23, dtype=dtype) for dtype in pairs * [torch.float32, torch.bfloat16]]
        tensors.append(torch.ones(several))
        adapter = select("cuda", "cpu")
        for kind in STATISTICS.values():
            results += adapter.reduce(kind, tensors)
        results += adapter.statistics(tensors, True)
    return results


def drop_paths(_):
    """More rows and more channels than blocks take at a time, in packs and one by one."""
    shapes = [(18, 64, 32), (18, 64, 33), (1, 2, 320), (1, 2, 321)]
    operands = [[torch.ones(shape, dtype=dtype), torch.ones(shape[-1], dtype=dtype)] for shape in shapes
                for dtype in (torch.float32, torch.float64)]  # fmt: skip
    return [result for x, scale in operands for result in with_rows(x, x, scale)]


def averages_of_many(_):
    """More chunks than blocks."""
    averages, others = ([torch.full((100,), x) for _ in range(20)] for x in (1.0, 2.0))
    trainops.ema_update_(averages, others, 0.5, backend="cuda")
    return averages


def transforms_of_many(_):
    params = [nn.Parameter(torch.ones(100)) for _ in range(20)]
    for p in params:
        p.grad = torch.ones_like(p)
    trainops.clip_grads_with_norm_(params, 1.0, torch.tensor(2.0), backend="cuda")
    trainops.clip_grad_value_(params, 0.2, backend="cuda")
    return [p.grad for p in params]


def stochastic_steps():
    """A variant of a step's kernel."""
    few = test_stochastic_rounding.mixed_steps(Target("cuda", "cpu"), 2, shapes=((100,),) * 7)
    return [*few, *test_stochastic_rounding.mixed_steps(Target("cuda", "cpu"), 1, shapes=((3, 4099),))]


def steps_of_codes():
    """Of blocks that several lanes share, in packs and one by one."""
    return every_step("cpu", torch.bfloat16, lambda x, role: x.clone())


def stochastic_averages():
    """A variant of the kernel of averages."""
    model, ema = test_stochastic_averages.make(Target("cuda", "cpu"), shapes=((100,),) * 20)
    return test_stochastic_averages.move(model, ema, 2)


WORK = {
    "update": lambda cuda: [
        *after_steps(),
        *step_of_groups(cuda),
        *skipped_step(),
        *guarded_steps(),
        *after_steps_with_averages(torch.float32),
        *stochastic_steps(),
        *steps_of_codes(),
    ],
    "reduce": norms,
    "drop_path_backward": drop_paths,
    "drop_path": lambda cuda: [],
    "ema": lambda cuda: [*averages_of_many(cuda), *stochastic_averages()],
    "transform": transforms_of_many,
}

# Barriers and fences without which nothing can go wrong, by their header and the call in a kernel, and why.
REDUNDANT = {}


def reason(site):
    places = site.where.split(", inlined at ")
    return next((
        why for (opcode, header, file, call), why in REDUNDANT.items()
        if site.opcode == opcode
        and f"/{header}:" in places[0]
        and places[-1].endswith(f"/{file}:{line_of(file, call)}")
    ), None)  # fmt: skip


def line_of(file, call):
    """The line of the only such call in a file of the CUDA kernels."""
    lines = (ROOT / "csrc/cuda" / file).read_text().splitlines()
    (found,) = [i for i, line in enumerate(lines, start=1) if call in line]
    return found


@functools.cache
def sites():
    """The barriers and fences of this architecture's kernels: the names are the same for every architecture.

    A step's kernel has the same ones for every rule, and where it rounds stochastically, as that of averages has:
    those of AdamW and of rounding to nearest.
    """
    cuda = backend()
    with cuda.active():
        return [(stem, site) for stem, names in cuda.kernels().items() for name in names
                if stem not in ("update", "ema") or ("Lb0E" in name and (stem == "ema" or "AdamW" in name))
                for site in cuda.machine.synchronizations(name)]  # fmt: skip


def is_noticed(cuda, stem, site):
    """Whether it makes a difference to leave it out: a fault."""
    with cuda.active(), cuda.machine.schedule(resident=8, races=True), cuda.machine.without(site):
        try:
            WORK[stem](cuda)
        except RuntimeError:
            return True
    return False


@thorough(lambda every: every)
@pytest.mark.parametrize("every", [False, True], ids=["of_one_type", "of_every_type"])
def test_every_barrier_and_fence_is_needed(cuda, every):
    """A kernel is compiled for several types: in `make test`, each place in the source for one of them."""
    found = sites()
    assert len(found) > 30
    if not every:
        found = {(stem, site.opcode, site.where): (stem, site) for stem, site in found}.values()
        assert len(found) > 10
    unnoticed = [site for stem, site in found if not is_noticed(cuda, stem, site)]
    unexplained = [site for site in unnoticed if reason(site) is None]
    assert not unexplained
    assert {reason(site) for site in unnoticed} == set(REDUNDANT.values())


def test_without_a_fence_the_race_is_told(cuda):
    *_, (stem, site) = ((stem, site) for stem, site in sites() if site.opcode == "membar.gl" and stem == "update")
    with (
        cuda.active(),
        cuda.machine.schedule(resident=8, races=True),
        cuda.machine.without(site),
        pytest.raises(RuntimeError) as error,
    ):
        WORK[stem](cuda)
    text = str(error.value)
    assert "update_kernel" in text
    assert "race in global memory" in text
    assert "/update.cu:" in text  # where each of the two threads was
    assert "/control.cuh:" in text
    assert text.count("block ") >= 2


# Faults that are planted, and noticed


def test_memory_of_another_device(cuda):
    with cuda.active():
        optimizer, _ = make_step()
        with cuda.machine.device(1):
            elsewhere = torch.ones(100)
        with pytest.raises(RuntimeError, match="memory of another device"):
            trainops.ema_update_([torch.ones(100)], [elsewhere], 0.5, backend="cuda")
        optimizer.step()


def test_each_device_runs_its_own(cuda):
    """The launch goes to the device that the tensors say they are on, and the current one is as before."""

    def of_device_1(tensor):
        *description, _, shape, strides = core.describe(tensor)
        return (*description, 1, shape, strides)

    with cuda.active():
        cuda.machine.launches()
        see_tensors(of_device_1, None)
        try:
            with cuda.machine.device(1):
                out, branch, mask = torch.zeros(3, 100), torch.ones(3, 100), torch.tensor([0.0, 2.0, 2.0])
            arguments = {"out": out, "branch": branch, "mask": mask, "samples": 3, "sample_numel": 100, "channels": 1}
            operands = core.drop_path(device_type="cpu", residual=None, layer_scale=None, rows=None, **arguments)
            for current in (0, 1):
                with cuda.machine.device(current):
                    cuda.module.drop_path(operands, stream=0)
                    assert cuda.machine.library.ptx_get_device() == current
        finally:
            see_tensors(core.describe, api_of_torch())
        assert [device for device, _ in cuda.machine.launches()] == [1, 1]
        assert out.eq(torch.tensor([[0.0], [2.0], [2.0]])).all()


@pytest.mark.parametrize("numel", [8, 100, 1025])
def test_one_element_past_the_end(cuda, numel):
    with cuda.active():
        tensor = torch.ones(numel)
        staged, rows = stage(cuda, "transform", [tensor])
        counters = torch.zeros(2, dtype=torch.int32)
        cuda.module.clamp(staged, bound=0.5, counters=counters.data_ptr())
        assert tensor.eq(0.5).all()
        rows[0, 0] += 1
        with pytest.raises(RuntimeError, match="outside of all tensors"):
            cuda.module.clamp(staged, bound=0.5, counters=counters.data_ptr())


def test_a_misaligned_vector_access(cuda):
    """The kernels ask whether addresses are multiples of 16; here they ask for multiples of 1."""
    asks = ", 15;"
    lines = [line.replace(asks, ", 0;") if "and.b64" in line else line for line in cuda.texts["ema"].splitlines()]
    faulty = "\n".join(lines)
    assert faulty != cuda.texts["ema"].rstrip("\n")
    with cuda.active():
        build.kernels(faulty)
        averages, others = ([at_offset(torch.ones(1000), 1)] for _ in range(2))
        with pytest.raises(RuntimeError, match="an access of 16 bytes is not aligned"):
            trainops.ema_update_(averages, others, 0.5, backend="cuda")
    with cuda.active():
        trainops.ema_update_(*([at_offset(torch.ones(1000), 1)] for _ in range(2)), 0.5, backend="cuda")


def test_a_shared_array_is_read_before_it_was_written(cuda):
    """Warps do not store their sums of floats."""
    text = cuda.texts["reduce"]
    faulty = "\n".join(line for line in text.splitlines() if "st.shared.f32" not in line)
    assert text.count("st.shared.f32") == 3 + 8  # one for each norm, and a run of eight numbers
    with cuda.active():
        build.kernels(faulty)
        with pytest.raises(RuntimeError, match="shared memory is read before it is written"):
            trainops.get_total_norm([torch.ones(1000)], backend="cuda")
    with cuda.active():
        assert trainops.get_total_norm([torch.ones(900)], backend="cuda").item() == 30


@pytest.mark.parametrize("missing", [0, 1])
def test_a_grid_one_block_short(cuda, missing):
    """The others take its chunks, but no block is the last one, which writes the norms and resets the counters."""
    with cuda.active(), cuda.machine.schedule(missing_blocks=missing):
        optimizer, _ = make_step()
        optimizer.step()
        assert bool(optimizer.grad_norm.isfinite()) == (missing == 0)
    with cuda.active(), cuda.machine.schedule(missing_blocks=missing):
        averages, others = ([torch.full((100_000,), x)] for x in (1.0, 2.0))
        trainops.ema_update_(averages, others, 0.5, backend="cuda")
        assert averages[0].eq(1.5).all()
        (scratch,) = _cuda_memory.scratches.values()
        assert bool(scratch.counter_words.eq(0).all()) == (missing == 0)
