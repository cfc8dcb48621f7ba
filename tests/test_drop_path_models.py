"""DropPath in models: its modules, other libraries, what traces, compiles and checkpoints it."""

import copy
import pickle

import pytest
import torch
from contract import same_bits
from drop_path_formulas import assert_equal, operands, seeded, timm_drop_path, timm_drop_path_add
from residual_blocks import run_block
from targets import thorough
from torch import nn
from torch.utils.checkpoint import checkpoint

import trainops


def installed(name):
    """A package that works, or the test is skipped."""
    return pytest.importorskip(name, exc_type=(ImportError, RuntimeError))  # the latter where it is built for CUDA


def test_timm_itself():
    timm = installed("timm.layers")
    x = torch.randn(16, 7)
    assert same_bits(seeded(trainops.drop_path, x, 0.3, True), seeded(timm.drop_path, x, 0.3, True))
    assert same_bits(seeded(trainops.DropPath(0.3), x), seeded(timm.DropPath(0.3), x))
    assert repr(trainops.DropPath(0.3)) == repr(timm.DropPath(0.3))


def test_in_a_model_of_timm(monkeypatch):
    vision_transformer = installed("timm.models.vision_transformer")
    for training in (True, False):
        with monkeypatch.context() as patch:
            check_model_of_timm(vision_transformer, patch, training)


def check_model_of_timm(vision_transformer, monkeypatch, training):
    def build():
        torch.manual_seed(0)
        size = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
        return vision_transformer.VisionTransformer(**size, init_values=0.1, drop_path_rate=0.4).train(training)

    timms = build()
    monkeypatch.setattr(vision_transformer, "DropPath", trainops.DropPath)
    ours = build()
    assert sum(isinstance(module, trainops.DropPath) for module in ours.modules()) == 4  # the first block has none
    assert repr(ours) == repr(timms)
    images = torch.randn(16, 3, 32, 32)
    for our, expected in zip(*(run_block(model, model, images) for model in (ours, timms)), strict=True):
        assert_equal(our, expected)


def test_torchvision_itself():
    ops = installed("torchvision.ops")
    for drop_prob in (0.0, 0.3, 1.0):
        for mode in ("row", "batch"):
            check_torchvision(ops.StochasticDepth(drop_prob, mode), mode, drop_prob)


def check_torchvision(torchvisions, mode, drop_prob):
    x = torch.randn(16, 7)
    ours = trainops.DropPath(drop_prob)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = torchvisions(x)
        torch.manual_seed(seed)
        assert same_bits(ours(x) if mode == "row" else ours(x[None])[0], expected)
    assert torch.equal(ours.eval()(x), torchvisions.eval()(x))


class Block(nn.Module):
    """A residual block with layer scale, written with trainops' modules or with timm's formula."""

    def __init__(self, ours=True):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 6)
        self.layer_scale = nn.Parameter(torch.full((6,), 0.3))
        self.drop_path, self.drop_path_add = trainops.DropPath(0.4), trainops.DropPathAdd(0.4)
        self.ours = ours

    def forward(self, x):
        if self.ours:
            x = x + self.drop_path(self.fc1(x))
            return self.drop_path_add(x, self.fc2(x), self.layer_scale)
        x = x + timm_drop_path(self.fc1(x), 0.4, self.training)
        return timm_drop_path_add(x, self.fc2(x), 0.4, self.training, layer_scale=self.layer_scale)


def make_blocks(training):
    ours, timms = Block(), Block(ours=False)
    timms.load_state_dict(ours.state_dict())
    return ours.train(training), timms.train(training), torch.randn(32, 6)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_in_a_model(training, autocast):
    ours, timms, x = make_blocks(training)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = [run_block(block, block, x) for block in (ours, timms)]
    for our, torchs in zip(*results, strict=True):
        assert our.dtype == torchs.dtype
        torch.testing.assert_close(our, torchs)


def test_activation_checkpointing_draws_the_same_mask():
    block, _, x = make_blocks(training=True)
    plain = run_block(block, block, x)
    checkpointed = run_block(lambda x: checkpoint(block, x, use_reentrant=False), block, x)
    for a, b in zip(plain, checkpointed, strict=True):
        assert same_bits(a, b)


@thorough(lambda compiler, **_: compiler == "eager")  # the first half of the other
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_without_a_graph_break(training, compiler):
    torch.compiler.reset()
    block, _, x = make_blocks(training)
    eager = run_block(block, block, x)
    compiled = run_block(torch.compile(block, fullgraph=True, backend=compiler), block, x)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("module_class", [trainops.DropPath, trainops.DropPathAdd])
def test_modules(module_class):
    module = module_class(0.25, scale_by_keep=False)
    assert repr(module) == f"{module_class.__name__}(drop_prob=0.250)"
    assert repr(module_class(1 / 3)) == f"{module_class.__name__}(drop_prob=0.333)"
    assert module.state_dict() == {}
    inputs = operands(torch.float32, "cpu")[: 1 if module_class is trainops.DropPath else 2]
    function = timm_drop_path if len(inputs) == 1 else timm_drop_path_add
    for other in (module, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert other.training
        for mode in (True, False):
            assert torch.equal(seeded(other.train(mode), *inputs), seeded(function, *inputs, 0.25, mode, False))
    assert module_class().eval()(*inputs) is inputs[0] or len(inputs) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # newer PyTorch deprecates its tracer
def test_forward_mode_and_tracers_see_the_formula():
    x = torch.randn(6, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        for out, most in (
            (trainops.drop_path(dual, 0.5, True), 2.0),
            (trainops.drop_path_add(x, dual, 0.5, True), 2.0),
        ):
            tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
            assert set(tangent.unique().tolist()) <= {0.0, most}
    traced = torch.jit.trace(lambda a, b: trainops.drop_path_add(a, b, 0.5, True), (x, x), check_trace=False)
    assert "empty_like" not in str(traced.graph)
    assert set((traced(x, x) / x).round().unique().tolist()) <= {1.0, 3.0}


def test_shapes_can_be_inferred_on_the_meta_device():
    x = torch.empty(4, 3, device="meta")
    out = trainops.drop_path_add(x, x, 0.5, True, layer_scale=torch.empty(3, device="meta"))
    assert out.shape == x.shape
    assert out.device.type == "meta"
