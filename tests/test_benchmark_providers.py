"""Who takes part in the benchmarks is held to float64 first, and wrong ones are found."""

from typing import ClassVar

import pytest
import torch
from targets import thorough

import trainops
from benchmarks import (
    bench_adam,
    bench_adamw,
    bench_clip_grad_norm,
    bench_drop_path,
    bench_ema,
    bench_low_precision,
    bench_sgd,
    bench_step,
    bench_training,
    peers,
    work,
)
from benchmarks.runner import NotHere, Options

SMALL = [(3, 5), (7,), (), (1,), (1100,)]


TORCH_AND_OURS = {"torch loop", "torch foreach", "torch fused", "torch fused, grad_scale", "trainops"}


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _short_period(monkeypatch):
    """Values that repeat within the small tensors; a million of them would take a case half a second."""
    monkeypatch.setattr(work, "PERIOD", 1009)


@DTYPES
@pytest.mark.parametrize(
    "bench",
    [
        bench_step.StepWork,
        bench_adamw.AdamWork,
        bench_adam.AdamWork,
        bench_sgd.SGDWork,
        bench_clip_grad_norm.ClipWork,
        bench_ema.EmaWork,
    ],
)
def test_providers_agree_with_float64(bench, dtype):
    made = bench(SMALL, Options(), dtype)
    for name in TORCH_AND_OURS & set(bench.makers):
        if bench is bench_sgd.SGDWork and "fused" in name and dtype != torch.float32:
            with pytest.raises(NotHere, match="wrong numbers"):
                made.admit(name)
            continue
        assert made.admit(name)[1] <= 0.5, name  # so that larger models have room


def step_of(clip=1.0, decay=work.DECAY, every=1, cls=torch.optim.AdamW, right=peers.SETTINGS, **settings):
    """A whole step of PyTorch's, with something wrong."""

    def make(made):
        optimizer = cls(made.params, **{**right, **settings})
        averages = [p.detach().clone() for p in made.params]
        calls = []

        def step():
            calls.append(None)
            if len(calls) % every:
                return
            torch.nn.utils.clip_grad_norm_(made.params, clip * made.max_norm)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, made.params, 1 - decay)

        return bench_step.provider(made, optimizer, averages, step)

    return make


WRONG = {
    "nothing": step_of(every=100),
    "no clipping": step_of(clip=1e6),
    "clipping to twice the norm": step_of(clip=2.0),
    "clipping to half the norm": step_of(clip=0.5),
    "no average": step_of(decay=1.0),
    "another decay": step_of(decay=0.8),
    "every other step": step_of(every=2),
    "no weight decay": step_of(weight_decay=0.0),
    "another beta": step_of(betas=(0.5, 0.999)),
}


@DTYPES
@pytest.mark.parametrize("name", WRONG)
def test_wrong_steps_are_found(name, dtype):
    class Wrong(bench_step.StepWork):
        makers: ClassVar = {**bench_step.StepWork.makers, **WRONG, "right": step_of()}

    made = Wrong(SMALL, Options(), dtype)
    assert made.admit("right")[1] <= 0.5
    assert made.admit(name)[1] > 1.2


WRONG_RULES = {
    (bench_adam.AdamWork, torch.optim.Adam): [
        {"clip": 1e6},
        {"clip": 0.5},
        {"every": 2},
        {"weight_decay": 0.0},
        {"decoupled_weight_decay": True},
        {"betas": (0.5, 0.999)},
        {"eps": 0.01},
    ],
    (bench_sgd.SGDWork, torch.optim.SGD): [
        {"clip": 1e6},
        {"clip": 0.5},
        {"every": 2},
        {"weight_decay": 0.0},
        {"momentum": 0.5},
        {"nesterov": True},
        {"dampening": 0.5},
    ],
}


def rule_of(bench, cls, **wrong):
    """A whole step of another class, with something wrong."""
    module = bench_adam if bench is bench_adam.AdamWork else bench_sgd
    return step_of(cls=cls, right=module.SETTINGS, **wrong)


@DTYPES
@pytest.mark.parametrize(("kind", "wrong"), [(kind, wrong) for kind, its in WRONG_RULES.items() for wrong in its])
def test_wrong_steps_of_other_rules_are_found(kind, wrong, dtype):
    bench, cls = kind

    class Wrong(bench):
        makers: ClassVar = {**bench.makers, "wrong": rule_of(bench, cls, **wrong), "right": rule_of(bench, cls)}

    made = Wrong(SMALL, Options(), dtype)
    assert made.admit("right")[1] <= 0.5
    assert made.admit("wrong")[1] > 1.2


