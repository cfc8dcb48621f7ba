"""What else may run while a step collects its rows, and what may stand in its containers."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import trainops
from trainops import core
from trainops.adapters import cpu, cuda


def optimizer_of(count=12, kind=trainops.AdamW, **options):
    """After a step, with new gradients."""
    params = [nn.Parameter(torch.ones(8)) for _ in range(count)]
    optimizer = kind(params, lr=0.1, **options)
    for _ in range(2):
        for i, p in enumerate(params):
            p.grad = torch.full((8,), 1.0 + i)
        if not optimizer.state:
            optimizer.step()
    return optimizer, params


def collected(optimizer):
    names = [optimizer.state_names(group) for group in optimizer.param_groups]
    return core.collect("adamw", optimizer.param_groups, optimizer.state, [], [], names, "cpu")


class AtGradient(TorchFunctionMode):
    """Runs something when a gradient is read for the n-th time."""

    def __init__(self, n, action):
        self.left, self.action = n, action

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == "__get__":
            self.left -= 1
            if self.left == 0:
                self.action()
        return function(*args, **(kwargs or {}))


def test_a_list_of_parameters_that_shrinks():
    optimizer, _ = optimizer_of()
    with AtGradient(5, optimizer.param_groups[0]["params"].clear):
        assert len(collected(optimizer).params) == 5


def test_state_that_is_replaced():
    optimizer, params = optimizer_of()
    del params[0].grad  # and so are its entries in the state passed over

    def replace():
        for p in params:
            optimizer.state[p] = {name: x.clone() for name, x in optimizer.state[p].items()}

    with AtGradient(7, replace):
        table = collected(optimizer)
    others = [torch.full((8,), 7.0) for _ in range(50)]  # would take memory that has become free
    optimizer.step()
    assert len(table.params) == 11
    assert all((x == 7).all() for x in others)


def test_threads_that_replace_state():
    optimizer, params = optimizer_of(50)
    optimizer.state = dict(reversed(optimizer.state.items()))  # looked up by hash, which runs Python
    ended = threading.Event()

    def replace():
        while not ended.is_set():
            for p in params:
                optimizer.state[p]["exp_avg"] = torch.ones(8)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(100):
            collected(optimizer)
    finally:
        ended.set()
        thread.join()


def test_an_interrupt_is_not_swallowed(monkeypatch):
    optimizer, _ = optimizer_of()
    optimizer.state = dict(reversed(optimizer.state.items()))

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "__hash__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collected(optimizer)


def test_an_interrupt_leaves_no_half_of_a_state(monkeypatch):
    optimizer, params = optimizer_of()
    optimizer.state.clear()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert not optimizer.state
    optimizer.step()
    assert optimizer.state[params[-1]]["step"] == 1


@pytest.mark.parametrize("without", [[0], [0, 1, 2], [5], list(range(10))], ids=str)
def test_parameters_without_a_gradient_cost_no_hash(monkeypatch, without):
    optimizer, params = optimizer_of()
    for i in without:
        params[i].grad = None
    hashed = []
    monkeypatch.setattr(torch.Tensor, "__hash__", lambda self: hashed.append(self) or id(self))
    assert len(collected(optimizer).params) == 12 - len(without)
    assert hashed == []


def test_state_of_parameters_that_are_gone_costs_no_hash(monkeypatch):
    optimizer, _ = optimizer_of()
    del optimizer.param_groups[0]["params"][3:6]
    hashed = []
    monkeypatch.setattr(torch.Tensor, "__hash__", lambda self: hashed.append(self) or id(self))
    assert len(collected(optimizer).params) == 9
    assert hashed == []


def test_a_parameter_that_is_there_twice():
    """PyTorch warns and updates it twice, in turn."""
    results = []
    for kind in (torch.optim.AdamW, trainops.AdamW):
        torch.manual_seed(0)
        a, b = (nn.Parameter(torch.randn(70_000)) for _ in range(2))
        model = nn.ParameterList([a, b])
        ema = trainops.EMA(model, 0.5, update_after_step=-2) if kind is trainops.AdamW else None
        with pytest.warns(UserWarning, match="duplicate"):
            optimizer = kind([a, a, b], lr=0.1, **({"ema": ema} if ema else {}))
        for _ in range(3):
            a.grad, b.grad = torch.randn(70_000), torch.randn(70_000)
            before = None if ema is None else [x.clone() for x in ema.module.parameters()]
            optimizer.step()
        if ema is not None:
            for x, old, p in zip(ema.module.parameters(), before, (a, b), strict=True):
                torch.testing.assert_close(x, old + 0.5 * (p.detach() - old))
        results.append([a, b, optimizer.state[a]["step"]])
    torch.testing.assert_close(results[1], results[0])
    assert results[1][2] == 6


ALIASES = {
    "the_same_memory": lambda t: (t, t),
    "overlapping": lambda t: (t[:60_000], t[20_000:]),
    "two_dimensions": lambda t: (t.view(300, 300), t[299:]),
}


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
@pytest.mark.parametrize("first_step", [True, False], ids=["first_step", "later_step"])
def test_parameters_that_share_memory_are_updated_in_turn(alias, first_step):
    results = []
    for kind in (torch.optim.AdamW, trainops.AdamW):
        torch.manual_seed(0)
        t = torch.randn(90_000)
        params = [nn.Parameter(x) for x in alias(t)]
        optimizer = kind(params, lr=0.1, weight_decay=1.0)
        for _ in range(1 if first_step else 3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append(t)
    torch.testing.assert_close(results[1], results[0])


def test_neighbours_in_memory_share_nothing():
    t = torch.randn(60)
    params = [nn.Parameter(x) for x in (t[20:40], t[:20], t[40:])]
    optimizer = trainops.AdamW(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(20)
        optimizer.step()
    assert collected(optimizer) is not None


# Loading


def test_keys_of_the_state_that_are_no_parameters():
    for kind in (torch.optim.AdamW, trainops.AdamW):
        optimizer, _ = optimizer_of(kind=kind)
        optimizer.state["note"] = "of a framework"
        optimizer.state["numbers"] = {"seed": 1}
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["note"] == "of a framework"
        assert optimizer.state["numbers"] == {"seed": 1}


def test_hooks_of_loading():
    """The last word has a hook after loading; one before it may change what is loaded."""
    params = [nn.Parameter(torch.ones(8, dtype=torch.bfloat16))]
    params[0].grad = torch.ones_like(params[0])
    optimizer = trainops.AdamW(params)
    optimizer.step()
    state = optimizer.state[params[0]]
    state["exp_avg"] = torch.full((8,), 1 / 3)  # in float32
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(lambda _, loaded: loaded["optimizer"])
    optimizer.load_state_dict({"optimizer": saved})
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], torch.full((8,), 1 / 3))
    optimizer.register_load_state_dict_post_hook(lambda its: its.state[params[0]]["exp_avg"].fill_(0.25))
    optimizer.load_state_dict({"optimizer": saved})
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], torch.full((8,), 0.25))


# Averages


def test_a_copy_that_gives_up_an_average():
    optimizer, params = optimizer_of(2)
    optimizer.ema = ema = trainops.EMA(nn.ParameterList(params), 0.9)
    copy.copy(optimizer).ema = None
    assert optimizer.ema is ema
    assert ema.optimizer is optimizer


def test_an_average_that_two_optimizers_were_given():
    model = nn.Linear(2, 2)
    ema = trainops.EMA(model, 0.9)
    first = trainops.AdamW([model.weight], ema=ema)
    second = trainops.AdamW([model.bias], ema=ema)
    model(torch.ones(2)).sum().backward()
    second.step()
    with pytest.warns(UserWarning, match="average was given to another optimizer"):
        first.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.step()
        second.step()
    assert ema.step == 2


def test_a_constructor_that_fails_takes_no_average():
    model = nn.Linear(2, 2)
    ema = trainops.EMA(model, 0.9)
    first = trainops.AdamW(model.parameters(), ema=ema)
    with pytest.raises(ValueError, match="Invalid max_grad_norm"):
        trainops.AdamW(model.parameters(), ema=ema, max_grad_norm=-1.0)
    assert first.ema is ema


def pair_of_layers():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    ema = trainops.EMA(model, 0.5)
    ema.update()
    ema.update()
    return model, ema


def test_an_average_follows_a_module_that_was_replaced():
    model, ema = pair_of_layers()
    model[1] = nn.Linear(3, 3)
    nn.init.constant_(model[1].weight, 7.0)
    for _ in range(60):
        ema.update()
    assert (ema.module[1].weight == 7).all()


def test_an_average_notices_weights_that_are_no_longer_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    ema = trainops.EMA(model, 0.5)
    ema.update()
    model[1].weight = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"1\.weight is in the model alone"):
        ema.update()


def test_an_average_notices_a_module_that_was_wrapped_and_a_buffer_that_came():
    model, ema = pair_of_layers()
    model[1] = nn.Sequential(model[1])
    with pytest.raises(ValueError, match="alone"):
        ema.update()
    model, _ = pair_of_layers()
    model.register_buffer("late", None)
    ema = trainops.EMA(model, 0.5)
    ema.update()
    model.late = torch.ones(2)
    ema.update()
    assert torch.equal(ema.module.late, model.late)


@pytest.mark.parametrize("fused", [True, False])
def test_a_buffer_of_another_shape_raises_before_anything_moves(fused):
    """One that is averaged. Those that are copied may grow."""
    model = nn.Linear(3, 3)
    model.register_buffer("counts", torch.ones(2))
    ema = trainops.EMA(model, 0.5)
    optimizer = trainops.AdamW(model.parameters(), lr=0.1, ema=ema if fused else None)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    model.counts.data = torch.ones(3)
    everything = [*model.state_dict().values(), *ema.module.state_dict().values()]
    before = [x.clone() for x in everything]
    with pytest.raises(ValueError, match=r"counts has shape \(3,\)"):
        optimizer.step() if fused else ema.update()
    assert all(map(torch.equal, everything, before))


def test_swapping_gives_weights_back_whatever_happened_inside():
    model, ema = pair_of_layers()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    own = {name: x.clone() for name, x in model.state_dict().items()}
    with ema.swap():
        model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    assert all(torch.equal(x, own[name]) for name, x in model.state_dict().items())
    with pytest.raises(ValueError, match=r"0\.weight has shape"), ema.swap():
        model[0].weight.data = torch.ones(9, 9)
    assert all(torch.equal(x, own[name]) for name, x in model.state_dict().items() if name != "0.weight")
    model[0].weight.data = own["0.weight"]
    ema.update()


# Bindings


def of_kind(kind):
    names = core.schemas[kind].places
    columns = {name: [torch.ones(() if name == "step" else 4)] for name in names}
    return core.table(kind, columns, "cpu")


CALLS = {
    "ema": {"decay": 0.5, "seed": 0},
    "scale": {"coefficient": 0.5},
    "clamp": {"bound": 0.5},
    "reduce": {"statistic": "l2_norm", "rows_out": 0},
}
KINDS = {"ema": "ema", "scale": "transform", "clamp": "transform", "reduce": "reduce"}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["adamw", "ema", "transform", "reduce"])
def test_kernels_refuse_tables_of_other_kinds(call, kind):
    if kind != KINDS[call]:
        with pytest.raises(ValueError, match=f"a table of kind {kind} is none of {KINDS[call]}"):
            getattr(cpu._cpu, call)(of_kind(kind), **CALLS[call])


@pytest.mark.parametrize(("kind", "groups"), [("reduce", 1), ("adamw", 0), ("adamw", 2)])
def test_a_step_refuses_tables_of_other_kinds_and_other_groups(kind, groups):
    names, seeds = core.schemas["adamw"].settings, core.seeds(0, [0])
    step = {"max_norm": None, "skip_nonfinite": False, "grad_scale": 1.0, "found_inf": False, "total_norm": None}
    with pytest.raises(ValueError, match=r"group|rule"):
        cpu._cpu.update(
            of_kind(kind), settings=[[0.5] * len(names)] * groups, **step, ema_decays=[0.5], seeds=seeds, norms_out=0
        )


@pytest.mark.skipif(cuda._cuda is None, reason="the CUDA extension is not built")
def test_staged_tables_have_a_kind():
    staged = cuda._cuda.StagedTable(
        of_kind("reduce"), words=None, rows=0, chunks=0, chunk_count=0, all_chunks=0, stream=0
    )
    with pytest.raises(ValueError, match="a table of kind reduce is none of ema"):
        cuda._cuda.ema(staged, decay=0.5, seed=0, skip=0, counters=0)
