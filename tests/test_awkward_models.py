"""Averages of models with awkward tensors: what timm's class can do they can, and what raises has changed nothing."""

import copy
import warnings

import pytest
import torch
from awkward import KINDS, Extra, Quantised, denser, quantised, sparse, with_buffer, with_frozen
from contract import same_bits
from models import snapshot
from targets import over
from torch import nn
from torch.nn.utils import parametrizations

import trainops

pytestmark = pytest.mark.filterwarnings("ignore:.*(weight_norm|nested tensors|CSR|quantize_per_tensor|copy_ on)")


def make(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KINDS[kind][0](), KINDS[kind][1]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def set_grads(model):
    for p in trainable(model):
        p.grad = torch.ones_like(p)


def value(x):
    """What can be compared."""
    if x is None or isinstance(x, Quantised):
        return None if x is None else x.codes
    x = x.detach()
    x = torch.nested.to_padded_tensor(x, -1.0) if x.is_nested else x
    x = x.dequantize() if x.is_quantized else x
    return x.float().to_dense() if x.layout is not torch.strided or x.dtype.itemsize == 1 else x


def same(x, y):
    x, y = value(x), value(y)
    return x is y is None or (x is not None and y is not None and torch.equal(x, y))


def awkward_tensors(module):
    return {name: x for name, x in {**module._parameters, **module._buffers}.items() if name in ("x", "more")}


def assert_follows(ema):
    """The awkward tensors are those of the model; the weights were averaged."""
    ours, theirs = awkward_tensors(ema.module), awkward_tensors(ema.model)
    assert ours.keys() == theirs.keys()
    assert all(same(x, theirs[name]) for name, x in ours.items())
    assert ema.module._non_persistent_buffers_set == ema.model._non_persistent_buffers_set


@over("fused", {"update": False, "step": True})
@over("skip", {"": False, "skipping": True})
@over("kind", {kind: kind for kind in KINDS})
def test_every_kind_is_followed(kind, fused, skip):
    model, change = make(kind)
    ema = trainops.EMA(model, 0.0)
    optimizer = trainops.AdamW(trainable(model), lr=0.1, skip_nonfinite=skip, ema=ema if fused else None)
    for step in range(3):
        change(model) if step == 1 else None
        set_grads(model)
        optimizer.step()
        None if fused else ema.update()
        assert_follows(ema)
    for average, p in zip(trainable(copy_of_flags(model, ema.module)), trainable(model), strict=True):
        assert same_bits(average, p)
    assert ema.step == 3


def copy_of_flags(model, module):
    """The averaged module, whose parameters are marked as those of the model are."""
    twin = nn.ParameterDict()
    for (name, average), p in zip(module.named_parameters(), model.parameters(), strict=True):
        twin[name.replace(".", "/")] = (
            nn.Parameter(average.detach(), requires_grad=True) if p.requires_grad else average
        )
    return twin


@over("kind", {kind: kind for kind in KINDS})
def test_swap_and_copies(kind):
    model, change = make(kind)
    ema = trainops.EMA(model, 0.5)
    ema.update()
    change(model)
    ema.update()
    before = {name: None if x is None else x.detach().clone() for name, x in awkward_tensors(model).items()}
    weights = [p.detach().clone() for p in trainable(model)]
    with ema.swap():
        assert_follows(ema)
    assert all(same(x, before[name]) for name, x in awkward_tensors(model).items())
    assert all(map(same_bits, trainable(model), weights))
    ema.copy_to(model)
    assert_follows(ema)


SKIPPED = ["sparse_changes", "csr", "quantised_buffer", "float8_changes", "expanded"]


@over("kind", {kind: kind for kind in SKIPPED})
def test_a_skipped_step_leaves_awkward_buffers(kind):
    model, change = make(kind)
    ema = trainops.EMA(model, 0.5)
    optimizer = trainops.AdamW(trainable(model), skip_nonfinite=True, ema=ema)
    set_grads(model)
    optimizer.step()
    before = ema.module.x.detach().clone()
    change(model)
    model.weight.grad.fill_(float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert same(ema.module.x, before)


# What raises has changed nothing.


def grow(model):
    model.x = torch.ones(5)


def freeze_and_cut(model):
    """A weight that has no gradient, which the optimizer's kernel never sees."""
    model.weight.grad = None
    model.weight.data = model.weight.data[:2]


def make_sparse_weight(model):
    del model.weight
    model.weight = nn.Parameter(sparse())


def make_complex(model):
    model.x = model.x.to(torch.complex64)


REFUSED = {
    "float_grows": (
        grow,
        ValueError,
        r"x has shape \(5,\), but its average has shape \(2,\)\. Write average_buffers",
    ),
    "to_complex": (make_complex, ValueError, "x is torch.complex64, but its average is torch.float32"),
    "to_integers": (
        lambda model: setattr(model, "x", torch.ones(2, dtype=torch.int64)),
        ValueError,
        "x is torch.int64",
    ),
    "cut_without_gradient": (freeze_and_cut, ValueError, r"weight has shape \(2, 4\)"),
    "sparse_weight": (make_sparse_weight, ValueError, r"weight has shape \(3, 3\)"),
    "another_backend": (
        lambda model: model.register_buffer("unused", None),
        RuntimeError,
        "backend 'foreign' does not take",
    ),
}


@over("use", {"step": True, "update": False})
@over(("change", "error", "message"), REFUSED)
def test_what_raises_has_changed_nothing(change, error, message, use, monkeypatch):
    model = with_buffer(lambda: torch.ones(2))()
    ema = trainops.EMA(model, 0.5)
    optimizer = trainops.AdamW(model.parameters(), lr=0.1, ema=ema if use else None)
    set_grads(model)
    optimizer.step()
    set_grads(model)
    change(model)
    if "foreign" in message:
        ema.backend = "foreign"
        refused = RuntimeError("backend 'foreign' does not take tensors on 'cpu'")
        monkeypatch.setattr("trainops.ema_follow.select", lambda backend, device: (_ for _ in ()).throw(refused))
    states = {p: {name: x.clone() for name, x in state.items()} for p, state in optimizer.state.items()}
    before, average, step = [value(p).clone() for p in model.parameters()], snapshot(ema.module), ema.step
    with pytest.raises(error, match=message):
        optimizer.step() if use else ema.update()
    assert ema.step == step
    assert all(torch.equal(value(p), x) for p, x in zip(model.parameters(), before, strict=True))
    assert all(same_bits(x, average[name]) for name, x in snapshot(ema.module).items())
    for p, state in states.items():
        assert all(same_bits(optimizer.state[p][name], x) for name, x in state.items())


UNAVERAGEABLE = {
    "float8": lambda: nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn)),
    "sparse": lambda: nn.Parameter(sparse()),
    "quantised": lambda: nn.Parameter(quantised()),
}


