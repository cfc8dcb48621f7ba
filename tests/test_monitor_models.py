"""The monitor beside what else people do with their models: copies, compilers, tied weights, skipped steps."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import trainops
from trainops import Monitor


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def monitored(model, **options):
    return Monitor(model, torch.optim.SGD(model.parameters(), 0.1), **options)


def train(model, monitor, steps=1):
    for _ in range(steps):
        monitor.optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        monitor.optimizer.step()


@pytest.fixture
def compiled_once():
    """Compiling again is an error."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: trainops.EMA(model, 0.9).module, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "average", "pickle"],
)
def test_copies_of_a_model_are_not_watched(monkeypatch, copied):
    model = network()
    monitor = monitored(model, activations="1", every=1)
    for reach in ("__deepcopy__", "__reduce_ex__"):  # a copy must not reach for the monitor
        monkeypatch.setattr(Monitor, reach, lambda *_: pytest.fail("the monitor is copied"), raising=False)
    other = copied(model).train()
    other(torch.randn(100, 6))
    train(model, monitor)
    assert monitor.flat()["activation/numel/1"] == 4 * 8


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's, at a graph break
def test_steps_of_a_compiled_model_are_not_compiled_again(compiled_once):
    model = network()
    compiled = torch.compile(model, backend="eager")
    monitor = monitored(compiled, activations="1", every=3)
    train(compiled, monitor, 12)
    assert [record.activations.outputs.numel.tolist() for record in monitor.records] == 4 * [[4 * 8]]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # PyTorch's own
def test_a_compiled_step_is_not_compiled_again(compiled_once):
    model = network()
    monitor = monitored(model, every=3)
    step = torch.compile(lambda: monitor.optimizer.step(), backend="eager")
    model(torch.randn(4, 6)).sum().backward()
    for _ in range(12):
        step()
    assert [record.step for record in monitor.records] == [1, 4, 7, 10]


def test_a_model_that_was_compiled_before_is_told():
    torch.compiler.reset()
    model = network()
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(4, 6))
    monitor = monitored(compiled, activations="1", every=1)
    with pytest.warns(UserWarning, match="no watched module gave an output") as said:
        train(compiled, monitor, 3)
    assert len(said) == 1


def test_parameters_that_are_replaced_are_told():
    model = network()
    monitor = monitored(model, every=1)
    model[0].weight = nn.Parameter(torch.randn(8, 6))
    monitor.optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.warns(UserWarning, match=r"no longer has '0\.weight' and 0 other parameters") as said:
        train(model, monitor, 3)
    assert len(said) == 1
    assert monitor.last().names == ["0.bias", "2.weight", "2.bias"]


def test_any_name_of_what_is_used_twice():
    model, relu = network(), nn.ReLU()
    model[1] = relu
    model.append(nn.Linear(3, 3, bias=False))
    model.append(nn.Linear(3, 3, bias=False))
    model[4].weight = model[3].weight
    model.append(relu)
    monitor = monitored(model, include="4", activations="5", every=1)
    train(model, monitor)
    assert monitor.last().names == ["4.weight"]
    assert monitor.last().activations.names == ["5"]
    assert int(monitor.last().activations.outputs.numel) == 4 * (8 + 3)


def test_a_modules_name_is_that_module_alone():
    model = nn.Sequential(network(), nn.Linear(3, 3), network())
    for activations, expected in (
        ("0", ["0"]),
        (["0", "2.1"], ["0", "2.1"]),
        ("2*", ["2", "2.0", "2.1", "2.2"]),
        (["1", "*.1"], ["0.1", "1", "2.1"]),
    ):
        monitor = monitored(model, activations=activations)
        assert [name for name, module in model.named_modules() if module._forward_hooks] == expected
        monitor.remove()


def counted(params):
    return trainops.AdamW(params, skip_nonfinite=True)


def uncounted(params):
    """PyTorch's own, told by a GradScaler."""
    optimizer = torch.optim.SGD(params, 0.1, fused=True)
    optimizer.found_inf = torch.ones(())
    return optimizer


@pytest.mark.parametrize("make", [counted, uncounted])
@pytest.mark.parametrize("bad", [0, slice(None)], ids=["one", "all"])
def test_a_step_that_was_skipped_is_told_by_what_is_not_finite_alone(bad, make):
    model = network()
    optimizer = make(model.parameters())
    monitor = Monitor(model, optimizer, every=1)
    model(torch.randn(4, 6)).square().sum().backward()
    model[0].weight.grad.view(-1)[bad] = torch.inf
    model[0].bias.grad[bad] = torch.inf
    optimizer.step()
    assert {(x.kind, x.name) for x in monitor.findings()} == {("nonfinite", "0.weight"), ("nonfinite", "0.bias")}


def test_long_trainings_keep_some_records_of_all_times():
    model = network()
    monitor = monitored(model, every=2, keep=4)
    train(model, monitor, 17)  # 9 records, of steps 1, 3, ..., 17
    assert [record.step for record in monitor.records] == [1, 9, 17]
    train(model, monitor, 64)
    assert [record.step for record in monitor.records] == [1, 33, 65, 81]
    with pytest.raises(ValueError, match="keep must be an integer of at least 2, got 1"):
        monitored(model, keep=1)


def test_steps_go_on_counting_after_a_checkpoint():
    model = network()
    monitor = monitored(model, every=5)
    monitor.steps = 8
    train(model, monitor, 4)
    assert [record.step for record in monitor.records] == [11]


class Waits(TorchDispatchMode):
    """Counts the operations for which a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.count += function in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
        return function(*args, **(kwargs or {}))


def test_only_reading_waits_for_the_device(monkeypatch):
    model = network()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), 0.1), every=1, activations="1", keep=2)
    with Waits() as waits, monkeypatch.context() as patched:
        for reads in ("tolist", "numpy", "__array__"):  # of a CPU's memory, without an operation
            patched.setattr(torch.Tensor, reads, lambda *_: pytest.fail("the step reads numbers"))
        train(model, monitor, 4)
    assert len(monitor.records) == 2
    assert waits.count == 0
    with waits:
        assert float(monitor.last().grads.l2_norm[0]) > 0.0
    assert waits.count == 1
