"""What becomes of masters: in checkpoints, when others write parameters, outside of steps; and bad input."""

import copy
import io
import pickle

import pytest
import torch
from contract import same_bits
from targets import REFERENCE, over_kernels
from test_masters import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    KINDS,
    drawn,
    make,
    never_foreach,  # noqa: F401 (of all tests here)
    over_kinds,
    over_masters,
    weights_of,
    with_bits,
)
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from training import Model, make_grads, set_grads

import trainops
from trainops import reference_storage

SHAPES = ((), (0,), (33, 31), (1025,))
SPLIT, WHOLE = torch.int16, FLOAT32


def train(model, optimizer, steps=3, seed=1):
    torch.manual_seed(seed)
    for grads in make_grads([p.shape for p in model.params], BFLOAT16, "cpu", steps):
        set_grads(model.params, [grad.to(p.device, p.dtype) for grad, p in zip(grads, model.params, strict=True)])
        optimizer.step()
    return model, optimizer


def made(master, dtype=BFLOAT16, target=REFERENCE, seed=0, **options):
    return make(target, drawn(SHAPES, seed), master, dtype, average=None, state_dtype=FLOAT32, **options)


def resumed(model, optimizer, master, dtype=BFLOAT16):
    """A new model and optimizer with the state of these, which go on with the next steps."""
    other, new = made(master, dtype, seed=7)
    other.load_state_dict(model.state_dict())
    new.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, new


def fresh(master, dtype=BFLOAT16):
    """A model and an optimizer that has no state yet."""
    model = Model([x.to(dtype) for x in drawn(SHAPES, seed=7)])
    options = {"lr": 0.03, "weight_decay": 0.1, "state_dtype": FLOAT32, "backend": "reference"}
    return model, trainops.AdamW(model.parameters(), master=master, **options)


def assert_same(ours, theirs):
    for x, y in zip(weights_of(*ours), weights_of(*theirs), strict=True):
        assert same_bits(x, y.detach())
    for p, q in zip(ours[0].params, theirs[0].params, strict=True):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert same_bits(ours[1].state[p][name], theirs[1].state[q][name]), name


# From one kind of master to another


@over_masters
@pytest.mark.parametrize("first", ["split", "float32"])
def test_training_goes_on_bit_for_bit_with_the_other_kind(first, master):
    whole = train(*train(*made(first)), seed=2)
    halves = train(*resumed(*train(*made(first)), master), seed=2)
    assert_same(halves, whole)
    assert {its["master"].dtype for its in halves[1].state.values()} == {SPLIT if master == "split" else WHOLE}


@over_kinds
def test_from_no_master_to_one_and_back(kind):
    master, dtype = kind
    without = train(*make(REFERENCE, drawn(SHAPES), None, average=None, state_dtype=FLOAT32))
    model, optimizer = fresh(master, dtype)
    optimizer.load_state_dict(copy.deepcopy(without[1].state_dict()))
    for p, weight in zip(model.params, weights_of(model, optimizer), strict=True):
        assert same_bits(weight, p.detach().float())  # the parameter is the weight
        assert p.shape == optimizer.state[p]["master"].shape
    train(model, optimizer)
    plain = Model([p.detach().clone() for p in model.params])
    none = trainops.AdamW(plain.parameters(), state_dtype=FLOAT32, backend="reference")
    none.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all("master" not in its for its in none.state.values())
    train(plain, none)