@over("weight", UNAVERAGEABLE)
def test_a_trained_weight_of_which_there_is_no_average(weight):
    """It says so before the first step, and can be left out."""
    model = nn.Linear(4, 3)
    model.x = weight()
    ema = trainops.EMA(model, 0.5)
    optimizer = trainops.AdamW([model.weight, model.bias], lr=0.1, ema=ema)
    set_grads(nn.ParameterList([model.weight, model.bias]))
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"x is .* of which there is no average: exclude it"):
        optimizer.step()
    assert same_bits(model.weight, before)
    assert not optimizer.state
    optimizer.ema = ema = trainops.EMA(model, 0.5, exclude="x")
    optimizer.step()
    assert ema.module.x is model.x


def test_a_model_without_shapes():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet: run a batch through the model"):
        trainops.EMA(model)
    model(torch.ones(1, 4))
    trainops.EMA(model).update()


@pytest.mark.parametrize("use", [trainops.EMA.update, trainops.EMA.state_dict, trainops.EMA.copy_to])
def test_an_average_that_was_made_on_meta_gets_memory_with_its_model(use):
    model = nn.Linear(4, 3, device="meta")
    ema = trainops.EMA(model, 0.5, dtype=torch.float64)
    model.to_empty(device="cpu")
    model.reset_parameters()
    use(ema)
    assert all(torch.equal(x, p.double()) for x, p in zip(ema.module.parameters(), model.parameters(), strict=True))
    assert not any(x.requires_grad for x in ema.module.parameters())


