"""The learning rate finder: what it finds, and that it leaves no trace."""

import copy
import math
import random

import numpy
import pytest
import torch
from contract import same_bits
from process_groups import assert_same_on_all_ranks, distributed, forks, on_ranks
from targets import over
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainops
from trainops import lr_finder

FEATURES, CLASSES = 6, 3


class Counter(nn.Module):
    """Has extra state: how many calls there were."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), Counter(), nn.Linear(8, CLASSES)]
    model = nn.Sequential(*layers)
    model[1].eval()  # somebody has frozen its statistics
    return model


def data(batches=12, size=8, **options):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * size, FEATURES, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :CLASSES].argmax(1)), size, **options)


def loss_of(model, batch):
    x, y = batch
    random.random(), numpy.random.rand()  # as augmentation draws
    return nn.functional.cross_entropy(model(x), y)


# What it finds


def quadratic(lr=1.0):
    """One weight with loss w**2 / 2: a step multiplies the weight by 1 - lr."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return model, torch.optim.SGD(model.parameters(), lr)


def square(model, _):
    return model.weight.square().sum() / 2


def test_the_losses_are_those_of_steps_at_growing_learning_rates():
    model, optimizer = quadratic()
    found = lr_finder(model, optimizer, range(9), square, start_lr=1e-3, end_lr=1e5, steps=9, divergence=None)
    w = 1.0
    for i in range(9):
        assert found.lrs[i] == pytest.approx(10.0 ** (i - 3))
        assert found.losses[i] == pytest.approx(w * w / 2)
        w *= 1.0 - found.lrs[i]
    assert not found.diverged


def test_a_linear_sweep():
    model, optimizer = quadratic()
    found = lr_finder(model, optimizer, range(5), square, start_lr=0.1, end_lr=0.5, steps=5, sweep="linear")
    assert found.lrs == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_losses_are_smoothed_without_bias():
    model, optimizer = quadratic()
    found = lr_finder(model, optimizer, range(6), square, start_lr=0.01, end_lr=1.0, steps=6, smoothing=0.8)
    for i, smoothed in enumerate(found.smoothed):
        weights = [0.8 ** (i - k) for k in range(i + 1)]
        mean = sum(w * x for w, x in zip(weights, found.losses, strict=False)) / sum(weights)
        assert smoothed == pytest.approx(mean)


def test_it_stops_where_the_loss_diverges_and_suggests_rates_below():
    model, optimizer = quadratic()
    found = lr_finder(model, optimizer, range(100), square, start_lr=1e-4, end_lr=1e4, smoothing=0.0, divergence=2.0)
    assert found.diverged
    assert len(found.lrs) < 100
    assert found.losses[-1] > 2.0 * min(found.losses)
    assert all(x <= 2.0 * min(found.losses[: i + 1]) for i, x in enumerate(found.losses[:-1]))
    least = found.lrs[found.losses.index(min(found.losses))]
    assert found.tenth_of_minimum == pytest.approx(least / 10)
    x = [math.log10(lr) for lr in found.lrs]
    slopes = {
        found.lrs[i]: (found.losses[i + 1] - found.losses[i - 1]) / (x[i + 1] - x[i - 1])
        for i in range(1, found.losses.index(min(found.losses)))
    }
    assert found.steepest == min(slopes, key=slopes.__getitem__)


def test_the_steepest_descent_is_before_the_minimum():
    losses = [5.0, 4.0, 1.0, 9.0, 9.0, 2.0, 2.0]
    found = trainops.LRFinderResult([10.0**i for i in range(7)], losses, losses, diverged=False)
    assert found.steepest == 10.0


def test_a_loss_that_becomes_infinite_ends_the_sweep():
    model, optimizer = quadratic()
    found = lr_finder(model, optimizer, range(50), square, start_lr=1e10, end_lr=1e30, steps=50, divergence=None)
    assert found.diverged
    assert all(map(math.isfinite, found.losses))


def test_nothing_is_suggested_where_the_loss_only_grows():
    model, optimizer = quadratic()
    found = lr_finder(model, optimizer, range(5), square, start_lr=10.0, end_lr=100.0, steps=5, divergence=None)
    assert found.steepest is None
    assert found.tenth_of_minimum is None