@over_kinds
def test_torchs_float32_optimizer_goes_on_in_16_bits_and_back(target, kind):
    """Weights go by float32_state_dict, the rest by state_dict; each step agrees with float32."""
    master, dtype = kind

    def float32_model(cls, **options):
        model = Model(drawn(SHAPES))
        return model, cls(model.parameters(), lr=0.03, weight_decay=0.1, **options)

    wide = train(*float32_model(torch.optim.AdamW))
    model, optimizer = made(master, dtype, target, seed=5)
    optimizer.load_float32_state_dict(model, wide[0].state_dict())
    optimizer.load_state_dict(copy.deepcopy(wide[1].state_dict()))
    for x, y in zip(weights_of(model, optimizer), wide[0].params, strict=True):
        assert same_bits(x, y.detach())
    train(model, optimizer)
    ours = float32_model(trainops.AdamW, backend=target.backend)
    ours[0].load_state_dict(wide[0].state_dict())
    ours[1].load_state_dict(copy.deepcopy(wide[1].state_dict()))
    train(*ours)
    assert_same((model, optimizer), ours)

    back = float32_model(torch.optim.AdamW)
    back[0].load_state_dict(optimizer.float32_state_dict(model))
    back[1].load_state_dict(optimizer.state_dict())
    for x, y in zip(back[0].params, ours[0].params, strict=True):
        assert same_bits(x.detach(), y.detach())
        assert same_bits(back[1].state[x]["exp_avg"], ours[1].state[y]["exp_avg"])
    train(*back)


@over_masters
def test_what_torchs_class_makes_of_a_master_is_none(master):
    """It casts every state to the parameter's dtype: of an int16 remainder, that makes numbers."""
    model, optimizer = train(*made(master))
    for dtype in (BFLOAT16, FLOAT32):
        theirs = Model([p.detach().to(dtype) for p in model.params])
        torchs = torch.optim.AdamW(theirs.parameters())
        torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert {its["master"].dtype for its in torchs.state.values()} == {dtype}
        for its in torchs.state.values():
            its["master"] += 1000.0
        for kind in ("split", "float32"):
            other, new = fresh(kind)
            other.load_state_dict(model.state_dict())
            new.load_state_dict(copy.deepcopy(torchs.state_dict()))
            assert {its["master"].dtype for its in new.state.values()} == {SPLIT if kind == "split" else WHOLE}
            for x, p in zip(weights_of(other, new), model.params, strict=True):
                assert same_bits(x, p.detach().float())


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "file"])
@over_kinds
def test_copies_go_on_bit_for_bit(kind, how):
    whole = train(*train(*made(*kind)), seed=2)
    halves = train(*made(*kind))
    if how == "pickle":
        halves = pickle.loads(pickle.dumps(halves))
    elif how == "deepcopy":
        halves = copy.deepcopy(halves)
    else:
        file = io.BytesIO()
        torch.save([x.state_dict() for x in halves], file)
        file.seek(0)
        state_dicts = torch.load(file, weights_only=True)
        halves = made(*kind, seed=3)
        halves[0].load_state_dict(state_dicts[0])
        halves[1].load_state_dict(state_dicts[1])
    assert_same(train(*halves, seed=2), whole)


@over_kinds
def test_distributed_checkpoints(kind):
    whole = train(*train(*made(*kind)), seed=2)
    model, optimizer = train(*made(*kind))
    checkpoint = copy.deepcopy(dcp.get_state_dict(model, optimizer))
    fresh, new = made(*kind, seed=3)
    dcp.set_state_dict(fresh, new, model_state_dict=checkpoint[0], optim_state_dict=checkpoint[1])
    assert_same(train(fresh, new, seed=2), whole)


def test_foreign_masters_that_are_rounded_to_even_are_taken():
    """Other tools round ties to even. A remainder comes as near to such a weight as it can."""
    tie, others = with_bits(0x3F808000, 0x3F818000), with_bits(0x3F808001, 0xC0123456)
    weights = torch.cat([tie, others])
    p = nn.Parameter(weights.to(BFLOAT16))
    state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4), "master": weights}
    for master in ("split", "float32"):
        optimizer = trainops.AdamW([p], master=master)
        checkpoint = optimizer.state_dict()
        checkpoint["state"] = {0: dict(state)}
        optimizer.load_state_dict(checkpoint)
        got = optimizer.float32_weight(p)
        if master == "float32":
            assert same_bits(got, weights)
        else:
            assert same_bits(got[2:], others)
            assert (got[:2].view(torch.int32) - tie.view(torch.int32)).abs().tolist() == [1, 0]


# Weights in full