def test_an_average_that_is_to_stay_on_meta():
    model = nn.Linear(4, 3)
    ema = trainops.EMA(model, 0.5, device="meta")
    with pytest.raises(ValueError, match="weight is on cpu, but its average on meta"):
        ema.update()


def test_an_average_that_was_made_in_inference_mode():
    model = nn.Linear(4, 3)
    with torch.inference_mode():
        ema = trainops.EMA(model, 0.5)
    optimizer = trainops.AdamW(model.parameters(), lr=0.1, ema=ema)
    for _ in range(2):
        set_grads(model)
        optimizer.step()
    assert ema.step == 2


def test_a_buffer_that_came_in_inference_mode_is_followed_outside():
    model = nn.Linear(4, 3)
    ema = trainops.EMA(model, 0.5)
    model.register_buffer("late", torch.ones(2))
    with torch.inference_mode():
        ema.update()
    assert not ema.module.late.is_inference()
    model.late.fill_(3)
    ema.update()
    assert ema.module.late.tolist() == [2.0, 2.0]


def test_swap_into_a_buffer_of_inference_mode():
    model = with_buffer(lambda: torch.ones(2))()
    ema = trainops.EMA(model, 0.5)
    ema.update()
    with torch.inference_mode():
        model.x = torch.full((2,), 3.0)
    ema.update()
    with ema.swap():
        assert model.x.tolist() == [2.0, 2.0]
    assert model.x.tolist() == [3.0, 3.0]


def test_buffers_tied_and_untied():
    model = nn.ModuleList([with_buffer(lambda: torch.ones(2))(), with_buffer(lambda: torch.ones(2))()])
    model[1].x = model[0].x
    ema = trainops.EMA(model, 0.5)
    ema.update()
    model[1].x = torch.full((2,), 7.0)
    ema.update()
    assert ema.module[1].x is not ema.module[0].x
    assert ema.module[1].x.tolist() == [7.0, 7.0]
    model[1].x = model[0].x
    ema.update()
    assert ema.module[1].x is ema.module[0].x
    assert ema.module[0].x.tolist() == [1.0, 1.0]


# Checkpoints go through the module's own hooks.

CHECKPOINTS = {
    "bytes": (lambda: Extra(b"ab"), lambda model: setattr(model, "extra", b"x" * 115)),
    "tensors": (lambda: Extra(torch.ones(4)), lambda model: setattr(model, "extra", torch.ones(115))),
    "none_first": (lambda: Extra(None), lambda model: setattr(model, "extra", torch.ones(4))),
    "none_later": (lambda: Extra(torch.ones(4)), lambda model: setattr(model, "extra", None)),
    "reshaped": (lambda: Extra(), lambda model: setattr(model, "grows", torch.arange(5.0))),
    "num_batches_tracked": (lambda: nn.BatchNorm1d(3), lambda model: model.running_mean.fill_(2)),
}


@over(("build", "change"), CHECKPOINTS)
def test_what_the_model_loads_its_average_loads(build, change):
    saved = build()
    change(saved)
    state = {"module": saved.state_dict(), "step": 7}
    state["module"].pop("num_batches_tracked", None)  # as PyTorch saved it before 0.4.1
    state["module"]._metadata.clear()
    model = build()
    ema = trainops.EMA(model)
    model.load_state_dict(state["module"])
    ema.load_state_dict(state)
    assert ema.step == 7
    ours, theirs = ema.module.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert torch.equal(ours[name], x) if isinstance(x, torch.Tensor) else ours[name] == x
    ema.update()


def test_keys_of_the_old_weight_norm():
    """As a parametrized module reads them."""
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(4, 3))
    ema = trainops.EMA(parametrizations.weight_norm(nn.Linear(4, 3)))
    ema.load_state_dict({"module": old.state_dict(), "step": 1})
    assert same_bits(ema.module.parametrizations.weight.original0, old.weight_g)
    assert same_bits(ema.module.parametrizations.weight.original1, old.weight_v)