@pytest.mark.parametrize("as_tensor", [False, True])
def test_groups_keep_the_ratios_of_their_learning_rates(as_tensor):
    weights = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    model = nn.ParameterList(weights)
    rates = [torch.tensor(x) if as_tensor else x for x in (0.2, 0.05, 0.0)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(weights, rates, strict=True)]
    optimizer, seen = torch.optim.SGD(groups, 0.1), []

    def loss(model, _):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        return sum(p.sum() for p in model)

    lr_finder(model, optimizer, range(3), loss, start_lr=0.1, end_lr=0.4, steps=3)
    assert seen == [pytest.approx(x) for x in ([0.1, 0.025, 0.0], [0.2, 0.05, 0.0], [0.4, 0.1, 0.0])]
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        assert group["lr"] is lr


def test_where_a_scheduler_warms_up_from_0_the_first_ratios_hold():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 0.4}, {"params": weights[1:], "lr": 0.1}], 0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    seen = []

    def loss(model, _):
        seen.append([group["lr"] for group in optimizer.param_groups])
        return sum(p.sum() for p in model)

    lr_finder(nn.ParameterList(weights), optimizer, range(2), loss, start_lr=1.0, end_lr=2.0, steps=2)
    assert seen == [pytest.approx(x) for x in ([1.0, 0.25], [2.0, 0.5])]
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_an_optimizer_that_computes_gradients_again():
    model, _ = quadratic()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    found = lr_finder(model, optimizer, range(5), square, start_lr=0.1, end_lr=0.5, steps=5, smoothing=0.0)
    assert len(found.losses) == 5
    assert found.losses[-1] < 0.5 * found.losses[0]
    assert model.weight.item() == 1.0
    assert not optimizer.state


def test_accumulation_counts_steps_and_takes_the_mean_of_the_gradients():
    one, many = network().eval(), network().eval()
    for model in (one, many):
        model.train = lambda mode=True: None  # no dropout, to compare
    big = lr_finder(
        one, torch.optim.SGD(one.parameters(), 1.0), data(12, 8), loss_of, steps=12, start_lr=1e-3, end_lr=1.0
    )
    small = lr_finder(
        many,
        torch.optim.SGD(many.parameters(), 1.0),
        data(48, 2),
        loss_of,
        steps=12,
        start_lr=1e-3,
        end_lr=1.0,
        accumulate=4,
    )
    assert small.lrs == big.lrs
    assert small.losses == pytest.approx(big.losses, rel=1e-4)
    assert small.losses[0] > small.losses[-1]


def test_batches_may_be_repeated():
    model, optimizer = quadratic()
    batches = [1, 2, 3]
    seen = []

    def loss(model, batch):
        seen.append(batch)
        return square(model, batch)

    lr_finder(model, optimizer, batches, loss, start_lr=0.01, end_lr=0.1, steps=4, accumulate=2, repeat=True)
    assert seen == [1, 2, 3, 1, 2, 3, 1, 2]


def test_a_scalers_scale_is_no_part_of_the_losses():
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model, optimizer = quadratic()
        results.append(
            lr_finder(model, optimizer, range(8), square, start_lr=1e-2, end_lr=1.0, steps=8, scaler=scaler)
        )
    assert results[0].losses == pytest.approx(results[1].losses)


def test_the_picture():
    pytest.importorskip("matplotlib")
    model, optimizer = quadratic()
    found = lr_finder(model, optimizer, range(50), square, start_lr=1e-3, end_lr=1e2, steps=50)
    (axes,) = found.plot().axes
    assert axes.get_xlabel() == "learning rate"
    assert len(axes.lines) == 4
    assert list(axes.lines[1].get_ydata()) == found.smoothed


# It leaves no trace


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def adamw(model):
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[5].parameters()), "lr": 0.01}]
    return torch.optim.AdamW(groups, torch.tensor(0.1), amsgrad=True)


def with_averages(model):
    averages = [trainops.EMA(model, decay) for decay in (0.9, 0.99)]
    return trainops.AdamW(model.parameters(), 0.1, max_grad_norm=0.5, skip_nonfinite=True, ema=averages)


def in_bfloat16(model):
    model.bfloat16().float()
    model[0].bfloat16()
    model[0].register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    model[0].register_forward_hook(lambda module, args, out: out.float())
    return trainops.AdamW(model.parameters(), 0.1, master="split", state_dtype=torch.bfloat16)