def test_a_float32_model_becomes_a_split_one_without_losing_a_bit(target):
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(31, 17), nn.BatchNorm1d(17), nn.Linear(17, 5)).to(target.device)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    before = copy.deepcopy(model.state_dict())
    state_dict = model.state_dict()
    model.bfloat16()
    optimizer = trainops.AdamW(model.parameters(), master="split", backend=target.backend)
    optimizer.load_float32_state_dict(model, state_dict)
    after = optimizer.float32_state_dict(model)
    assert after.keys() == before.keys()
    assert after._metadata == before._metadata
    for name, _ in model.named_parameters():
        assert same_bits(after[name], before[name])
    assert after["1.running_var"].dtype == FLOAT32
    assert after["1.num_batches_tracked"].dtype == torch.int64
    wide = nn.Sequential(nn.Linear(31, 17), nn.BatchNorm1d(17), nn.Linear(17, 5)).to(target.device)
    wide.load_state_dict(after)
    assert all(same_bits(x.detach(), before[name]) for name, x in wide.named_parameters())
    assert all(optimizer.state[p]["step"] == 0 for p in model.parameters())


def test_weights_in_full_before_there_is_a_state_and_of_what_is_not_optimized():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).bfloat16()
    optimizer = trainops.AdamW(model[0].parameters(), master="split")
    weights = optimizer.float32_state_dict(model)
    assert all(same_bits(x, model.state_dict()[name].float()) for name, x in weights.items())
    assert not optimizer.state
    weights = {name: torch.randn(x.shape) for name, x in weights.items()}
    optimizer.load_float32_state_dict(model, weights)
    assert same_bits(model[1].weight.detach(), weights["1.weight"].bfloat16())
    assert same_bits(optimizer.float32_weight(model[0].weight), weights["0.weight"])
    assert set(optimizer.state) == set(model[0].parameters())
    plain = trainops.AdamW(nn.Linear(2, 2).parameters())
    assert all(x.dtype == FLOAT32 for x in plain.float32_state_dict(nn.Linear(2, 2)).values())


def test_tied_weights_have_one_master():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    state_dict = copy.deepcopy(model.state_dict())
    optimizer = trainops.AdamW(model.bfloat16().parameters(), master="split")
    optimizer.load_float32_state_dict(model, state_dict)
    weights = optimizer.float32_state_dict(model)
    assert same_bits(weights["0.weight"], weights["1.weight"])
    assert same_bits(weights["0.weight"], state_dict["0.weight"])


BAD = {
    "missing": (lambda state_dict: state_dict.pop("params.1"), r"missing \['params.1'\]"),
    "unexpected": (lambda state_dict: state_dict.update(more=torch.ones(3)), r"unexpected \['more'\]"),
    "shape": (lambda state_dict: state_dict.update({"params.3": torch.ones(3)}), "params.3 has shape"),
    "no_tensor": (lambda state_dict: state_dict.update({"params.3": 3.0}), "params.3 is no tensor"),
}


@pytest.mark.parametrize("bad", BAD)
def test_weights_that_do_not_fit_change_nothing(bad):
    model, optimizer = train(*made("split"))
    spoil, message = BAD[bad]
    state_dict = optimizer.float32_state_dict(model)
    weights = {name: x + 1 for name, x in state_dict.items()}
    spoil(weights)
    with pytest.raises(ValueError, match=message):
        optimizer.load_float32_state_dict(model, weights)
    assert all(map(same_bits, weights_of(model, optimizer), state_dict.values()))


