"""``state_dtype``: moments of a dtype of their own, under the contract, and what checkpoints make of them."""

import copy
import itertools
import pickle

import pytest
import torch
from contract import DTYPES, same_bits
from controls import STEP_CONTROLS, must_fail, truncated
from targets import REFERENCE, interpreted
from training import Model, check_one_step, make_grads, set_grads

import trainops

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
CHOICES = [FLOAT32, BFLOAT16, (FLOAT32, BFLOAT16), (BFLOAT16, FLOAT32)]
SHAPES = ((), (0,), (7,), (33, 31), (1025,))

over_choices = pytest.mark.parametrize("state_dtype", CHOICES, ids=lambda x: str(x).replace("torch.", ""))


def dtypes_of(optimizer):
    """Those of the moments, which all parameters must share."""
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    (found,) = {tuple(its[name].dtype for name in names if name in its) for its in optimizer.state.values()}
    return found


def expected(state_dtype, amsgrad):
    first, second = state_dtype if isinstance(state_dtype, tuple) else (state_dtype, state_dtype)
    return (first, second, second) if amsgrad else (first, second)


def make(target, dtype, seed=0, average=FLOAT32, cls=trainops.AdamW, shapes=SHAPES, **options):
    generator = torch.Generator().manual_seed(seed)
    model = Model([torch.randn(shape, generator=generator).to(target.device, dtype) for shape in shapes])
    if cls is trainops.AdamW:
        options["backend"] = target.backend
        if average is not None:
            options["ema"] = trainops.EMA(model, 0.9, dtype=average, backend=target.backend)
    return model, cls(model.parameters(), lr=0.03, **options)


def train(model, optimizer, steps=3, after=lambda optimizer: optimizer.step(), seed=1):
    torch.manual_seed(seed)
    for grads in make_grads([p.shape for p in model.params], model.params[0].dtype, "cpu", steps):
        set_grads(model.params, [grad.to(p.device) for grad, p in zip(grads, model.params, strict=True)])
        after(optimizer)
    return optimizer


def check(target, dtype, state_dtype, amsgrad, average=FLOAT32):
    model, optimizer = make(
        target, dtype, average=average, state_dtype=state_dtype, amsgrad=amsgrad, max_grad_norm=1.0
    )
    train(model, optimizer, after=check_one_step)
    assert dtypes_of(optimizer) == expected(state_dtype, amsgrad)
    assert all(p.dtype == dtype for p in model.params)


@interpreted(lambda dtype, amsgrad, state_dtype, **_: amsgrad and dtype == BFLOAT16 and state_dtype == BFLOAT16)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@over_choices
def test_steps_meet_the_contract(target, dtype, state_dtype, amsgrad):
    check(target, dtype, state_dtype, amsgrad)


@over_choices
def test_wrong_steps_are_noticed(state_dtype):
    for control in (*STEP_CONTROLS.values(), lambda: truncated("param")):
        must_fail(control, check, REFERENCE, BFLOAT16, state_dtype, amsgrad=True)
    names = ["exp_avg", "exp_avg_sq"]
    for name, dtype in zip(names, expected(state_dtype, False), strict=True):
        if dtype == BFLOAT16:
            must_fail(lambda name=name: truncated(name), check, REFERENCE, FLOAT32, state_dtype, amsgrad=False)


# Checkpoints


@over_choices
@pytest.mark.parametrize("first", [None, *DTYPES[:3], (BFLOAT16, FLOAT32)], ids=str)
def test_loading_converts_the_moments(first, state_dtype):
    """From torch's AdamW (whose parameters are float32), and from any other ``state_dtype``."""
    if first is None or first == torch.float64:
        theirs = train(*make(REFERENCE, first or FLOAT32, cls=torch.optim.AdamW, amsgrad=True))
    else:
        theirs = train(*make(REFERENCE, BFLOAT16, state_dtype=first, amsgrad=True))
    model, ours = make(REFERENCE, BFLOAT16, state_dtype=state_dtype)
    for _ in range(2):  # before there is a state, and after
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        assert dtypes_of(ours) == expected(state_dtype, True)
        for p, loaded in zip(model.params, theirs.state.values(), strict=True):
            for name, x in ours.state[p].items():
                assert same_bits(x, loaded[name].to(x.dtype)), name
        train(model, ours, steps=1)