OPTIMIZERS = {"sgd": sgd, "adamw": adamw, "averages": with_averages, "split": in_bfloat16}


class Training:
    """A model and all that belongs to its training."""

    def __init__(self, make, warm, scaled=False):
        self.model = network()
        self.optimizer = make(self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) if scaled else None
        self.loader = data(shuffle=True, generator=torch.Generator().manual_seed(3))
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        if warm:
            self.train(3)

    def train(self, steps):
        torch.manual_seed(4), random.seed(5), numpy.random.seed(6)
        for _, batch in zip(range(steps), self.loader, strict=False):
            self.optimizer.zero_grad()
            loss = loss_of(self.model, batch)
            if self.scaler is None:
                loss.backward()
                self.optimizer.step()
            else:
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.scheduler.step()

    def averages(self):
        return getattr(self.optimizer, "averages", ())

    def find(self, loss=loss_of, **options):
        options = {"steps": 8, "start_lr": 1e-3, "end_lr": 10.0, "scaler": self.scaler} | options
        return lr_finder(self.model, self.optimizer, self.loader, loss, **options)

    def state(self):
        """Everything, as numbers."""
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "grads": [p.grad for p in self.model.parameters()],
                "modes": [m.training for m in self.model.modules()],
                "state": self.optimizer.state_dict(),
                "averages": [ema.state_dict() for ema in self.averages()],
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "loader": self.loader.generator.get_state(),
                "random": (random.getstate(), torch.get_rng_state(), numpy.random.get_state()),
                "called": vars(self.optimizer).get("_opt_called"),
                "skipped": getattr(self.optimizer, "skipped_steps", None),
            }
        )

    def tensors(self):
        """Those that others may hold."""
        state = [x for own in self.optimizer.state.values() for x in own.values() if isinstance(x, torch.Tensor)]
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        groups = [x for group in self.optimizer.param_groups for x in group.values() if isinstance(x, torch.Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *state, *grads, *groups]


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert same_bits(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, numpy.ndarray):
        assert (a == b).all()
    else:
        assert a == b


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("warm", [False, True])
@over("make", OPTIMIZERS)
def test_no_trace_is_left(make, warm, scaled):
    training, other = Training(make, warm, scaled), Training(make, warm, scaled)
    before, tensors = training.state(), training.tensors()
    found = training.find()
    assert len(set(found.losses)) > 2
    assert_same(training.state(), before)
    assert all(x is y for x, y in zip(training.tensors(), tensors, strict=True))
    for each in (training, other):  # and so it goes on
        each.train(4)
    assert_same(training.state(), other.state())


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
@over("make", OPTIMIZERS)
def test_no_trace_is_left_by_an_error(make, error):
    training, calls = Training(make, warm=True), []
    before = training.state()

    def loss(model, batch):
        calls.append(batch)
        if len(calls) == 5:
            raise error
        return loss_of(model, batch)

    with pytest.raises(error):
        training.find(loss)
    assert_same(training.state(), before)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("warm", [False, True])
def test_an_average_does_not_see_the_trial(warm):
    """It warns of weights that others have written, and of steps that it was not in."""
    training = Training(with_averages, warm)
    training.find()
    if warm:
        training.optimizer.load_state_dict(training.optimizer.state_dict())  # as Accelerate does
    else:
        with training.averages()[1].swap():
            pass
    training.train(2)
    assert [ema.step for ema in training.averages()] == [2 + 3 * warm] * 2


class Outer(torch.optim.Optimizer):
    """Holds another optimizer, as Lookahead does, and keeps state in a tuple."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.inner = torch.optim.SGD(self.param_groups, 0.1, momentum=0.9)

    def step(self):
        self.inner.step()
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("steps", (torch.zeros(()),))[0].add_(1)


@pytest.mark.parametrize("warm", [False, True])
def test_optimizers_inside_of_others_and_tuples_are_put_back(warm):
    model, _ = quadratic()
    optimizer = Outer(model.parameters())
    if warm:
        square(model, None).backward()
        optimizer.step()
    before = copy.deepcopy((list(optimizer.state.values()), list(optimizer.inner.state.values())))
    lr_finder(model, optimizer, range(5), square, steps=5)
    assert_same((list(optimizer.state.values()), list(optimizer.inner.state.values())), before)


def test_a_loader_that_has_a_state_gets_it_back():
    class Loader(list):
        place = 3

        def __iter__(self):
            for x in super().__iter__():
                self.place += 1
                yield x

        def state_dict(self):
            return {"place": self.place}

        def load_state_dict(self, state):
            self.place = state["place"]

    model, optimizer = quadratic()
    loader = Loader(range(9))
    lr_finder(model, optimizer, loader, square, steps=5)
    assert loader.place == 3


# Bad input


def not_a_number(model, batch):
    return square(model, batch) * math.nan


BAD = {
    "start": ({"start_lr": 0.0}, ValueError, "0 < start_lr < end_lr"),
    "order": ({"start_lr": 1.0, "end_lr": 0.1}, ValueError, "0 < start_lr < end_lr"),
    "steps": ({"steps": 1}, ValueError, "steps must be an integer of at least 2"),
    "half": ({"steps": 2.5}, ValueError, "steps must be an integer of at least 2, accumulate of 1, got 2.5 and 1"),
    "accumulate": ({"accumulate": 0}, ValueError, "accumulate of 1, got 10 and 0"),
    "frozen": ({"model": nn.Linear(1, 1).requires_grad_(False)}, ValueError, "no parameter of this model that is"),
    "detached": ({"loss_fn": lambda model, batch: square(model, batch).detach()}, ValueError, "has no gradient"),
    "complex": ({"loss_fn": lambda model, batch: square(model, batch) * 1j}, TypeError, "must return one number"),
    "sweep": ({"sweep": "cosine"}, ValueError, "sweep must be"),
    "smoothing": ({"smoothing": 1.0}, ValueError, "smoothing must be in"),
    "divergence": ({"divergence": 1.0}, ValueError, "divergence must be more than 1"),
    "few": ({"batches": range(9)}, ValueError, "10 steps of 1 batches need 10 batches, there are 9"),
    "few_accumulated": ({"batches": range(19), "accumulate": 2}, ValueError, "need 20 batches, there are 19"),
    "few_uncounted": ({"batches": torch.utils.data.IterableDataset}, ValueError, "there are 9"),
    "none": ({"batches": [], "repeat": True}, ValueError, "there are 0"),
    "iterator": ({"batches": iter(range(99))}, TypeError, "batches is an iterator"),
    "not_finite": ({"loss_fn": not_a_number}, ValueError, "the loss is nan before the first step"),
    "no_tensor": ({"loss_fn": lambda model, batch: 1.0}, TypeError, "loss_fn must return one number"),
    "no_number": ({"loss_fn": lambda model, batch: model.weight.expand(2, 1)}, TypeError, "must return one number"),
    "other_model": ({"model": nn.Linear(1, 1)}, ValueError, "no parameter of this model"),
    "no_model": ({"model": None}, TypeError, "a model and its optimizer are needed, got None"),
    "text": ({"end_lr": "1"}, TypeError, "end_lr must be a number, got '1'"),
}


class Uncounted(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(9))


@over("case", BAD)
def test_bad_input_changes_nothing(case):
    changes, error, message = case
    model, optimizer = quadratic()
    arguments = {"model": model, "batches": range(10), "loss_fn": square, "steps": 10} | changes
    if arguments["batches"] is torch.utils.data.IterableDataset:
        arguments["batches"] = Uncounted()
    with pytest.raises(error, match=message):
        lr_finder(optimizer=optimizer, **arguments)
    assert model.weight.item() == 1.0
    assert model.weight.grad is None
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 1.0


# Ranks


def check_ranks(rank, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(model)
    optimizer = trainops.AdamW(model.parameters(), 0.1, max_grad_norm=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    whole = list(data())
    mine = [(x[rank::2], y[rank::2]) for x, y in whole]
    found = lr_finder(model, optimizer, mine, loss_of, start_lr=1e-3, end_lr=10.0, steps=12)
    assert_same_on_all_ranks(torch.tensor(found.losses))
    for p, old in zip(model.parameters(), before, strict=True):
        assert same_bits(getattr(p, "_local_tensor", p), getattr(old, "_local_tensor", old))
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    optimizer = trainops.AdamW(alone.parameters(), 0.1, max_grad_norm=1.0)
    expected = lr_finder(alone, optimizer, whole, loss_of, start_lr=1e-3, end_lr=10.0, steps=12)
    assert found.lrs == expected.lrs
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)


@forks
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_find_what_one_process_finds(tmp_path, kind):
    on_ranks(2, tmp_path, check_ranks, kind)


def test_a_loader_of_a_stream():
    """It has a length that nobody knows."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([x for batch, labels in data() for x in zip(batch, labels, strict=True)])

    model = nn.Linear(FEATURES, CLASSES)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=4)
    found = lr_finder(model, torch.optim.SGD(model.parameters(), 0.1), loader, loss_of, steps=3)
    assert len(found.losses) == 3