def test_the_norm_of_float32_decides_nothing(monkeypatch):
    """It is off by 1e-3 for the largest models. Of many elements, some have a gradient that cancels the penalty."""
    monkeypatch.setattr(work, "PERIOD", 1_000_003)

    class Inexact(bench_adam.AdamWork):
        makers: ClassVar = {"a norm": rule_of(bench_adam.AdamWork, torch.optim.Adam, clip=1.001)}

    made = Inexact([(1000, 1000)], Options(), torch.float32)
    assert 0.01 < made.admit("a norm")[1] <= 1.0


@DTYPES
def test_wrong_averages_are_found(dtype):
    class Wrong(bench_ema.EmaWork):
        makers: ClassVar = {
            "another decay": bench_ema.function(lambda averages, params: torch._foreach_lerp_(averages, params, 0.3)),
            "nothing": bench_ema.function(lambda averages, params: None),
        }

    made = Wrong(SMALL, Options(), dtype)
    for name in made.makers:
        with torch.no_grad():
            assert made.admit(name)[1] > 1.2


@DTYPES
@pytest.mark.parametrize(
    "settings", [{"lr": 0.0}, {"weight_decay": 0.0}, {"betas": (0.5, 0.999)}, {"lr": 0.02}, {"maximize": True}]
)
def test_wrong_optimizers_are_found(settings, dtype):
    class Wrong(bench_adamw.AdamWork):
        makers: ClassVar = {
            "wrong": bench_adamw.stepping(lambda w: torch.optim.AdamW(w.params, **{**peers.SETTINGS, **settings}))
        }

    assert Wrong(SMALL, Options(), dtype).admit("wrong")[1] > 1.5


@DTYPES
@pytest.mark.parametrize("factor", [0.0, 0.8, 2.0, 1e9])
def test_wrong_clipping_is_found(factor, dtype):
    def clip(params, max_norm):
        return torch.nn.utils.clip_grad_norm_(params, factor * max_norm)

    class Wrong(bench_clip_grad_norm.ClipWork):
        makers: ClassVar = {"wrong": bench_clip_grad_norm.clipping(clip)}

    assert Wrong(SMALL, Options(), dtype).admit("wrong")[1] > 1.0


def test_every_timed_call_clips():
    made = bench_clip_grad_norm.ClipWork(SMALL, Options(), torch.bfloat16)
    provider = made.admit("trainops")[0]
    for _ in range(5):
        provider.before()
        before = [grad.clone() for grad in made.grads()]
        provider.step()
        for grad, old in zip(made.grads(), before, strict=True):
            torch.testing.assert_close(grad, work.CLIPPED * old, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (bench_step.StepWork, "torch foreach"),
        (bench_sgd.SGDWork, "torch loop"),
        (bench_low_precision.LowPrecisionWork, "composed"),
        (bench_low_precision.LowPrecisionWork, "torch float32, autocast"),
    ],
)
def test_every_timed_step_has_gradients_that_nobody_has_clipped(monkeypatch, kind, name):
    """Also where the maker says nothing of it."""
    monkeypatch.setitem(kind.makers, "composed", bench_low_precision.composed(peers.torch_adamw))
    made = kind(SMALL, Options(), torch.bfloat16)
    provider = made.admit(name)[0]
    params = made.wide.weights if "autocast" in name else made.params
    provider.step()
    assert trainops.get_total_norm([p.grad for p in params]) < 1.01 * made.max_norm
    provider.before()
    assert trainops.get_total_norm([p.grad for p in params]) > 1.3 * made.max_norm


def test_verified_providers_share_tensors():
    made = bench_step.StepWork(SMALL, Options(), torch.float32)
    right, again = (made.admit(name)[0].owned() for name in ("torch fused", "trainops"))
    assert set(right) == set(again) == {"exp_avg", "exp_avg_sq", "averages"}
    for kind, tensors in right.items():
        assert [x.data_ptr() for x in tensors] == [x.data_ptr() for x in again[kind]]


