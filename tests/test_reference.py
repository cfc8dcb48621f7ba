"""Where backends disagreed: dtypes of scalars and sums, devices without float64, and state that fits no parameter."""

import numpy as np
import pytest
import torch
from contract import exact, same_bits
from exact import STATISTICS
from norms import rounding_share
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trainops
from trainops import reference
from trainops.adapters import select

EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor(0.1, dtype=torch.bfloat16), torch.tensor(1)])
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shape", [(), (3,)])
def test_scalars_are_as_float64_sees_them(target, dtype, shape, lr):
    """One step, of which the decay is nearly all: ``1 - lr * weight_decay`` in float32 is some 5e-8 off."""
    param = torch.nn.Parameter(torch.full(shape, 1.7, dtype=dtype, device=target.device))
    param.grad = torch.full(shape, 1e-30, dtype=dtype, device=target.device)
    lr = lr.to(target.device) if isinstance(lr, torch.Tensor) else lr
    before = exact(param)
    trainops.AdamW([param], lr=lr, weight_decay=0.3, eps=1e-3, backend=target.backend).step()
    true = before * (1 - np.longdouble(float(lr)) * np.longdouble(0.3))
    assert (np.abs(exact(param) - true) <= 3 * EPS[dtype] * before).all()


@pytest.mark.parametrize("settings", [{"max_grad_norm": 0.5}, {}], ids=["clipped", "scaled"])
def test_a_coefficient_does_not_promote_a_gradient(target, settings):
    """A 0-dim float32 parameter beside float64 ones, whose norm is float64."""
    tensors = [
        torch.ones((), dtype=torch.float32),
        torch.ones(3, dtype=torch.float64),
        torch.ones((), dtype=torch.float16),
    ]
    params = [torch.nn.Parameter(x.to(target.device, copy=True)) for x in tensors]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = trainops.AdamW(params, lr=0.1, weight_decay=0.0, backend=target.backend, **settings)
    optimizer.grad_scale = torch.full((), 2.0, dtype=torch.float64, device=target.device)
    optimizer.step()
    for param, x in zip(params, tensors, strict=True):
        assert param.dtype == x.dtype
        assert optimizer.state[param]["exp_avg"].dtype == x.dtype
        torch.testing.assert_close(param.detach().cpu(), x - 0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    norm = trainops.clip_grad_norm_(params, 0.5, backend=target.backend)
    assert norm.dtype == torch.float64
    for param, x in zip(params, tensors, strict=True):
        torch.testing.assert_close(param.grad.cpu(), x * (0.5 / 5**0.5))


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, float("inf"), -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.float64])
def test_norms_are_summed_in_float64(target, dtype, norm_type):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) + 0.1 for shape in [(70001,), (), (3, 5)]]
    tensors = [(x * (1 + 1j)).to(dtype) if dtype.is_complex else x.to(dtype) for x in tensors]
    there = [x.to(target.device) for x in tensors]
    total = trainops.get_total_norm(there, norm_type, backend=target.backend)
    # Kernels have the norms of three orders, and of complex numbers the one that their parts have together.
    if norm_type in STATISTICS and (norm_type == 2.0 or not dtype.is_complex):
        of_all, norms = select(target.backend, target.device).reduce(STATISTICS[norm_type], there)
        assert same_bits(of_all, total)
    else:
        norms = reference.grad_norms(there, norm_type)[1]
    total, norms = total.double(), norms.double()
    wide = [np.abs(x.to(torch.complex128).numpy()).astype(np.longdouble) for x in tensors]
    if norm_type == float("inf"):
        true = np.array([x.max() for x in wide])
        true_total = true.max()
    else:
        true = np.array([(x**norm_type).sum() ** (1 / np.longdouble(norm_type)) for x in wide])
        true_total = (true**norm_type).sum() ** (1 / np.longdouble(norm_type))
    # Of float64, an error for each term: in what order torch adds them up depends on the number of threads.
    rtol = 1.01 * 2.0**-24 if dtype != torch.float64 else 70001 * 2.0**-53
    rtol += rounding_share(target, norm_type, dtype != torch.float64)
    np.testing.assert_allclose(norms.cpu(), true.astype(float), rtol=rtol)
    np.testing.assert_allclose(total.cpu(), float(true_total), rtol=rtol)