SPOILT = {
    "extra": lambda state: state.update(_extra_state="bad"),
    "last_shape": lambda state: state.update({"linear.bias": torch.ones(4)}),
    "no_tensor": lambda state: state.update({"linear.bias": None}),
    "missing_extra": lambda state: state.pop("_extra_state"),
}


@over("spoil", SPOILT)
def test_a_checkpoint_that_does_not_load_changes_nothing(spoil):
    """Whatever its hooks have done before it raised."""
    ema = trainops.EMA(Extra("good"))
    state = Extra("other").state_dict()
    state["grows"] = torch.ones(7)
    spoil(state)
    before = snapshot(ema.module)
    with pytest.raises(ValueError, match=r"does not fit|expected|no tensor"):
        ema.load_state_dict({"module": state, "step": 3})
    assert ema.step == 0
    assert ema.module.extra == "good"
    assert all(same_bits(x, before[name]) for name, x in snapshot(ema.module).items())


def test_a_hook_that_needs_memory_has_it():
    """The first rehearsal has none."""
    ema = trainops.EMA(Extra())
    ema.module.register_load_state_dict_pre_hook(lambda module, *_: module.linear.weight.sum().item())
    other = Extra()
    ema.load_state_dict({"module": other.state_dict(), "step": 1})
    assert same_bits(ema.module.linear.weight, other.linear.weight)


def test_the_rehearsal_with_memory_has_the_last_word():
    """A hook that reads memory, and renames keys that do not fit before."""

    def rename(module, state_dict, *_):
        if module.linear.weight.isfinite().all().item() and "old_grows" in state_dict:
            state_dict["grows"] = state_dict.pop("old_grows")

    ema = trainops.EMA(Extra())
    ema.module.register_load_state_dict_pre_hook(rename)
    other = Extra()
    state = other.state_dict()
    state["old_grows"] = state.pop("grows")
    ema.load_state_dict({"module": state, "step": 1})
    assert same_bits(ema.module.linear.weight, other.linear.weight)
    assert same_bits(ema.module.grows, other.grows)


def test_hooks_know_the_versions_of_modules():
    class Versioned(nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            self.seen = local_metadata.get("version")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    ema = trainops.EMA(Versioned(4, 3))
    ema.load_state_dict(ema.state_dict())
    assert ema.module.seen == 3


def test_a_module_without_copies_is_looked_at():
    """As a sharded one."""
    ema = trainops.EMA(nn.Linear(4, 3))
    refuse = lambda self, memo: (_ for _ in ()).throw(RuntimeError("no copies"))  # noqa: E731
    ema.module.__class__ = type("Uncopied", (nn.Linear,), {"__deepcopy__": refuse})
    state = nn.Linear(4, 3).state_dict()
    ema.load_state_dict({"module": state, "step": 1})
    assert same_bits(ema.module.weight, state["weight"])
    before = snapshot(ema.module)
    with pytest.raises(ValueError, match=r"bias has shape \(2,\), expected \(3,\)"):
        ema.load_state_dict({"module": {**state, "weight": torch.ones(3, 4), "bias": torch.ones(2)}, "step": 2})
    assert all(same_bits(x, before[name]) for name, x in snapshot(ema.module).items())


def test_a_step_after_a_long_time_looks_at_nothing_anew():
    """Awkward tensors that stay what they are cost nothing but their copies."""
    for kind in ("sparse", "quantised_buffer", "frozen_quantised", "none", "expanded"):
        ema = trainops.EMA(make(kind)[0], 0.5)
        ema.update()
        matched = ema.plan_update().matched
        ema.update()
        assert ema.plan_update().matched is matched, kind


def test_a_copy_of_an_average_of_awkward_tensors():
    for build in (with_frozen(quantised), with_buffer(denser), with_buffer(lambda: torch.ones(1, 4).expand(3, 4))):
        twin = copy.deepcopy(trainops.EMA(build(), 0.5))
        twin.update()
        assert_follows(twin)
