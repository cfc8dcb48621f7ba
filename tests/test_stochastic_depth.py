"""Stochastic depth that computes the kept samples alone: what is kept, the numbers, the statistics, autograd."""

import copy
import importlib
import math
import pickle
import shutil

import pytest
import torch
from contract import assert_contract, exact, same_bits
from test_drop_path import run_block, seeded, sum_to, timm_drop_path, timm_drop_path_add
from torch import nn
from torch.utils.checkpoint import checkpoint

import trainops
from trainops.stochastic_depth import MODES

SHAPE = (12, 5, 8)
LAYER_SCALES = {"no_scale": None, "last_dim": (8,), "positions": (5, 1), "scalar": ()}

modes = pytest.mark.parametrize("mode", MODES)
scales = pytest.mark.parametrize("scale_shape", LAYER_SCALES.values(), ids=LAYER_SCALES)


class Branch(nn.Module):
    """Each element by itself, so that its bits do not depend on the batch. Keeps what it was called with."""

    def __init__(self, dtype=torch.float32, device="cpu"):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, SHAPE[-1]).to(device, dtype))
        self.calls = []

    def forward(self, x):
        self.calls.append(x.detach().clone())
        return x * self.weight


def fixed_formula(residual, branch, drop_prob, training=True, scale_by_keep=True, layer_scale=None):
    """The docstring's, in PyTorch."""
    batch = len(residual)
    kept = torch.randperm(batch, device=residual.device)[: max(1, round(batch * (1 - drop_prob)))]
    scaled = branch(residual[kept]) * (1.0 if layer_scale is None else layer_scale)
    return residual.index_add(0, kept, scaled * (batch / len(kept) if scale_by_keep else 1.0))


def bernoulli_formula(residual, branch, *args, layer_scale=None):
    return timm_drop_path_add(residual, branch(residual), *args, layer_scale=layer_scale)


def both_ways(target, mode, inputs, drop_prob=0.4, scale_by_keep=True):
    """Output and gradients of ours and of the formula, for the same numbers and the same seed."""
    residual, layer_scale, grad = inputs
    results = []
    for ours in (True, False):
        branch = Branch(residual.dtype, target.device)
        x = residual.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        scale = None if layer_scale is None else layer_scale.detach().clone().requires_grad_()
        args = (x, branch, drop_prob, True, scale_by_keep)
        if ours:
            out = seeded(trainops.stochastic_depth, *args, layer_scale=scale, mode=mode, backend=target.backend)
        else:
            out = seeded(fixed_formula if mode == "fixed" else bernoulli_formula, *args, layer_scale=scale)
        needed = [p for p in (x, branch.weight, scale) if p is not None]
        results.append([out.detach(), *torch.autograd.grad(out, needed, grad)])
    return results


def make_inputs(dtype, device, scale_shape=None, shape=SHAPE):
    residual, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return residual, None if scale_shape is None else torch.randn(scale_shape, device=device).to(dtype), grad


def truth(mode, inputs, scale_by_keep, drop_prob=0.4):
    """Output and gradients in extended precision."""
    residual, layer_scale, grad = inputs
    kept = seeded(
        trainops.stochastic_depth,
        torch.zeros_like(residual),
        torch.ones_like,
        drop_prob,
        True,
        False,
        mode=mode,
        backend="reference",
    )
    mask = exact(kept) / ((exact(kept).mean() if mode == "fixed" else 1 - drop_prob) if scale_by_keep else 1)
    r, g, weight = exact(residual), exact(grad), exact(Branch(residual.dtype).weight)
    scale = 1 if layer_scale is None else exact(layer_scale)
    out = [r + r * weight * scale * mask, g * (1 + weight * scale * mask), sum_to(g * scale * mask * r, (8,))]
    return out if layer_scale is None else [*out, sum_to(g * mask * r * weight, layer_scale.shape)]


# Not the scalar one: its gradient is a single number, whose error in PyTorch is sometimes none at all.
@modes
@pytest.mark.parametrize("scale_shape", [None, (8,), (5, 1)], ids=str)
@pytest.mark.parametrize("scale_by_keep", [True, False], ids=["scaled", "unscaled"])
def test_numbers(target, dtype, mode, scale_shape, scale_by_keep):
    inputs = make_inputs(dtype, target.device, scale_shape)
    ours, torchs = both_ways(target, mode, inputs, scale_by_keep=scale_by_keep)
    if mode == "bernoulli":
        assert torch.equal(ours[0], torchs[0])  # timm's, bit for bit
    for our, expected, true in zip(ours, torchs, truth(mode, inputs, scale_by_keep), strict=True):
        assert_contract(our, true, expected)