def test_weights_that_would_lose_bits_are_refused():
    model = nn.Linear(3, 2).bfloat16()
    before = copy.deepcopy(model.state_dict())
    for options in ({}, {"state_dtype": FLOAT32}):
        optimizer = trainops.AdamW(model.parameters(), **options)
        with pytest.raises(ValueError, match=r"weight is torch.bfloat16 and has no master"):
            optimizer.load_float32_state_dict(model, {"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    assert all(same_bits(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("master", ["split", "float32"])
def test_a_model_that_goes_on_in_float32(master):
    """It has no masters any more, as soon as its weights are loaded."""
    model, optimizer = train(*made(master))
    state_dict = optimizer.float32_state_dict(model)
    model.float()
    assert all(map(same_bits, map(optimizer.float32_weight, model.params), model.params))
    optimizer.load_float32_state_dict(model, state_dict)
    assert all(map(same_bits, optimizer.float32_state_dict(model).values(), state_dict.values()))
    train(model, optimizer, 1)
    assert not any("master" in optimizer.state[p] for p in model.params)


# Parameters that others write


@over_kinds
def test_a_parameter_that_was_overwritten_wins(target, kind):
    """In full beside a float32 master; beside a remainder, to within half of its last place."""
    master, dtype = kind
    model, optimizer = train(*made(master, dtype, target))
    old = [p.detach().clone() for p in model.params]
    new = [x.to(target.device, dtype) for x in drawn(SHAPES, seed=9)]
    with torch.no_grad():
        for p, x in zip(model.params, new, strict=True):
            p.copy_(x)
    for weight, before, x in zip(weights_of(model, optimizer), old, new, strict=True):
        if master == "float32":
            assert same_bits(weight[before != x], x[before != x].float())
        elif x.numel():
            assert ((weight - x.float()).abs() <= x.float().abs() * 2.0**-8).all()
            assert same_bits(reference_storage.split(weight)[0], x)
    wide = Model([x.detach().clone() for x in weights_of(model, optimizer)])
    theirs = trainops.AdamW(wide.parameters(), lr=0.03, weight_decay=0.1, backend=target.backend)
    theirs.load_state_dict(copy.deepcopy({**optimizer.state_dict()}))
    train(model, optimizer, steps=1)
    train(wide, theirs, steps=1)
    for weight, x in zip(weights_of(model, optimizer), wide.params, strict=True):
        assert same_bits(weight, x.detach())


def test_remainders_that_cannot_belong_are_left_out(target):
    """Zero with a negative remainder would be NaN, and so would an infinity with a positive one."""
    p = nn.Parameter(
        torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.0], dtype=BFLOAT16, device=target.device)
    )
    optimizer = trainops.AdamW([p], lr=0.0, master="split", backend=target.backend)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    stale = torch.tensor([-1, -300, 1, 300, 5], dtype=torch.int16, device=target.device)
    optimizer.state[p]["master"].copy_(stale)
    before = p.detach().clone()
    assert same_bits(optimizer.float32_weight(p)[:4], before.float()[:4])
    optimizer.step()
    assert same_bits(p.detach(), before)
    assert optimizer.state[p]["master"].tolist() == [0, 0, 0, 0, 5]


def test_a_master_that_is_gone_is_made_again(target):
    model, optimizer = train(*made("split", target=target))
    p = model.params[2]
    del optimizer.state[p]["master"]
    train(model, optimizer, steps=1)
    assert optimizer.state[p]["master"].any()


# Averages outside of a step's kernel


@over_kinds
@pytest.mark.parametrize("why", ["no_gradient", "shared"])
def test_an_average_that_the_kernel_does_not_move_follows_the_weight_in_full(target, kind, why):
    wide = make(target, drawn(SHAPES), state_dtype=FLOAT32)
    narrow = make(target, drawn(SHAPES), *kind, state_dtype=FLOAT32)
    for step in range(3):
        for model, optimizer in (wide, narrow):
            set_grads(model.params, [torch.ones_like(p) for p in model.params])
            if why == "no_gradient":
                model.params[2].grad = None
                if step == 1:
                    model.params[3].grad = None
            elif len(optimizer.param_groups) == 1:
                twice = nn.Parameter(model.params[3].data)
                twice.grad = torch.zeros_like(twice)
                optimizer.add_param_group({"params": [twice]})
            if step < 2 or why == "no_gradient":
                optimizer.step()
    if why == "no_gradient":
        for theirs, ours in zip(wide[1].ema.module.params, narrow[1].ema.module.params, strict=True):
            assert same_bits(ours, theirs)