def test_norm_of_order_0_of_complex_numbers_does_not_warn(target):
    params = [torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64, device=target.device)) for _ in range(2)]
    for param in params:
        param.grad = torch.tensor([1j, 0, 2], device=target.device)
    # The norm of the norms, as in torch: how many of them are not zero.
    assert trainops.get_total_norm([params[0].grad], 0, backend=target.backend) == 1
    assert reference.grad_norms([p.grad for p in params], 0.0)[1].tolist() == [2, 2]


class WithoutFloat64(TorchDispatchMode):
    """A device that refuses float64, as Apple's GPUs do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.float64, torch.complex128) for x in tree_leaves(result)
        ):
            raise TypeError("there is no float64 on this device")
        return result


@pytest.fixture
def without_float64():
    reference.scalar_dtype.cache_clear()
    with WithoutFloat64():
        yield
    reference.scalar_dtype.cache_clear()


def test_devices_without_float64(without_float64):
    model = torch.nn.Linear(3, 2)
    ema = trainops.EMA(model, 0.5, backend="reference")
    options = {"max_grad_norm": 0.5, "skip_nonfinite": True, "amsgrad": True}
    lr = torch.tensor(0.1)
    optimizer = trainops.AdamW(model.parameters(), lr=lr, ema=ema, backend="reference", **options)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(8**0.5 / 2)
    for p, x in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), x * (1 - 0.1 * 1e-2) - 0.1)
    for norm_type in (1.0, 2.0, 2.5, float("inf")):
        norm = trainops.clip_grad_norm_(model.parameters(), 0.5, norm_type, backend="reference")
        assert norm.dtype == torch.float32
    norm = reference.grad_norms([torch.ones(3, dtype=torch.complex64), torch.ones(0)])[0]
    assert norm.item() == pytest.approx(3**0.5)


# Whatever raises has changed nothing


def test_tensors_whose_elements_share_memory_change_nothing(target):
    first, shared = torch.zeros(3, device=target.device), torch.zeros(1, device=target.device).expand(3)
    others = [torch.ones(3, device=target.device)] * 2
    with pytest.raises(RuntimeError, match="share memory"):
        trainops.ema_update_([first, shared], others, 0.5, backend=target.backend)
    params = [torch.nn.Parameter(torch.ones(3, device=target.device)) for _ in range(2)]
    params[0].grad = torch.ones(3, device=target.device)
    params[1].grad = torch.ones(1, device=target.device).expand(3)
    for clip in (trainops.clip_grad_norm_, trainops.clip_grad_value_):
        with pytest.raises(RuntimeError, match="share memory"):
            clip(params, 0.5, backend=target.backend)
    assert same_bits(params[0].grad, torch.ones_like(params[0]))
    assert same_bits(first, torch.zeros_like(first))


def test_a_lazily_conjugated_parameter_is_updated(target):
    """Where it lies: its memory holds the conjugates."""
    base = torch.tensor([1 + 2j, 3 - 1j], device=target.device)
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64, device=target.device))
    param.data = base.conj()
    twin = torch.nn.Parameter(base.conj().resolve_conj().clone())
    for p in (param, twin):
        p.grad = torch.tensor([0.5 + 1j, 2 - 3j], device=target.device)
        trainops.AdamW([p], lr=0.1, backend=target.backend).step()
    assert param.is_conj()
    assert not torch.isclose(twin.detach(), torch.tensor([1 - 2j, 3 + 1j], device=target.device)).any()
    torch.testing.assert_close(param.detach().resolve_conj(), twin.detach())
    torch.testing.assert_close(base, twin.detach().conj().resolve_conj())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            {"exp_avg_sq": torch.zeros(2, dtype=torch.int64)},
            r"exp_avg_sq of torch\.int64 does not fit .* torch\.float32",
        ),
        ({"exp_avg": torch.zeros(2, dtype=torch.complex64)}, r"exp_avg of torch\.complex64 does not fit"),
        ({"step": torch.zeros(2)}, "step must be a one-element tensor"),
        ({"step": 1}, "step must be a one-element tensor"),
        ({"exp_avg": torch.zeros(5)}, r"exp_avg of shape \(5,\) on .* does not fit a parameter of"),
        ({"exp_avg": torch.zeros(1).expand(2)}, "share memory"),
    ],
    ids=["integers", "complex", "steps", "number", "shape", "overlap"],
)
def test_state_that_does_not_fit_changes_nothing(target, spoil, message):
    params = [torch.nn.Parameter(torch.ones(2, device=target.device)) for _ in range(2)]
    optimizer = trainops.AdamW(params, backend=target.backend)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for name, x in spoil.items():
        if isinstance(x, torch.Tensor):
            x = x.to(target.device).as_strided(x.shape, x.stride())  # a copy on another device has no overlap
        optimizer.state[params[1]][name] = x
    tensors = [*params, *(x for p in params for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))]
    before = [x.detach().clone() for x in tensors]
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert all(map(same_bits, tensors, before))


def test_a_step_that_raises_leaves_no_new_state(target):
    params = [torch.nn.Parameter(torch.ones(2, device=target.device)) for _ in range(2)]
    optimizer = trainops.AdamW(params, backend=target.backend)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(3, device=target.device)
    params[1].grad = torch.ones_like(params[1])
    with pytest.raises(RuntimeError, match="exp_avg of shape"):
        optimizer.step()
    assert list(optimizer.state) == params[:1]
    assert torch.equal(params[1], torch.ones_like(params[1]))


@pytest.mark.parametrize(
    "step", [torch.tensor(3.0), torch.tensor([3.0]), torch.tensor(3), torch.tensor([[3.0]]).double()]
)
@pytest.mark.parametrize("shape", [(), (2,)])
def test_step_counts_of_any_kind(target, shape, step):
    param = torch.nn.Parameter(torch.ones(shape, device=target.device))
    optimizer = trainops.AdamW([param], backend=target.backend)
    state = {name: torch.zeros(shape, device=target.device) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[param] = {"step": step.to(target.device, copy=True), **state}
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["step"].cpu(), step + 1)
    correction1, correction2 = 1 - 0.9**4, 1 - 0.999**4
    expected = 1 - 1e-5 - 1e-3 * (0.1 / correction1) / (0.001 / correction2) ** 0.5
    torch.testing.assert_close(param.detach(), torch.full_like(param, expected), rtol=2e-7, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.999, 1 - 1e-7])
def test_bias_corrections_do_not_cancel(target, beta):
    """While gradients stay the same, each step is ``lr`` long: what corrections lose shows in float64."""
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64, device=target.device))
    optimizer = trainops.AdamW([param], lr=0.5, betas=(beta, beta), eps=0.0, weight_decay=0.0, backend=target.backend)
    for step in range(1, 4):
        param.grad = torch.tensor([1.0, -2.0, 1e-3], dtype=torch.float64, device=target.device)
        optimizer.step()
        torch.testing.assert_close(param.detach(), -0.5 * step * param.grad.sign(), rtol=1e-14, atol=0)


def test_max_grad_norm_may_be_a_tensor(target):
    """Of one element, in any shape: it must not make a 0-dim gradient one of another shape."""
    param = torch.nn.Parameter(torch.ones((), device=target.device))
    param.grad = torch.full_like(param, 4.0)
    optimizer = trainops.AdamW([param], max_grad_norm=torch.tensor([2.0]), betas=(0.0, 0.9), backend=target.backend)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["exp_avg"].cpu(), torch.tensor(2.0))
