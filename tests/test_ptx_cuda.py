"""The CUDA backend's compiled kernels, executed on the CPU: they give the bits of the C++ shim."""

import functools

import pytest
import test_stochastic_averages
import test_stochastic_rounding
import torch
from code_steps import over_cases, take_steps
from contract import same_bits, same_values
from ptx_fixtures import ARCHITECTURES, backend
from targets import Target, over, thorough
from test_cuda import MIXED, after_steps, everything, make_step
from torch import nn
from training import at_offset

import trainops
from trainops import adapters

PLACES = {
    "aligned": lambda x, role: x.clone(),
    "alike": lambda x, role: at_offset(x, 1),
    "each": lambda x, role: at_offset(x, (3 + role) % 9),
}


pytestmark = thorough(lambda cuda=None, **_: cuda in ARCHITECTURES[1:])


@pytest.fixture(params=ARCHITECTURES, ids=lambda architecture: f"sm_{architecture}")
def cuda(request):
    return backend(request.param)


the_first = pytest.mark.parametrize("cuda", ARCHITECTURES[:1], indirect=True, ids=lambda number: f"sm_{number}")


@functools.cache
def of_the_shim(dtype):
    return everything(dtype)


def is_no_sample_of_places(dtype, place, **_):
    return place == "alike" and dtype != torch.bfloat16


@thorough(is_no_sample_of_places)
@pytest.mark.parametrize("place", PLACES)
def test_every_kernel_gives_the_bits_of_the_shim(cuda, dtype, place):
    true = of_the_shim(dtype)
    with cuda.active():
        results = everything(dtype, PLACES[place])
    assert all(map(same_bits, results, true))


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_mixed_types_give_the_bits_of_the_shim(cuda, dtypes):
    true = after_steps(dtypes=dtypes)
    with cuda.active():
        results = after_steps(dtypes=dtypes, place=PLACES["each"])
    assert all(map(same_bits, results, true))


def stochastic_steps():
    """Of special rows, beside others: tails, one by one, and averages by themselves."""
    target = Target("cuda", "cpu")
    rules = (trainops.AdamW, trainops.Adam, trainops.SGD)
    found = [x for cls in rules for x in test_stochastic_rounding.mixed_steps(target, 2, cls)]
    return [*found, *test_stochastic_averages.move(*test_stochastic_averages.make(target), 2)]


def test_stochastic_rounding_gives_the_bits_of_the_shim(cuda):
    true = stochastic_steps()
    with cuda.active():
        results = stochastic_steps()
    assert all(map(same_bits, results, true))


@over_cases
@over("place", PLACES)
def test_codes_give_the_bits_of_the_shim(cuda, case, place):
    """Those of infinities and NaN among them."""
    true = take_steps("cuda", "cpu", case)
    with cuda.active():
        results = take_steps("cuda", "cpu", case, place)
    assert all(map(same_values, results, true))


@the_first
@thorough(lambda seed, dtype, **_: seed > 2 or dtype != torch.float32)
@pytest.mark.parametrize("seed", range(1, 26))  # in each of four dtypes
def test_any_interleaving_gives_the_same_bits(cuda, dtype, seed):
    """Several blocks at a time, whose threads are interrupted anywhere."""
    true = of_the_shim(dtype)
    with cuda.active(), cuda.machine.schedule(resident=1 + seed % 8, seed=seed):
        results = everything(dtype)
    assert all(map(same_bits, results, true))


# Whole packs of one chunk, so that nothing goes one by one.
COLUMNS, NUMEL = ("param", "grad", "average", "exp_avg", "exp_avg_sq"), 2048