def test_swapped_averages_leave_masters_alone(target):
    model, optimizer = make(target, drawn(SHAPES), "split")
    train(model, optimizer)
    before = weights_of(model, optimizer)
    with optimizer.ema.swap():
        for p, average in zip(model.params, optimizer.ema.module.params, strict=True):
            assert same_bits(p.detach(), average.to(BFLOAT16))
    assert all(map(same_bits, weights_of(model, optimizer), before))


# Bad input


def param(dtype, *shape):
    return nn.Parameter(torch.ones(shape or (3,), dtype=dtype))


@pytest.mark.parametrize("bad", ["Split", "int8", "", True, 16, FLOAT32, ("split",), {}], ids=str)
def test_other_kinds_are_refused(bad):
    with pytest.raises(ValueError, match='master must be "split", "float32" or None'):
        trainops.AdamW([param(BFLOAT16)], master=bad)


def test_where_no_parameter_can_have_one():
    for dtypes in ([FLOAT32], [torch.float64, FLOAT32], [torch.complex64]):
        with pytest.raises(ValueError, match='master="split" is for bfloat16 parameters, and none is'):
            trainops.AdamW(map(param, dtypes), master="split")
        with pytest.raises(ValueError, match='master="float32" is for bfloat16 or float16 parameters, and none is'):
            trainops.AdamW(map(param, dtypes), master="float32")
    message = r'master="split" is for bfloat16, but a parameter of \(2,\) is float16: master="float32" serves that'
    with pytest.raises(ValueError, match=message):
        trainops.AdamW([param(BFLOAT16), param(FLOAT16, 2)], master="split")
    optimizer = trainops.AdamW([param(BFLOAT16)], master="split")
    optimizer.add_param_group({"params": [param(FLOAT32)]})
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [param(FLOAT16, 2)]})
    assert len(optimizer.param_groups) == 2
    with pytest.raises(ValueError, match="master is a setting of the optimizer"):
        optimizer.add_param_group({"params": [param(FLOAT32)], "master": "split"})
    with pytest.raises(ValueError, match="differentiable=True runs PyTorch's own step"):
        trainops.AdamW([param(BFLOAT16)], master="split", differentiable=True)
    assert "master: split" in repr(optimizer)


@pytest.mark.parametrize("dtype", [FLOAT32, torch.float64, FLOAT16])
def test_a_parameter_that_was_cast_is_an_error(target, dtype):
    model, optimizer = train(*made("split", target=target))
    model.to(dtype)
    set_grads(model.params, [torch.ones_like(p) for p in model.params])
    before = [p.detach().clone() for p in model.params]
    with pytest.raises(
        (RuntimeError, ValueError), match=r"master of torch.int16 does not fit a parameter of|is float16"
    ):
        optimizer.step()
    assert all(same_bits(p.detach(), x) for p, x in zip(model.params, before, strict=True))


@over_kernels
def test_tensors_that_no_kernel_takes_for_a_master(target):
    for wrong in (torch.int32, torch.uint16, torch.int8, BFLOAT16):
        model, optimizer = train(*made("split", target=target))
        state = optimizer.state[model.params[2]]
        state["master"] = state["master"].to(wrong)
        set_grads(model.params, [torch.ones_like(p) for p in model.params])
        with pytest.raises(RuntimeError, match=f"a master of {wrong} does not fit"):
            optimizer.step()
    model, optimizer = train(*made("split", target=target))
    optimizer.state[model.params[2]]["exp_avg"] = torch.zeros(SHAPES[2], dtype=torch.int16, device=target.device)
    with pytest.raises(RuntimeError, match=r"exp_avg of torch.int16 does not fit"):
        optimizer.step()


def test_masters_of_another_shape_are_not_loaded():
    model, optimizer = train(*made("split"))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["state"][2]["master"] = torch.zeros(3, dtype=SPLIT)
    before = weights_of(model, optimizer)
    with pytest.raises(ValueError, match=r"master has shape \(3,\), but its parameter has shape"):
        optimizer.load_state_dict(checkpoint)
    assert all(map(same_bits, weights_of(model, optimizer), before))


def test_kinds_are_named():
    assert {kind for kind, _ in KINDS.values()} == {"split", "float32"}
