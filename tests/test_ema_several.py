"""Several averages of one optimizer, and buffers, in the one pass of its step."""

import copy

import pytest
import torch
from contract import same_bits
from host_fixtures import needs_shim
from models import make_net, over_copies, same_tensors, snapshot, tensors_of, wander
from targets import REFERENCE, interpreted, over, over_kernels
from torch import nn

import trainops
from trainops.averages import StepAverages

BFLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float32, torch.float64
NAN = float("nan")

# The averages that follow a model: what they follow, and how. By the dtype of the model.
AVERAGES = {
    "two": ({}, {"decay": 0.99}),
    "three": ({"update_every": 2}, {"warmup": True, "update_after_step": 1}, {"decay": 0.0}),
    "dtypes": ({"dtype": FLOAT32}, {"dtype": BFLOAT16}, {"dtype": FLOAT64}, {}),
    "selected": ({"exclude": "conv"}, {"include": "norm", "trainable_only": True}, {"include": "linear.weight"}),
    "buffers": ({"average_buffers": "copy"}, {"average_buffers": "leave"}, {"average_buffers": {"norm": "copy"}}),
    "submodule": ({}, {"of": "norm"}, {"of": "conv", "decay": 0.5}),
    "more than one pass takes": tuple({"decay": 0.1 * i} for i in range(6)),
}
OPTIONS = {
    "two": {"max_grad_norm": 0.5, "skip_nonfinite": True},
    "three": {"amsgrad": True},
    "submodule": {"skip_nonfinite": True},
}


def average_of(model, target, *, of="", **options):
    return trainops.EMA(model.get_submodule(of), **{"decay": 0.9, **options}, backend=target.backend)


def train(target, averages, dtype=FLOAT32, steps=4, skipped=(), kind=trainops.AdamW, **options):
    """A model with these averages in the optimizer's step."""
    torch.manual_seed(1)
    model = make_net(dtype, target.device)
    emas = [average_of(model, target, **its) for its in averages]
    inside = [p for p in model.parameters() if p is not model.elsewhere]
    groups = [{"params": inside[::2]}, {"params": inside[1::2], "lr": 0.1}]
    optimizer = kind(groups, lr=0.05, ema=emas, backend=target.backend, **options)
    for step in range(steps):
        wander([*model.buffers(), model.elsewhere])
        for p in inside:
            p.grad = torch.randn_like(p) if p.requires_grad and p is not model.unused else None
        if step in skipped:
            model.scale.grad.fill_(NAN)
        optimizer.step()
    return model, emas


def check_alone(target, averages, dtype=FLOAT32, **arguments):
    """Hold averages to be those that move alone."""
    model, emas = train(target, averages, dtype, **arguments)
    for ema, its in zip(emas, averages, strict=True):
        other, (alone,) = train(target, [its], dtype, **arguments)
        assert same_tensors(model, other)
        assert same_tensors(ema.module, alone.module)
        assert ema.step == alone.step


@interpreted(lambda name, dtype: (name, dtype) in {("dtypes", BFLOAT16), ("buffers", FLOAT32)})
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT64], ids=str)
@pytest.mark.parametrize("name", AVERAGES)
def test_each_is_what_it_is_alone(target, name, dtype):
    check_alone(target, AVERAGES[name], dtype, **OPTIONS.get(name, {}))


