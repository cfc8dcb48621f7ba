"""Forked processes and threads: each gets the bits that it would get alone, and none hangs."""

import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import cuda_shim
import pytest
import torch
from contract import same_bits
from targets import CPU_TARGETS, INTERPRETER, TARGETS, Target, over_cpu_targets
from torch import nn
from torch.utils.data import DataLoader, Dataset

import trainops
from trainops import core
from trainops.adapters import cpu, select
from trainops.uploads import Recent

SHORT, LONG = 20, 40  # seconds that a child of the test, and one that has a child of its own, may take
HAS_FORK = "fork" in multiprocessing.get_all_start_methods()

needs_cpu = pytest.mark.skipif(not cpu.probe().available, reason=f"backend cpu: {cpu.probe().reason}")


def forks(test):
    """Mark a test that forks this process, which has many threads: the very thing that Python warns of."""
    test = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")(test)
    return pytest.mark.skipif(not HAS_FORK, reason="this system does not fork")(test)


@pytest.fixture
def four_threads():
    """Loops of PyTorch and of the cpu backend use four threads, however many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def frequent_switches():
    """Python's threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


# Elements of a tensor: several chunks of parallel work, or a few where kernels are emulated, and where the norms of
# PyTorch would depend on the number of threads.
# PyTorch's own operations start threads for more elements, which PyTorch refuses in a forked child's child.
PYTORCHS = {Target("reference", "cpu"): 30_000, Target("foreach", "cpu"): 30_000}
SIZES = PYTORCHS | {Target("cuda", "cpu"): 3_000, Target("triton", "cpu"): 3_000}


def size_for(target):
    return SIZES.get(target, 300_000)


def train(target, numel, seed=0):
    """The tensors after four steps, of which one is skipped."""
    backend, device = target
    generator = torch.Generator().manual_seed(seed)
    model = nn.ParameterList([torch.randn(shape, generator=generator) for shape in ((numel,), (5,), (3, 7))]).to(
        device
    )
    ema = trainops.EMA(model, 0.9, backend=backend)
    optimizer = trainops.AdamW(
        model.parameters(), lr=0.1, max_grad_norm=0.5, skip_nonfinite=True, ema=ema, backend=backend
    )
    before = [x.detach().clone() for x in (*model, *ema.module)]
    results = []
    for step in range(4):
        for param in model:
            param.grad = torch.randn(param.shape, generator=generator).to(device)
        if step == 1:
            model[0].grad[-1] = torch.nan
        optimizer.step()
        results += [optimizer.grad_norm, optimizer.grad_norms]
    assert optimizer.skipped_steps.item() == 1
    assert not any(map(same_bits, (*model, *ema.module), before))
    return [*results, *model, *ema.module, *(x for state in optimizer.state.values() for x in state.values())]


