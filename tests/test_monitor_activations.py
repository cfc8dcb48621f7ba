"""What a monitor sees of modules' outputs: which dimension has the units, odd outputs, and steps that are skipped."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from targets import over
from torch import nn

import trainops
from trainops import Monitor


class Patches(nn.Module):
    """As a vision transformer begins: tokens have their features last."""

    def __init__(self):
        super().__init__()
        self.patches = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 4, 4), "norm": nn.Identity()})
        self.patches.forward = lambda x: self.patches["conv"](x).flatten(2).transpose(1, 2)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        return self.dropout(self.patches(x))


class Styled(nn.InstanceNorm2d):
    pass


class ChannelsFirst(nn.Module):
    def forward(self, x):
        return x.movedim(-1, 1)


# Modules whose output has 4 units, one of them dead, by the shape of their input, and the name that is watched.
LAST = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4)), (5, 3), "0"),
    "linear_3d": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU()), (2, 5, 3), "1"),
    "linear_4d": (lambda: nn.Sequential(nn.Linear(3, 4)), (2, 6, 7, 3), "0"),
    "gelu_4d": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU()), (2, 6, 7, 3), "1"),
    "flat": (lambda: nn.Sequential(nn.Conv1d(3, 4, 9), nn.ReLU(), nn.Flatten(), nn.Dropout(0.0)), (2, 3, 9), "3"),
    "patches": (lambda: Patches(), (2, 3, 8, 8), "patches"),
    "after_patches": (lambda: Patches(), (2, 3, 8, 8), "dropout"),
    "block_4d": (lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0))), (2, 6, 7, 3), "0"),
}
SECOND = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3)), (2, 3, 9), "0"),
    "relu_1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()), (2, 3, 9), "1"),
    "conv1d_of_one": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3)), (3, 9), "0"),
    "conv2d_of_one": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), (3, 9, 9), "0"),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU()), (2, 3, 9, 9), "1"),
    "instance_norm": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.InstanceNorm1d(4, affine=True)), (2, 3, 9), "1"),
    "styled": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Styled(4, affine=True)), (2, 3, 9, 9), "1"),
    "batch_norm": (lambda: nn.Sequential(nn.BatchNorm1d(4)), (2, 4, 9), "0"),
    "pooled": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.MaxPool1d(2)), (2, 3, 9), "1"),
    "moved": (lambda: nn.Sequential(nn.Linear(3, 4), ChannelsFirst(), nn.ReLU()), (2, 6, 7, 3), "2"),
}


@over("case", {**LAST, **SECOND})
def test_units(case):
    build, shape, name = case
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():  # one unit is 0 everywhere
        for module in model.modules():
            if getattr(module, "weight", None) is not None:
                dim = 1 if isinstance(module, nn.ConvTranspose2d) else 0
                module.weight.select(dim, 2).zero_()
                module.bias.fill_(1.0)
                module.bias[2] = 0.0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model, optimizer, activations=[name])
    model(torch.randn(shape)).sum().backward()
    optimizer.step()
    assert monitor.flat()[f"activation/dead/{name}"] == 0.25


class Returns(nn.Module):
    """A linear layer that returns whatever a function makes of its output."""

    def __init__(self, change):
        super().__init__()
        self.linear, self.change = nn.Linear(3, 4), change

    def forward(self, x):
        return self.change(self.linear(x))


ODD = {
    "one_dimension": lambda x: x.sum(0),
    "a_number": lambda x: x.sum(),
    "float8": lambda x: (x, x.detach().to(torch.float8_e4m3fn))[::-1],
    "complex": lambda x: x * 1j,
    "integers": lambda x: (x.argmax(), x),
    "nothing": lambda x: (None, x),
    "empty": lambda x: (x[:0], x),
    "nested": lambda x: (torch.nested.nested_tensor([x[0], x[1]]), x),
    "meta": lambda x: (x.to("meta"), x),
    "dictionary": lambda x: {"x": x},
}


SEEN = [ODD["one_dimension"], ODD["a_number"]]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@over("change", ODD)
def test_an_odd_output_stops_no_forward_pass(change):
    model = Returns(change)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="no watched module") if change not in SEEN else nullcontext():
        monitor = Monitor(nn.ModuleDict({"odd": model}), optimizer, activations="odd")
        out = model(torch.randn(5, 3))
        out = list(out.values()) if isinstance(out, dict) else out
        loss = out if isinstance(out, torch.Tensor) else out[-1]
        loss.abs().sum().backward()
        optimizer.step()
    assert (monitor.last().activations is not None) == (change in SEEN)


def test_function_transforms_are_not_watched():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model, optimizer, activations="1")
    torch.func.vmap(model)(torch.randn(5, 3))
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    assert monitor.flat()["activation/numel/1"] == 5 * 4


def test_outputs_in_a_closure_are_those_of_its_step():
    """As Lightning's loops give one."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model, optimizer, activations="1", every=2)
    for i in range(3):

        def closure(size=i + 1):
            optimizer.zero_grad()
            loss = model(torch.randn(size, 3)).sum()
            loss.backward()
            return loss

        model(torch.randn(1, 3)).sum().backward()  # there are gradients before
        monitor._activations.take()
        optimizer.step(closure)
    assert [record.flat()["activation/numel/1"] for record in monitor.records] == [4, 12]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_a_checkpoint_computes_again_is_not_looked_at_again(use_reentrant):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model, optimizer, activations=["0", "1"])  # one computes no more than what backward needs: "0"
    x = torch.randn(5, 3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    optimizer.step()
    assert [monitor.flat()[f"activation/numel/{name}"] for name in "01"] == [5 * 4, 5 * 4]


def test_what_was_watched_is_freed():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model, optimizer, activations="1")
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    alive = weakref.ref(model[0].weight)
    del model, optimizer, monitor
    gc.collect()
    assert alive() is None


def guarded(model):
    optimizer = trainops.AdamW(model.parameters(), spike_guard=trainops.SpikeGuard(max_norm=1e-9))
    return optimizer, optimizer.step


def without_learning_rate(model):
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}], 0.1
    )
    return optimizer, optimizer.step


def scaled(model):
    """A fused optimizer, whose kernel skips the step."""
    optimizer = trainops.AdamW(model.parameters(), 0.1)
    optimizer.found_inf = torch.ones(())
    return optimizer, optimizer.step


@over("make", {f.__name__: f for f in (guarded, without_learning_rate, scaled)})
def test_layers_that_were_not_to_move_are_not_told(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer, step = make(model)
    monitor = Monitor(model, optimizer, every=1)
    model(torch.randn(5, 3)).square().sum().backward()
    step()
    assert monitor.last().updates.l2_norm[0] == 0.0
    assert monitor.findings() == []


def test_updates_that_are_not_finite_are_told():
    """Of a learning rate that is NaN: gradients are finite, and the layer moves, but nobody can say how far."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": torch.nan}, {"params": model[2].parameters()}], 0.1
    )
    monitor = Monitor(model, optimizer, every=1)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    assert [(x.kind, x.name) for x in monitor.findings()] == [("nonfinite", "0.weight"), ("nonfinite", "0.bias")]
    assert "12 of 12 elements of the update" in monitor.findings()[0].message