def test_low_precision_agrees_with_float64():
    made = bench_low_precision.LowPrecisionWork(SMALL, Options(), torch.bfloat16)
    kept = {"torch float32, autocast": 20, "torch, float32 masters": 24, "trainops bfloat16": 12, "trainops": 14}
    for name, count in kept.items():
        provider, error = made.admit(name)
        assert error <= 0.5, name
        assert provider.note.endswith(f" = {count} B")
    assert provider.note.startswith("weights 4 + gradients 2 + state 4")  # and a little for the step counts
    provider, error = made.admit("trainops split, 8-bit moments")
    assert 0.08 < bench_low_precision.OFF_BY_8_BITS < 0.14
    assert 0.05 < error < 0.5


def test_wrong_steps_in_low_precision_are_found(monkeypatch):
    made = bench_low_precision.LowPrecisionWork(SMALL, Options(), torch.bfloat16)
    monkeypatch.setattr(bench_low_precision, "lerp_wide", lambda averages, params: None)
    unaveraged = bench_low_precision.composed(peers.torch_adamw)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **options: None)
    unclipped = bench_low_precision.autocast
    monkeypatch.setitem(made.makers, "no average", unaveraged)
    monkeypatch.setitem(made.makers, "no clipping", unclipped)
    for name in ("no average", "no clipping"):
        assert made.admit(name)[1] > 1.2
    copied = torch._foreach_copy_
    monkeypatch.undo()
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda to, of: copied(to, of) if to[0].dtype != torch.bfloat16 else 0
    )
    assert made.admit("torch, float32 masters")[1] > 1.2  # masters that are not copied to the model


@thorough(lambda **_: True)  # the compiler takes its time
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_compiled_providers_agree_with_float64():
    options = Options(compiles=True)
    assert bench_ema.EmaWork(SMALL, options, torch.float32).admit("torch compiled")[1] <= 0.5
    assert bench_drop_path.AddBench((16, 3, 5), False, torch.float32, options).admit("timm, compiled")[1] <= 1.0


def test_what_is_not_compiled_is_found(monkeypatch):
    monkeypatch.setattr(work, "counters", {"stats": {"unique_graphs": 0}, "graph_break": {"a reason": 1}})
    with pytest.raises(RuntimeError, match=r"nothing was compiled.*a reason"):
        work.compiled_note("torch compiled")
    assert work.compiled_note("torch foreach") == ""
    monkeypatch.setitem(work.counters["stats"], "unique_graphs", 2)
    assert work.compiled_note("torch compiled") == "2 graphs, 1 break"


@DTYPES
@pytest.mark.parametrize("layer_scale", [False, True])
def test_drop_path_agrees_with_float64(layer_scale, dtype):
    bench = bench_drop_path.AddBench((8, 3, 5), layer_scale, dtype, Options())
    for name in (bench.timm, "trainops"):
        assert bench.admit(name)[1] <= 1.0
    with pytest.raises(NotHere, match="compiled"):
        bench.admit("compiled")
    bench.drop_path = lambda x, drop_prob, training: x * x.new_empty(len(x), 1, 1).bernoulli_(1 - drop_prob)
    assert bench.admit(bench.timm)[1] > 1.0  # nobody divided by the probability
    bench.drop_path = lambda x, drop_prob, training: 0 * x
    assert bench.admit(bench.timm)[1] > 1.0


@pytest.mark.parametrize("mode", ["fixed", "bernoulli"])
def test_stochastic_depth_agrees_with_float64(mode, monkeypatch):
    bench = bench_drop_path.BlockBench((8, 3, 16), 0.25, mode, torch.float32, Options())
    for name in (bench_drop_path.timm_drop_path()[0], "trainops"):
        assert bench.admit(name)[1] <= 1.0
    if mode == "fixed":
        monkeypatch.setattr(bench, "ours", lambda: trainops.stochastic_depth(bench.x, bench.branch, 0.9, True))
        with pytest.raises(RuntimeError, match="of 8 samples were kept"):
            bench.admit("trainops")


def test_training_agrees_with_float64(monkeypatch):
    net = bench_training.Net(64, 1, 9, (2, 2))
    bench = bench_training.TrainingBench(net, 2, "cpu")
    for name in bench_training.TAILS:
        assert bench.admit(name)[1] <= 1.0
    fewer = {"trainops": lambda model: bench_training.fastest(model)._replace(averages=list(model.parameters()))}
    monkeypatch.setattr(bench_training, "TAILS", fewer)
    assert bench.admit("trainops")[1] > 1.0