@modes
@pytest.mark.parametrize("drop_prob", [0.05, 0.3, 0.7, 0.99, 1.0])
def test_the_branch_is_run_on_kept_samples_alone(target, mode, drop_prob):
    residual = torch.randn(SHAPE, device=target.device)
    branch = Branch(device=target.device)
    out = seeded(trainops.stochastic_depth, residual, branch, drop_prob, True, mode=mode, backend=target.backend)
    changed = (out != residual).flatten(1).any(1)
    if mode == "fixed":
        count = max(1, round(len(residual) * (1 - drop_prob)))
        assert len(branch.calls[0]) == count
        assert changed.sum() == (count if drop_prob < 1 else 0)
    else:
        mask = seeded(timm_drop_path, torch.ones_like(residual), drop_prob, True)
        assert torch.equal(changed, mask[:, 0, 0] != 0)
        assert len(branch.calls[0]) == max(1, changed.sum())
    assert len(branch.calls) == 1
    assert same_bits(out[~changed], residual[~changed])
    if changed.any():
        rows = {tuple(x.flatten().tolist()) for x in branch.calls[0]}
        assert rows == {tuple(x.flatten().tolist()) for x in residual[changed]}


@modes
@pytest.mark.parametrize(("drop_prob", "training"), [(0.0, True), (0.5, False), (1.0, False)])
def test_nothing_is_dropped_where_nothing_can_be(target, mode, drop_prob, training):
    residual, branch = torch.randn(SHAPE, device=target.device), Branch(device=target.device)
    scale = torch.randn(8, device=target.device)
    state = torch.get_rng_state()
    out = trainops.stochastic_depth(
        residual, branch, drop_prob, training, layer_scale=scale, mode=mode, backend=target.backend
    )
    assert torch.equal(out, residual + branch(residual) * scale)
    assert len(branch.calls[0]) == len(residual)
    assert torch.equal(state, torch.get_rng_state())


@modes
@pytest.mark.parametrize("drop_prob", [0.5, 1.0])
def test_batches_of_none_and_of_one(target, mode, drop_prob):
    branch = Branch(device=target.device)
    for batch in (0, 1):
        residual = torch.randn((batch, *SHAPE[1:]), device=target.device, requires_grad=True)
        out = trainops.stochastic_depth(residual, branch, drop_prob, True, False, mode=mode, backend=target.backend)
        out.sum().backward()
        assert residual.grad.shape == residual.shape
        if drop_prob == 1.0:
            assert same_bits(out, residual)
        elif mode == "fixed":
            assert torch.equal(out, residual + branch(residual))


CUTS = {
    "class_token": lambda x: x[:, 0],
    "channels": lambda x: x[:, :3],
    "expanded": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.transpose(1, 2),
}


@modes
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_residuals_with_gaps(target, mode, cut):
    """Also where one sample is kept, whose stride says nothing, and the branch's result is such a cut, too."""
    residual = cut(torch.randn(SHAPE, device=target.device))

    def branch(x):
        return x.as_strided(x.shape, (residual.stride(0), *x.stride()[1:])) * 2 if len(x) == 1 else x * 2

    for drop_prob in (0.4, 0.9):
        for seed in range(5):
            outs = []
            for backend in (target.backend, "reference"):
                torch.manual_seed(seed)
                outs.append(trainops.stochastic_depth(residual, branch, drop_prob, True, mode=mode, backend=backend))
            assert torch.equal(*outs)


FUSED = {
    "contiguous": (SHAPE, None, torch.contiguous_format),
    "last_dim": (SHAPE, (8,), torch.contiguous_format),
    "last_dim_of_3": (SHAPE, (1, 1, 8), torch.contiguous_format),
    "channels_last": ((12, 5, 4, 8), None, torch.channels_last),
    "channels_last_scaled": ((12, 5, 4, 8), (5, 1, 1), torch.channels_last),
}