def check_line_search(rank):
    """Of the mean of all losses: otherwise, ranks would search for another number of passes."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(FEATURES, CLASSES))
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    mine = [(x[rank::2] * (1 + 3 * rank), y[rank::2]) for x, y in data()]
    found = lr_finder(model, optimizer, mine, loss_of, start_lr=1e-2, end_lr=1.0, steps=4)
    assert_same_on_all_ranks(torch.tensor(found.losses))


@forks
def test_ranks_of_a_line_search(tmp_path):
    on_ranks(2, tmp_path, check_line_search)


class Unsized:
    """Batches without a length, as those of a stream."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def check_uneven(rank, sized):
    torch.manual_seed(0)
    inner = nn.parallel.DistributedDataParallel(nn.Linear(FEATURES, CLASSES))
    model = nn.Sequential(inner, nn.Identity())  # DDP within, as of a part of a model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mine = [(x[rank::2], y[rank::2]) for x, y in data()][: 6 - 2 * rank]
    found = lr_finder(model, optimizer, mine, loss_of, steps=4)
    assert_same_on_all_ranks(torch.tensor(found.losses))
    before = [p.detach().clone() for p in model.parameters()]
    reason = "there are 4" if rank == 1 else "another rank has fewer"
    with pytest.raises(ValueError, match=f"5 steps of 1 batches need 5 batches, {reason}"):
        lr_finder(model, optimizer, mine if sized else Unsized(mine), loss_of, steps=5)
    assert all(same_bits(p, old) for p, old in zip(model.parameters(), before, strict=True))