RULES = {
    "adam": (trainops.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "sgd": (trainops.SGD, {"momentum": 0.9}),
    "sgd without state": (trainops.SGD, {}),
}


@interpreted(lambda kind, options: kind is trainops.SGD and options)
@over(("kind", "options"), RULES)
def test_with_every_rule(target, kind, options):
    check_alone(target, AVERAGES["two"], kind=kind, **options)


@interpreted(lambda master: master == "split")
@pytest.mark.parametrize("master", ["split", "float32"])
def test_all_follow_the_whole_weight(target, master):
    averages = ({"dtype": FLOAT32}, {}, {"dtype": FLOAT32, "decay": 0.5})
    check_alone(target, averages, BFLOAT16, master=master, state_dtype=BFLOAT16)
    _, emas = train(target, ({"dtype": FLOAT32, "decay": 0.0},) * 2, BFLOAT16, master=master)
    for ema in emas:
        assert not same_bits(ema.module.conv.weight, ema.module.conv.weight.to(BFLOAT16).float())


@interpreted(lambda dtype: dtype == BFLOAT16)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_a_skipped_step_leaves_all(target, dtype):
    averages = ({"dtype": FLOAT32}, {"decay": 0.5}, {"average_buffers": False})
    before, skipped = (train(target, averages, dtype, steps, (2,), skip_nonfinite=True) for steps in (2, 3))
    for ours, others in zip(skipped[1], before[1], strict=True):
        assert same_tensors(ours.module, others.module)
        assert (ours.step, others.step) == (3, 2)
    check_alone(target, averages, dtype, skipped=(0, 2), skip_nonfinite=True)


def of_layers(device, layers=2):
    """A model with buffers that are averaged and buffers that are copied."""
    return nn.Sequential(*(nn.BatchNorm1d(5) for _ in range(layers))).to(device)


def with_grads(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


@over_kernels
def test_no_second_pass(target, monkeypatch):
    model = with_grads(of_layers(target.device))
    emas = [average_of(model, target, decay=decay) for decay in (0.5, 0.75)]
    optimizer = trainops.AdamW(model.parameters(), ema=emas, backend=target.backend)
    optimizer.step()
    monkeypatch.setattr("trainops.ema.update_pairs", None)
    wander(model.buffers())
    optimizer.step()
    for ema in emas:
        assert ema.step == 2
        assert all(x._version > 0 for x in tensors_of(ema.module).values())
        assert ema.module[1].num_batches_tracked == model[1].num_batches_tracked == 1
        assert not same_bits(ema.module[0].running_mean, model[0].running_mean)


@needs_shim
def test_one_launch_on_a_gpu(fake, gpu_backend):
    model = of_layers("cpu", 53 if gpu_backend == "cuda" else 6)  # the interpreter is slow
    for module in model:
        for name, x in module._buffers.items():
            module._buffers[name] = fake.on(x, 0)
        for name, x in module._parameters.items():
            module._parameters[name] = nn.Parameter(fake.on(x, 0))
    emas = [trainops.EMA(model, decay, backend=gpu_backend) for decay in (0.5, 0.75)]
    optimizer = trainops.AdamW(model.parameters(), max_grad_norm=1.0, ema=emas, backend=gpu_backend)
    launches = {"cuda": ["reduce", "update"], "triton": ["partial_results", "plan", "update", *["ema"] * 4]}
    for _ in range(3):
        for p in model.parameters():
            p.grad = fake.on(torch.ones(5), 0)
        model[-1].num_batches_tracked += 1
        fake.operations.clear()
        optimizer.step()
    kernels = [name for name in fake.operations if name in {*launches["cuda"], *launches["triton"]}]
    assert kernels == launches[gpu_backend]
    assert not {"where", "copy_", "_foreach_copy_", "_foreach_sub", "lerp"} & set(fake.operations)
    assert all(ema.module[-1].num_batches_tracked.memory == 3 for ema in emas)


class Awkward(nn.Module):
    """Buffers that no kernel takes, or not in the launch that moves what they share memory with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("view", self.weight.detach()[2:4])
        self.register_buffer("row", self.weight.detach()[5])
        self.register_buffer("angles", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("codes", torch.randn(7).to(torch.float8_e4m3fn))
        self.register_buffer("columns", torch.randn(4, 6).t())
        self.register_buffer("gaps", torch.randn(4, 6)[:, ::2])
        self.register_buffer("empty", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("bytes", torch.arange(4099, dtype=torch.uint8)[1:])
        self.register_buffer("long", torch.arange(9001))
        self.register_buffer("halves", torch.randn(4099).half()[1:])


@interpreted(lambda **_: True)
@pytest.mark.parametrize("dtype", [None, FLOAT64, BFLOAT16], ids=str)
def test_buffers_of_all_kinds(target, dtype):
    """Moved in the step or after it: as by ``update()`` after a step without averages."""
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = Awkward().to(target.device)
        model.view, model.row = model.weight.detach()[2:4], model.weight.detach()[5]
        options = ({"decay": 0.75}, {"decay": 0.5, "average_buffers": "copy"})
        emas = [average_of(model, target, dtype=dtype, **its) for its in options]
        optimizer = trainops.AdamW(model.parameters(), lr=0.1, ema=emas if fused else None, backend=target.backend)
        for _ in range(4):
            wander([model.angles, model.columns, model.gaps, model.halves, model.bytes, model.long])
            with_grads(model)
            optimizer.step()
            for ema in () if fused else emas:
                ema.update()
        found.append([*map(snapshot, (model, *(ema.module for ema in emas)))])
    for ours, others in zip(*found, strict=True):
        assert same_tensors(ours, others)


@interpreted(lambda **_: True)
def test_an_average_that_follows_another_comes_after_it(target):
    """As a student with its teacher inside."""
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleDict({"student": of_layers(target.device)})
        teacher = average_of(model["student"], target, decay=0.5)
        model["teacher"] = teacher.module
        emas = [teacher, average_of(model, target, decay=0.75)]
        optimizer = trainops.AdamW(model["student"].parameters(), ema=emas if fused else None, backend=target.backend)
        for _ in range(3):
            wander(model["student"].buffers())
            with_grads(model["student"])
            optimizer.step()
            for ema in () if fused else emas:
                ema.update()
        found.append(snapshot(emas[1].module))
    assert same_tensors(*found)


def test_buffers_of_an_average_that_follows_another_are_not_moved_beside_it():
    """On a GPU nobody knows which of the two a launch would move first."""
    model = nn.ModuleDict({"student": of_layers("cpu")})
    teacher = trainops.EMA(model["student"], lambda step: 0.5)
    optimizer = trainops.AdamW(model.parameters(), backend="reference")
    alone = StepAverages(optimizer, [teacher, trainops.EMA(model, lambda step: 0.75)])
    assert all(alone.buffers)
    model["teacher"] = teacher.module
    assert StepAverages(optimizer, [teacher, trainops.EMA(model, lambda step: 0.75)]).buffers == []


# How they are given, taken, kept


def test_they_are_given_and_taken():
    model = of_layers("cpu")
    first, second, third = (trainops.EMA(model, decay) for decay in (0.5, 0.75, 0.9))
    optimizer = trainops.AdamW(model.parameters(), ema=[first, second])
    assert (optimizer.ema, optimizer.averages) == ((first, second),) * 2
    assert third.attach(optimizer) is optimizer
    assert third.attach(optimizer).averages == (first, second, third)
    second.detach()
    assert (optimizer.ema, second.optimizer) == ((first, third), None)
    optimizer.ema = (third, second)
    assert (first.optimizer, second.optimizer, third.optimizer) == (None, optimizer, optimizer)
    other = trainops.SGD(model.parameters(), ema=third)
    assert (optimizer.ema, optimizer.averages, other.ema) == (second, (second,), third)
    optimizer.ema = []
    assert (optimizer.ema, optimizer.averages, second.optimizer) == (None, (), None)


WRONG = {
    "twice": (lambda ema, other: [ema, ema], ValueError, "ema has an average twice"),
    "another model's": (lambda ema, other: [ema, other], ValueError, "none of these parameters"),
    "no average": (lambda ema, other: [ema, None], TypeError, "a trainops.EMA or a list of them, got NoneType"),
    "a module": (lambda ema, other: [ema.module], TypeError, "a list of them, got Sequential"),
}


@over(("wrong", "error", "message"), WRONG)
def test_wrong_ones_change_nothing(wrong, error, message):
    model = of_layers("cpu")
    ema, other, own = trainops.EMA(model), trainops.EMA(nn.Linear(2, 2)), trainops.EMA(model)
    optimizer = trainops.AdamW(model.parameters(), ema=own)
    with pytest.raises(error, match=message):
        optimizer.ema = wrong(ema, other)
    assert (optimizer.ema, own.optimizer, ema.optimizer) == (own, optimizer, None)


@over_copies
def test_copies_and_states_have_each(copied):
    model = with_grads(of_layers("cpu"))
    emas = [trainops.EMA(model, decay) for decay in (0.5, 0.75)]
    optimizer = trainops.AdamW(model.parameters(), lr=0.1, ema=emas)
    for _ in range(3):
        optimizer.step()
    twins, twin, other = copied((emas, optimizer, model))
    assert twin.averages == tuple(twins)
    states = copy.deepcopy([ema.state_dict() for ema in emas])
    for its in (optimizer, twin):
        with_grads(model), with_grads(other)
        its.step()
    for ours, theirs in zip(emas, twins, strict=True):
        assert same_tensors(ours.module, theirs.module)
        assert theirs.optimizer is twin
    for ema, state in zip(reversed(emas), reversed(states), strict=True):
        ema.load_state_dict(state)
        assert same_tensors(ema.module, dict(state["module"]))
        assert ema.step == 3


def test_each_is_swapped_alone():
    model = with_grads(of_layers("cpu"))
    emas = [trainops.EMA(model, decay) for decay in (0.5, 0.75)]
    optimizer = trainops.AdamW(model.parameters(), lr=0.1, ema=emas)
    for _ in range(3):
        optimizer.step()
    before = snapshot(model)
    for ema in emas:
        with ema.swap():
            assert same_tensors(model, ema.module)
            with pytest.raises(RuntimeError, match=r"inside `with ema\.swap"):
                optimizer.step()
        assert same_tensors(model, before)
    assert [ema.step for ema in emas] == [3, 3]
    assert optimizer.state[model[0].weight]["step"] == 3


def test_what_raises_has_moved_none():
    torch.manual_seed(1)
    model = make_net()
    emas = [average_of(model, REFERENCE, decay=decay) for decay in (0.5, 0.75)]
    optimizer = trainops.AdamW(model.parameters(), ema=emas)
    with_grads(model)
    optimizer.step()
    before = [*map(snapshot, (model, *(ema.module for ema in emas)))]
    emas[1].module.conv.weight.data = torch.zeros(2)
    with pytest.raises(ValueError, match=r"conv\.weight has shape"):
        optimizer.step()
    assert same_tensors(model, before[0])
    assert same_tensors(emas[0].module, before[1])
    assert [ema.step for ema in emas] == [1, 1]
    emas[1].detach()
    optimizer.step()
    assert [ema.step for ema in emas] == [2, 1]


def test_a_finder_sets_all_back():
    model = with_grads(of_layers("cpu"))
    emas = [trainops.EMA(model, decay) for decay in (0.5, 0.75)]
    optimizer = trainops.AdamW(model.parameters(), lr=0.1, ema=emas)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for _ in range(3):
        optimizer.step()
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    optimizer.step()
    assert [ema.step for ema in emas] == [1, 1]
    assert all(same_tensors(ema.module, model) for ema in emas)


@pytest.mark.filterwarnings("error")
def test_a_swap_of_one_is_no_training_to_the_others():
    model = torch.nn.Linear(3, 3)
    averages = [trainops.EMA(model, decay) for decay in (0.9, 0.99)]
    optimizer = trainops.AdamW(model.parameters(), 0.1, ema=averages)
    for _ in range(3):
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    for use in (averages[0].swap, averages[1].swap):
        with use():
            pass
    optimizer.load_state_dict(optimizer.state_dict())  # would set back an average whose model others have written
    optimizer.step()
    assert [ema.step for ema in averages] == [4, 4]