@pytest.mark.parametrize("function", ["drop_path_add", *MODES])
@pytest.mark.parametrize(("shape", "scale_shape", "memory_format"), FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16)], ids=["same", "mixed"])
def test_kernels_serve(target, monkeypatch, function, shape, scale_shape, memory_format, dtypes):
    """None of these is left to the reference, forward or backward, and the branch gets the layout of its residual."""
    if target.backend == "reference":
        pytest.skip("is the reference")
    residual, layer_scale, grad = make_inputs(torch.float32, target.device, scale_shape, shape)
    residual, grad = (x.to(dtypes[0]).contiguous(memory_format=memory_format) for x in (residual, grad))
    layer_scale = None if layer_scale is None else layer_scale.to(dtypes[1]).requires_grad_()
    monkeypatch.setattr(importlib.import_module("trainops.backends._drop_path"), "reference", None)

    def branch(x):
        assert x.is_contiguous(memory_format=memory_format)
        return x.to(dtypes[1]) * 2

    args = (0.4, True, True, layer_scale)
    residual.requires_grad_()
    if function == "drop_path_add":
        out = trainops.drop_path_add(residual, branch(residual), *args, backend=target.backend)
    else:
        out = trainops.stochastic_depth(residual, branch, *args, function, backend=target.backend)
    assert out.is_contiguous(memory_format=memory_format)
    out.backward(grad)


@modes
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_others_that_look_on(mode):
    """Tracers, vmap, forward-mode derivatives and fake tensors see operations, not a kernel's result."""
    residual, branch = torch.randn(6, 4), lambda x: x * 2
    depth = trainops.StochasticDepth(0.5, mode=mode)
    traced = torch.jit.trace(lambda x: depth.eval()(x, branch), (residual,))
    assert torch.equal(traced(residual + 1), 3 * (residual + 1))
    depth.train()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(residual, torch.ones_like(residual))
        tangent = torch.autograd.forward_ad.unpack_dual(depth(dual, branch)).tangent
    assert set(tangent.unique().tolist()) <= {1.0, 1.0 + 2 * 2}
    mapped = torch.func.vmap(lambda x: depth(x, branch), randomness="different")(residual.expand(3, 6, 4))
    assert mapped.shape == (3, 6, 4)
    with torch._subclasses.FakeTensorMode():
        assert depth(torch.empty(6, 4), branch).shape == (6, 4)


@modes
@scales
def test_where_nothing_is_kept_gradients_are_zero(target, mode, scale_shape):
    """DDP waits for a gradient of every parameter. A branch that is dropped does no harm, whatever it holds."""
    residual, layer_scale, grad = make_inputs(torch.float32, target.device, scale_shape)
    branch = Branch(device=target.device)
    inputs = [x.requires_grad_() for x in (residual, layer_scale) if x is not None]
    out = trainops.stochastic_depth(
        residual, lambda x: branch(x) * math.inf, 1.0, True, True, layer_scale, mode, backend=target.backend
    )
    assert same_bits(out, residual)
    assert len(branch.calls[0]) == 1
    out = trainops.stochastic_depth(residual, branch, 1.0, True, True, layer_scale, mode, backend=target.backend)
    of_residual, *others = torch.autograd.grad(out, [*inputs, branch.weight], grad)
    assert same_bits(of_residual, grad)
    assert all(x.count_nonzero() == 0 for x in others)


@modes
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layouts_are_kept(target, mode, memory_format):
    residual, _, grad = make_inputs(torch.float32, target.device, None, (12, 5, 4, 8))
    inputs = [residual.contiguous(memory_format=memory_format), None, grad.contiguous(memory_format=memory_format)]
    ours, torchs = both_ways(target, mode, inputs)
    for our, expected in zip(ours, torchs, strict=True):
        torch.testing.assert_close(our, expected)
    assert ours[0].is_contiguous(memory_format=memory_format)


@modes
@scales
def test_gradcheck(target, mode, scale_shape):
    shape = (5, 2, 2)
    scale_shape = {(8,): (2,), (5, 1): (2, 1)}.get(scale_shape, scale_shape)
    residual, layer_scale, _ = make_inputs(torch.float64, target.device, scale_shape, shape)
    weight = torch.randn(2, dtype=torch.float64, device=target.device)
    inputs = [x.requires_grad_() for x in (residual, weight, layer_scale) if x is not None]

    def function(residual, weight, layer_scale=None):
        return seeded(
            trainops.stochastic_depth,
            residual,
            lambda x: torch.tanh(x) * weight,
            0.4,
            True,
            layer_scale=layer_scale,
            mode=mode,
            backend=target.backend,
        )

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@modes
def test_func_grad(mode):
    residual, branch = torch.randn(SHAPE), Branch()

    def loss(function, residual, **options):
        return function(residual, branch, 0.4, True, **options).square().sum()

    ours = seeded(torch.func.grad(loss, argnums=1), trainops.stochastic_depth, residual, mode=mode)
    formula = fixed_formula if mode == "fixed" else bernoulli_formula
    torch.testing.assert_close(ours, seeded(torch.func.grad(loss, argnums=1), formula, residual))