@interpreted(lambda how, **_: how == "state_dict")
@over_choices
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_training_goes_on_bit_for_bit(target, state_dtype, how):
    whole, model = (make(target, BFLOAT16, state_dtype=state_dtype, average=None) for _ in range(2))
    train(*whole)
    resumed = train(*model)
    model = model[0]
    if how == "state_dict":
        checkpoint = copy.deepcopy((model.state_dict(), resumed.state_dict()))
        model, resumed = make(target, BFLOAT16, seed=5, state_dtype=state_dtype, average=None)
        model.load_state_dict(checkpoint[0])
        resumed.load_state_dict(checkpoint[1])
    elif how == "pickle":
        model, resumed = pickle.loads(pickle.dumps((model, resumed)))
    else:
        model, resumed = copy.deepcopy((model, resumed))
    assert resumed.state_dtype == state_dtype
    train(*whole, seed=2)
    train(model, resumed, seed=2)
    for ours, theirs in zip(model.params, whole[0].params, strict=True):
        assert same_bits(ours.detach(), theirs.detach())
        assert all(same_bits(x, whole[1].state[theirs][name]) for name, x in resumed.state[ours].items())


def test_torchs_class_goes_on_from_it():
    ours = train(*make(REFERENCE, FLOAT32, state_dtype=BFLOAT16))
    model, torchs = make(REFERENCE, FLOAT32, cls=torch.optim.AdamW)
    torchs.load_state_dict(ours.state_dict())
    assert dtypes_of(torchs) == (FLOAT32, FLOAT32)
    train(model, torchs)


def test_without_one_it_is_as_in_torch():
    for dtype in DTYPES:
        model, ours = make(REFERENCE, dtype)
        assert dtypes_of(train(model, ours)) == (dtype, dtype)
        ours.load_state_dict(train(*make(REFERENCE, FLOAT32, cls=torch.optim.AdamW)).state_dict())
        assert dtypes_of(ours) == (dtype, dtype)


def test_parameters_that_came_later_have_it_too():
    model, optimizer = make(REFERENCE, BFLOAT16, state_dtype=FLOAT32)
    later = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [later], "amsgrad": True})
    later.grad = torch.ones(3)
    train(model, optimizer)
    assert {x.dtype for name, x in optimizer.state[later].items() if name != "step"} == {FLOAT32}
    assert "state_dtype: torch.float32" in repr(optimizer)


# Bad input


BAD = [
    "float32",
    torch.float16,
    torch.float64,
    torch.int8,
    torch.complex64,
    32,
    (),
    (FLOAT32,),
    (FLOAT32, None),
]
BAD += [(BFLOAT16, torch.float16), (FLOAT32,) * 3, [FLOAT32, "bfloat16"], True, {}]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_anything_else_is_refused(bad):
    with pytest.raises(ValueError, match=r"state_dtype must be torch.float32, torch.bfloat16 or .int8., or a pair"):
        trainops.AdamW([torch.nn.Parameter(torch.ones(3))], state_dtype=bad)


def test_complex_parameters_are_refused():
    def param(dtype):
        return torch.nn.Parameter(torch.ones(2, 3, dtype=dtype))

    with pytest.raises(
        ValueError, match=r"state_dtype is for real parameters, but one of \(2, 3\) is torch.complex64"
    ):
        trainops.AdamW([param(FLOAT32), param(torch.complex64)], state_dtype=BFLOAT16)
    optimizer = trainops.AdamW([param(FLOAT32)], state_dtype=BFLOAT16)
    with pytest.raises(ValueError, match="real parameters"):
        optimizer.add_param_group({"params": [param(torch.complex128)]})
    assert len(optimizer.param_groups) == 1


def test_it_belongs_to_the_whole_optimizer_and_to_our_step():
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="state_dtype is a setting of the optimizer"):
        trainops.AdamW([{"params": [p], "state_dtype": FLOAT32}])
    with pytest.raises(ValueError, match="differentiable=True runs PyTorch's own step"):
        trainops.AdamW([p], differentiable=True, state_dtype=FLOAT32)


def test_each_moment_is_converted_alone():
    for pair in itertools.product((FLOAT32, BFLOAT16), repeat=2):
        assert dtypes_of(train(*make(REFERENCE, torch.float16, state_dtype=pair))) == pair
        assert dtypes_of(train(*make(REFERENCE, torch.float16, state_dtype=list(pair)))) == pair