def use_each_op(target, numel, seed=0):
    """What the ops make of such tensors when they are called by themselves."""
    backend, device = target
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    params = [nn.Parameter(random(numel)), nn.Parameter(random(5))]
    averages = [random(numel), random(5)]
    for param in params:
        param.grad = random(*param.shape)
    grads = [param.grad for param in params]
    versions = [[x.clone() for x in (*grads, *averages)]]
    norms = [trainops.clip_grad_norm_(params, 0.1, norm, backend=backend) for norm in (2.0, 1.0, float("inf"))]
    versions.append([x.clone() for x in grads])
    trainops.clip_grad_value_(params, 1e-7, backend=backend)
    trainops.ema_update_(averages, params, 0.5, backend=backend)
    versions.append([*grads, *averages])
    assert not any(same_bits(*pair) for i in (0, 1) for pair in zip(versions[i], versions[i + 1], strict=False))

    kernels = select(backend, device)
    residual, branch, layer_scale = random(6, numel // 48, 8), random(6, numel // 48, 8), random(8)
    mask = torch.tensor([2.0, 0.0, 2.0, 2.0, 0.0, 2.0], device=device).reshape(6, 1, 1)
    out = kernels.drop_path(branch, mask, residual, layer_scale)
    of_branch, of_layer_scale = kernels.drop_path_backward(residual, branch, mask, layer_scale)
    return [*norms, *versions[1], *versions[2], out, of_branch, of_layer_scale]


def draw(target, numel):
    """What DropPath draws from a seed."""
    torch.default_generator.manual_seed(5)
    x = torch.ones(8, numel // 8, device=target.device)
    dropped = trainops.drop_path(x, 0.5, True, backend=target.backend)
    return [dropped, trainops.drop_path_add(x, x, 0.5, True, backend=target.backend)]


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    assert [i for i, pair in enumerate(zip(found, expected, strict=True)) if not same_bits(*pair)] == []


# Processes


def in_forked_child(work, seconds=SHORT):
    """Let a child do ``work``. An error there fails the test, and so does a child that hangs."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(seconds)
    if child.exitcode is None:
        child.kill()
        child.join()
        pytest.fail(f"the child is not done after {seconds} seconds")
    assert child.exitcode == 0


@forks
@over_cpu_targets
@pytest.mark.usefixtures("four_threads")
def test_a_forked_child_gives_the_bits_of_its_parent(target):
    def everything():
        return [x for work in (train, use_each_op, draw) for x in work(target, size_for(target))]

    def check():
        assert_same_bits(everything(), expected)

    def check_and_fork():
        check()
        in_forked_child(check)

    expected = everything()
    in_forked_child(check_and_fork, LONG)
    check()  # the parent can go on


@forks
@needs_cpu
@pytest.mark.usefixtures("four_threads")
def test_any_thread_may_fork():
    target = Target("cpu", "cpu")

    def check():
        assert_same_bits(use_each_op(target, size_for(target)), expected)

    def use_and_fork():
        check()
        in_forked_child(check)

    expected = use_each_op(target, size_for(target))
    thread = threading.Thread(target=use_and_fork)  # pytest fails the test for an error in it
    thread.start()
    thread.join()


class Batches(Dataset):
    """Steps and draws in place of data: whether they have the expected bits."""

    def __init__(self, target):
        self.target = target
        self.expected = self.use_everything()

    def use_everything(self):
        return [x for work in (train, use_each_op, draw) for x in work(self.target, size_for(self.target))]

    def __len__(self):
        return 2

    def __getitem__(self, index):
        assert_same_bits(self.use_everything(), self.expected)
        return index


@forks
@pytest.mark.parametrize(  # the interpreter is slow
    "target", [target for target in CPU_TARGETS if target != INTERPRETER], indirect=True, ids="-".join
)
@pytest.mark.usefixtures("four_threads")
def test_the_workers_of_a_dataloader_give_the_same_bits(target):
    loader = DataLoader(
        Batches(target), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=SHORT
    )
    assert list(loader) == [0, 1]


# Without PyTorch, whose loops would hang in this child. Arrays stand in for its tensors.
NORMS = """
import importlib.util, os, sys
from array import array

def load(name, path):
    spec = importlib.util.spec_from_file_location(f"trainops.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

core, cpu = load("_core", sys.argv[1]), load("_cpu", sys.argv[2])
reader = core.TensorReader()
describe = lambda x: (x.buffer_info()[0], 2, 32, 1, 0, (len(x),), (1,))
reader.configure(api=None, describe=describe, plain_types=(array,))
assert cpu.threads() == 4
table = core.Table(reader, "reduce", {"tensor": [array("f", range(300_000))]}, device_type="cpu")
rows = array("f", [0.0])

def norm():
    return cpu.reduce(table, statistic="l2_norm", rows_out=rows.buffer_info()[0])

alone = norm()
if (child := os.fork()) == 0:
    os._exit(0 if norm() == alone else 1)
assert os.waitpid(child, 0)[1] == 0
assert norm() == alone
"""


@forks
@needs_cpu
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries are not replaced in this way")
def test_a_forked_child_of_an_old_openmp(tmp_path):
    """One that cannot end its threads, which are those of the parent: the child runs loops by itself."""
    source, library = tmp_path / "old.cpp", tmp_path / "old.so"
    source.write_text('extern "C" int omp_pause_resource_all(int) { return -1; }')
    if not (compiler := cuda_shim.compiler()):
        pytest.skip("no C++ compiler for a library that stands in for an old one")
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "4"}
    modules = core._core.__file__, cpu._cpu.__file__
    subprocess.run([sys.executable, "-c", NORMS, *modules], env=environment, timeout=SHORT, check=True)


# Threads


def at_once(*works):
    """What each of them returns, each in a thread of its own."""
    start = threading.Barrier(len(works))

    def run(work):
        start.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(run, work) for work in works]]


# Triton's interpreter keeps the number of the running program in a global variable.
over_threaded_targets = pytest.mark.parametrize(
    "target", [target for target in TARGETS if target != INTERPRETER], indirect=True, ids="-".join
)


@over_threaded_targets
@pytest.mark.usefixtures("frequent_switches")
def test_two_threads_that_step_at_once(target):
    works = [lambda seed=seed: train(target, size_for(target), seed) for seed in (1, 2)]
    expected = [work() for work in works]
    for _ in range(3):
        for found, alone in zip(at_once(*works), expected, strict=True):
            assert_same_bits(found, alone)


@over_threaded_targets
@pytest.mark.usefixtures("frequent_switches")
def test_two_threads_that_use_each_op_at_once(target):
    works = [lambda seed=seed: use_each_op(target, size_for(target), seed) for seed in (1, 2)]
    expected = [work() for work in works]
    for _ in range(3):
        for found, alone in zip(at_once(*works), expected, strict=True):
            assert_same_bits(found, alone)


@over_threaded_targets
@pytest.mark.usefixtures("frequent_switches")
def test_two_threads_that_draw_at_once(target):
    def drop(value):
        x = torch.full((64, 3000), value, device=target.device)
        return [trainops.drop_path_add(x, x, 0.5, True, backend=target.backend) for _ in range(5)]

    for value, results in zip((1.0, 2.0), at_once(lambda: drop(1.0), lambda: drop(2.0)), strict=True):
        first = torch.stack(results)[..., :1]
        assert torch.equal(torch.stack(results), first.expand(5, 64, 3000))  # no sample is dropped in part
        assert set(first.unique().tolist()) == {value, 3 * value}


def test_an_entry_that_another_thread_drops_meanwhile():
    class Overtaken(Recent):
        def move_to_end(self, key):
            super().move_to_end(key)
            del self[key]

    recent = Overtaken(2)
    recent.remember("key", "value")
    assert recent.recall("key") is None