@modes
@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.9])
def test_rate_and_expectation(target, mode, drop_prob):
    batch, draws = 50, 400
    kept = torch.zeros(draws, batch, device=target.device)
    for row in kept:
        row.copy_(
            trainops.stochastic_depth(
                torch.zeros(batch, 1, device=target.device),
                torch.ones_like,
                drop_prob,
                True,
                mode=mode,
                backend=target.backend,
            )[:, 0]
        )
    counts = (kept != 0).sum(1)
    if mode == "fixed":
        assert set(counts.tolist()) == {round(batch * (1 - drop_prob))}
    # Six standard deviations of a binomial distribution: over all, and for each sample by itself.
    total_bound, bound = (6 * math.sqrt(drop_prob * (1 - drop_prob) / n) for n in (batch * draws, draws))
    assert abs((kept == 0).double().mean().item() - drop_prob) <= total_bound
    assert ((kept == 0).double().mean(0) - drop_prob).abs().max() < bound
    assert abs(kept.double().mean().item() - 1) <= total_bound / (1 - drop_prob)


def test_the_expected_value_is_exact_where_the_rate_is_rounded():
    kept = trainops.stochastic_depth(torch.zeros(7, 1), torch.ones_like, 0.4, True)  # 4 of 7
    torch.testing.assert_close(kept.sum(), torch.tensor(7.0))


class Block(nn.Module):
    """A residual block with layer scale, of which ``drop`` makes the residual sums."""

    def __init__(self, mode):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layer_scale = nn.Parameter(torch.full((8,), 0.3))
        self.drop = trainops.StochasticDepth(0.4, mode=mode)

    def forward(self, x):
        x = self.drop(x, lambda x: torch.tanh(self.fc1(x)))
        return self.drop(x, self.fc2, self.layer_scale)


@modes
def test_activation_checkpointing_keeps_the_same_samples(mode):
    block, x = Block(mode), torch.randn(SHAPE)
    plain = run_block(block, block, x)
    for reentrant in (False, True):
        checkpointed = run_block(lambda x, r=reentrant: checkpoint(block, x, use_reentrant=r), block, x)
        for a, b in zip(plain, checkpointed, strict=True):
            assert same_bits(a, b)


@modes
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_compiles_without_a_graph_break(mode, training, autocast):
    torch.compiler.reset()
    block, x = Block(mode).train(training), torch.randn(SHAPE)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager = run_block(block, block, x)
        compiled = run_block(torch.compile(block, fullgraph=True, backend="aot_eager"), block, x)
    tolerances = {"rtol": 0.02, "atol": 0.02} if autocast else {}
    for a, b in zip(eager, compiled, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerances)