@the_first
@pytest.mark.parametrize("unaligned", [None, *COLUMNS])
@pytest.mark.parametrize("offset", [1, 2])
def test_an_unaligned_tensor_alone_has_narrow_accesses(cuda, dtype, unaligned, offset):
    with cuda.active():
        placed = {name: at_offset(torch.ones(NUMEL, dtype=dtype), offset * (name == unaligned)) for name in COLUMNS}
        param = nn.Parameter(placed["param"])
        param.grad = placed["grad"]
        model = nn.ParameterList([param])
        ema = trainops.EMA(model, 0.5, backend="cuda")
        ema.module[0].data = placed["average"]
        optimizer = trainops.AdamW([param], ema=ema, backend="cuda")
        moments = {name: placed[name] for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = {"step": torch.tensor(1.0), **moments}
        cuda.machine.accesses()
        optimizer.step()
        found = cuda.machine.accesses()
    of_column, moved = NUMEL * dtype.itemsize // 16, {name: 1 if name == "grad" else 2 for name in COLUMNS}
    narrow = 0 if unaligned is None or offset * dtype.itemsize % 16 == 0 else moved[unaligned]
    assert found[16] == of_column * (sum(moved.values()) - narrow)
    width = 2 if offset * dtype.itemsize % 4 else 4
    assert found[width] - 16 // width * of_column * narrow in range(100)  # the others are of a table's words
    assert param.eq(param[0]).all()


@the_first
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_aligned_codes_have_accesses_of_eight_bytes(cuda, dtype):
    found = []
    for offset in (0, 8, 1):
        with cuda.active():
            param = nn.Parameter(torch.ones(NUMEL, dtype=dtype))
            param.grad = torch.ones_like(param)
            optimizer = trainops.AdamW([param], state_dtype="int8", backend="cuda")
            optimizer.init_state()
            its = optimizer.state[param]
            its |= {name: at_offset(its[name], offset) for name in ("exp_avg_codes", "exp_avg_sq_codes")}
            cuda.machine.accesses()
            optimizer.step()
            found.append(cuda.machine.accesses())
    aligned, also_aligned, unaligned = found
    moved = 2 * 2 * NUMEL  # two moments, read and written
    assert aligned == also_aligned
    assert [aligned[width] - unaligned[width] for width in (16, 8, 1)] == [0, moved // 8, -moved]


@the_first
def test_a_step_is_two_launches(cuda):
    with cuda.active():
        optimizer, _ = make_step()
        cuda.machine.launches()
        optimizer.step()
    devices, names = zip(*cuda.machine.launches(), strict=True)
    assert devices == (0, 0)
    assert ["reduce_kernel" in names[0], "update_kernel" in names[1]] == [True, True]


@the_first
@pytest.mark.parametrize(("launch", "kernel"), [(1, "l2_norm"), (2, "adamw")])
def test_an_error_of_a_launch_names_the_kernel(cuda, launch, kernel):
    with cuda.active():
        optimizer, _ = make_step()
        cuda.machine.fail(launch)
        with pytest.raises(RuntimeError, match=f"kernel {kernel}: unspecified launch failure"):
            optimizer.step()
        optimizer.step()


@the_first
def test_a_device_whose_kernels_do_not_load_goes_to_the_next_backend(cuda, monkeypatch):
    """Of two devices, one is of an architecture that the build has no code for."""
    monkeypatch.delenv("TRAINOPS_BACKEND", raising=False)
    monkeypatch.setattr(adapters, "PREFERENCE", {"cpu": ("cuda", "foreach")})
    adapters._select.cache_clear()
    with cuda.active(), cuda.machine.without_image(1):
        assert adapters.select(None, "cpu:0") is adapters.select("cuda", "cpu:0")
        assert adapters.serving("cpu:1") == "foreach"
        assert adapters.passed_over("cpu:0") == {}
        why = "compute capability 7.0: no kernel image is available"
        assert why in adapters.passed_over("cpu:1")["cuda"]
        with pytest.raises(RuntimeError, match=f"'cuda' does not take tensors on 'cpu:1': {why}"):
            adapters.select("cuda", "cpu:1")
        assert cuda.module.refusal(device=0) == ""
        assert "invalid device" in cuda.module.refusal(device=2)
    adapters._select.cache_clear()


def test_every_kernel_is_run(cuda):
    """By what the tests above do."""
    cuda.machine.launches()
    with cuda.active():
        for dtype in (torch.float32, torch.float64):
            everything(dtype)
            everything(dtype, PLACES["each"])
        stochastic_steps()
    run = {name for _, name in cuda.machine.launches()}
    assert run == {name for names in cuda.kernels().values() for name in names}
    assert len(run) > 10