@forks
@pytest.mark.parametrize("sized", [True, False], ids=["lists", "streams"])
def test_ranks_with_another_number_of_batches(tmp_path, sized):
    on_ranks(2, tmp_path, check_uneven, sized)


def check_meshes(rank):
    """Two models, each on two ranks: losses are means over those alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "shard"))
    which = rank // 2
    torch.manual_seed(which)
    model = fully_shard(nn.Linear(FEATURES, CLASSES), mesh=mesh["shard"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    whole = list(data())
    mine = [(x[rank % 2 :: 2], y[rank % 2 :: 2]) for x, y in whole]
    options = {"start_lr": 1e-3, "end_lr": 1e-1, "steps": 4}
    found = lr_finder(model, optimizer, mine, loss_of, **options)
    torch.manual_seed(which)
    alone = nn.Linear(FEATURES, CLASSES)
    expected = lr_finder(alone, torch.optim.SGD(alone.parameters(), 0.1), whole, loss_of, **options)
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)


@forks
def test_ranks_of_another_model_do_not_count(tmp_path):
    on_ranks(4, tmp_path, check_meshes)


def check_hybrid(rank):
    """FSDP1 keeps copies of shards on other nodes: those ranks count, too."""
    from trainops.training_ranks import TrainingRanks

    pairs = [distributed.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    kind = type("FullyShardedDataParallel", (nn.Linear,), {})
    torch.distributed.fsdp.FullyShardedDataParallel = kind
    module = kind(2, 2)
    module.process_group, module._inter_node_pg = pairs[rank // 2], pairs[2 + rank % 2]
    ranks = TrainingRanks(nn.Sequential(module))
    assert ranks.mean(torch.tensor(float(rank))) == 1.5
    assert not ranks.all_have(rank != 3)
    assert ranks.all_have(True)


@forks
def test_ranks_of_hybrid_shards(tmp_path):
    on_ranks(4, tmp_path, check_hybrid)