class ViTBlock(nn.Module):
    """Attention and an MLP, with each of trainops' residual sums."""

    def __init__(self, dim=16):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))
        self.drop_path, self.drop_path_add = trainops.DropPath(0.3), trainops.DropPathAdd(0.3)
        self.fixed, self.bernoulli = trainops.StochasticDepth(0.4), trainops.StochasticDepth(0.4, mode="bernoulli")

    def attend(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))

    def forward(self, x):
        x = x + self.drop_path(self.attend(x))
        x = self.drop_path_add(x, self.mlp(x), self.gamma)
        x = self.fixed(x, self.attend, self.gamma)
        return self.bernoulli(x, self.mlp)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inductor_compiles_a_vit_block(training):
    torch.compiler.reset()
    block, x = ViTBlock().train(training), torch.randn(10, 6, 16)
    options = {"fallback_random": True}  # its own random numbers would be others
    compiled = run_block(torch.compile(block, fullgraph=True, options=options), block, x)
    for a, b in zip(run_block(block, block, x), compiled, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_compiles_many_calls():
    """Of more than four gathers with duplicates in a graph, it computed wrong gradients."""
    torch.compiler.reset()
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    class Stack(nn.Module):
        def forward(self, x):
            for layer in layers:
                x = trainops.stochastic_depth(x, layer, 0.3, True, backend="reference")
            return x

    stack, x = Stack(), torch.randn(16, 5, 8)
    compiled = run_block(torch.compile(stack, fullgraph=True, options={"fallback_random": True}), stack, x)
    for a, b in zip(run_block(stack, stack, x), compiled, strict=True):
        torch.testing.assert_close(a, b)


@modes
def test_autocast_promotes_as_pytorch(mode):
    block, x = Block(mode), torch.randn(SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
        assert out.dtype == torch.float32  # of a float32 residual and a bfloat16 branch
        assert trainops.stochastic_depth(x.bfloat16(), block.fc1, 0.4, True, mode=mode).dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


@modes
def test_cuda_graph(mode):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    residual, branch = torch.randn(SHAPE, device="cuda"), Branch(device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        trainops.stochastic_depth(residual, branch, 0.4, True, mode=mode)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = trainops.stochastic_depth(residual, branch, 0.4, True, mode=mode)
    draws = set()
    for _ in range(20):
        graph.replay()
        changed = (out != residual).flatten(1).any(1)
        draws.add(tuple(changed.tolist()))
        assert mode == "bernoulli" or changed.sum() == 7
    assert len(draws) > 1


@modes
def test_module(mode):
    module = trainops.StochasticDepth(0.25, scale_by_keep=False, mode=mode)
    assert repr(module) == f"StochasticDepth(drop_prob=0.250, mode={mode!r})"
    assert module.state_dict() == {}
    x = torch.randn(SHAPE)
    for other in (module, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        for training in (True, False):
            expected = seeded(trainops.stochastic_depth, x, torch.tanh, 0.25, training, False, mode=mode)
            assert same_bits(seeded(other.train(training), x, torch.tanh), expected)


X = torch.ones(4, 3)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"drop_prob": -0.1}, ValueError, r"drop_prob.*-0\.1"),
        ({"drop_prob": 1.1}, ValueError, r"drop_prob.*1\.1"),
        ({"drop_prob": math.nan}, ValueError, r"drop_prob.*nan"),
        ({"drop_prob": "often"}, TypeError, "drop_prob.*'often'"),
        ({"drop_prob": torch.tensor(0.5)}, TypeError, r"drop_prob.*tensor\(0\.5"),
        ({"scale_by_keep": "row"}, TypeError, "scale_by_keep.*str"),
        ({"scale_by_keep": X}, TypeError, "scale_by_keep.*Tensor"),
        ({"mode": "row"}, ValueError, "mode.*'fixed', 'bernoulli'.*'row'"),
        ({"branch": X}, TypeError, "branch.*Tensor.*drop_path_add"),
        ({"branch": lambda x: x[:, :2]}, ValueError, r"branch.*\(\d, 2\).*\(\d, 3\)"),
        ({"branch": lambda x: x[:1, :1]}, ValueError, r"branch.*\(1, 1\).*\(\d, 3\)"),
        ({"branch": lambda x: (x, x)}, TypeError, "branch.*tuple"),
        ({"branch": lambda x: x.to("meta")}, ValueError, "meta.*cpu"),
        ({"layer_scale": torch.ones(4)}, ValueError, r"layer_scale.*\(4,\).*\(4, 3\)"),
        ({"layer_scale": torch.ones(4, 1)}, ValueError, r"layer_scale.*\(4, 1\).*\(4, 3\)"),
        ({"layer_scale": torch.ones(3, device="meta")}, ValueError, "cpu.*layer_scale.*meta"),
        ({"layer_scale": 0.1}, TypeError, "layer_scale must be a tensor, got float"),
        ({"residual": torch.tensor(1.0)}, ValueError, "residual.*at least one dimension"),
        ({"residual": [1.0]}, TypeError, "residual must be a tensor, got list"),
        ({"backend": "fpga"}, ValueError, "fpga"),
    ],
)
def test_bad_input(arguments, error, message, training):
    calls = {"residual": X, "branch": torch.tanh, "drop_prob": 0.5, "training": training} | arguments
    with pytest.raises(error, match=message):
        trainops.stochastic_depth(**calls)


@pytest.mark.parametrize("mode", ["fixed", "bernoulli"])
def test_integers_are_not_dropped(mode):
    with pytest.raises(TypeError, match=r"floating-point tensors.*got torch\.int64"):
        trainops.stochastic_depth(X.long(), torch.neg, 0.5, True, mode=mode)
    assert trainops.stochastic_depth(X.long(), torch.neg, 0.5, False, mode=mode).dtype == torch.int64


@pytest.mark.parametrize("arguments", [{"drop_prob": 2.0}, {"mode": "batch"}])
def test_bad_module(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        trainops.StochasticDepth(**arguments)
