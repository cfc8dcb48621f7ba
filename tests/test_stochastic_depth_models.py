"""Stochastic depth in models: its module, and what traces, compiles, checkpoints and captures it."""

import copy
import pickle
import shutil

import pytest
import torch
from contract import same_bits
from drop_path_formulas import seeded
from residual_blocks import run_block
from stochastic_depth_formulas import SHAPE, Branch, modes
from targets import thorough
from torch import nn
from torch.utils.checkpoint import checkpoint

import trainops
from trainops.stochastic_depth import MODES


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


@thorough(lambda training, autocast, mode: not training and (autocast or mode == "bernoulli"))
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


class SmallBlock(nn.Module):
    """As few operations as it takes to have each of trainops' residual sums but one."""

    def __init__(self, dim=16):
        super().__init__()
        self.fc, self.gamma = nn.Linear(dim, dim), nn.Parameter(torch.full((dim,), 0.5))
        self.drop_path, self.drop_path_add = trainops.DropPath(0.3), trainops.DropPathAdd(0.3)
        self.fixed = trainops.StochasticDepth(0.4)

    def forward(self, x):
        x = x + self.drop_path(torch.tanh(x))
        x = self.drop_path_add(x, torch.tanh(x), self.gamma)
        return self.fixed(x, self.fc, self.gamma)


# Inductor takes ten seconds for the smaller one, and twenty for the larger, where nothing is in its cache.
@thorough(lambda block_class, training: block_class is not SmallBlock or not training)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("block_class", [SmallBlock, ViTBlock])
def test_inductor_compiles_a_block(block_class, training):
    torch.compiler.reset()
    block, x = block_class().train(training), torch.randn(10, 6, 16)
    options = {"fallback_random": True}  # its own random numbers would be others
    compiled = run_block(torch.compile(block, fullgraph=True, options=options), block, x)
    for a, b in zip(run_block(block, block, x), compiled, strict=True):
        torch.testing.assert_close(a, b)


@thorough(lambda **_: True)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graph():
    for mode in MODES:
        check_cuda_graph(mode)


def check_cuda_graph(mode):
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
