"""DropPath in what traces, scripts and exports a model: wherever timm's two lines are taken, so are ours."""

import pickle

import pytest
import torch
from contract import same_bits
from drop_path_formulas import assert_equal, seeded, timm_drop_path, timm_drop_path_add
from stochastic_depth_formulas import modes
from targets import over
from torch import nn

import trainops


class TimmDropPath(nn.Module):
    """timm's class."""

    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return timm_drop_path(x, self.drop_prob, self.training)


class Block(nn.Module):
    """Two residual sums, each with a class to drop with."""

    def __init__(self, drop_path=trainops.DropPath):
        super().__init__()
        self.fc, self.drop_path = nn.Linear(6, 6), drop_path(0.4)

    def forward(self, x):
        return x + self.drop_path(self.fc(x))


class AddBlock(nn.Module):
    """The same with trainops' own sums, one of them with a layer scale."""

    def __init__(self):
        super().__init__()
        self.fc, self.drop_path_add = nn.Linear(6, 6), trainops.DropPathAdd(0.4)
        self.layer_scale = nn.Parameter(torch.full((6,), 0.3))

    def forward(self, x):
        x = self.drop_path_add(x, self.fc(x))
        return self.drop_path_add(x, self.fc(x), self.layer_scale)

    def with_timms(self, x):
        x = timm_drop_path_add(x, self.fc(x), 0.4, self.training)
        return timm_drop_path_add(x, self.fc(x), 0.4, self.training, layer_scale=self.layer_scale)


class StochasticDepthBlock(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.fc, self.drop = nn.Linear(6, 6), trainops.StochasticDepth(0.4, mode=mode)
        with torch.no_grad():  # integers: on some processors, a product rounds otherwise beside other samples
            self.fc.weight.copy_(torch.randint(-4, 5, (6, 6)))
            self.fc.bias.copy_(torch.randint(-4, 5, (6,)))

    def forward(self, x):
        return self.drop(x, self.fc)


training_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def check_follows(traced, block, batches=(32, 5)):
    """A traced block does what the block does, for any batch, with the same random numbers."""
    for batch in batches:
        x = torch.randint(-4, 5, (batch, 6)).float()
        out = seeded(traced, x)
        assert_equal(out, seeded(block, x))
        assert not torch.equal(out, x)


@training_modes
def test_symbolic_trace_takes_the_class_as_timms(training):
    ours, timms = (Block(drop_path).train(training) for drop_path in (trainops.DropPath, TimmDropPath))
    timms.load_state_dict(ours.state_dict())
    graphs = [torch.fx.symbolic_trace(block) for block in (ours, timms)]
    ours, theirs = ([(node.op, node.target) for node in traced.graph.nodes] for traced in graphs)
    assert ours == theirs
    check_follows(pickle.loads(pickle.dumps(graphs[0])), timms)


@training_modes
def test_symbolic_trace_of_the_sums(training):
    block = AddBlock().train(training)
    check_follows(torch.fx.symbolic_trace(block), block.with_timms)


@training_modes
@modes
def test_symbolic_trace_of_stochastic_depth(mode, training):
    block = StochasticDepthBlock(mode).train(training)
    check_follows(torch.fx.symbolic_trace(block), block)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@training_modes
@pytest.mark.parametrize("block_class", [Block, AddBlock])
def test_torchscript(block_class, training):
    block = block_class().train(training)
    scripted = torch.jit.script(block)
    check_follows(scripted, block)
    check_follows(scripted.train(not training), block.train(not training))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_of_the_functions():
    def with_defaults(x: torch.Tensor) -> torch.Tensor:
        return drop_path(drop_path(x), 0.5, True, False)

    drop_path = trainops.drop_path
    x = torch.randn(64, 3)
    assert same_bits(seeded(torch.jit.script(with_defaults), x), seeded(timm_drop_path, x, 0.5, True, False))


BLOCKS = {
    "drop_path": Block,
    "drop_path_add": AddBlock,
    "fixed": lambda: StochasticDepthBlock("fixed"),
    "bernoulli": lambda: StochasticDepthBlock("bernoulli"),
}


@training_modes
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@over("make", BLOCKS)
def test_export_with_a_dynamic_batch(make, strict, training):
    block = make().train(training)
    shapes = ({0: torch.export.Dim("batch", min=2, max=1024)},)
    exported = torch.export.export(block, (torch.randn(8, 6),), dynamic_shapes=shapes, strict=strict)
    check_follows(exported.module(check_guards=False), block)


@pytest.mark.parametrize("residual", [torch.randn(6, 4), -torch.zeros(6, 4)], ids=["finite", "minus_zero"])
def test_a_dropped_samples_branch_is_of_no_effect_in_a_trace(residual):
    class Sum(nn.Module):
        def forward(self, residual, branch):
            return trainops.drop_path_add(residual, branch, 1.0, True)

    branch = torch.full((6, 4), float("nan"))
    assert same_bits(torch.fx.symbolic_trace(Sum())(residual, branch), residual)
