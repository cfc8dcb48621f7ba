"""What compiled code does with us: it calls a step and an update, by one graph break, and traces the clipping."""

import math

import pytest
import torch
from targets import over
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import trainops

STEPS = torch._dynamo.config.recompile_limit + 2
X = torch.linspace(-1.0, 1.0, 3)

# The ends of a step that stand in compiled code: they change an optimizer or an average that follows a model.
ENDS = {
    "step": lambda model: End(trainops.AdamW(model.parameters())),
    "clipping": lambda model: End(trainops.AdamW(model.parameters(), max_grad_norm=0.5, skip_nonfinite=True)),
    "average": lambda model: End(trainops.AdamW(model.parameters(), max_grad_norm=0.5, ema=average_of(model))),
    "scheduler": lambda model: Scheduled(trainops.AdamW(model.parameters(), max_grad_norm=0.5)),
    "update": lambda model: Update(average_of(model)),
}


class End:
    """A step of an optimizer; its numbers change after it."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __call__(self):
        self.optimizer.step()
        return self.optimizer.grad_norm

    def change(self):
        group = self.optimizer.param_groups[0]
        group["lr"], group["weight_decay"] = group["lr"] * 0.9, group["weight_decay"] * 1.1
        if self.optimizer.ema is not None:
            self.optimizer.ema.decay *= 0.9

    def averages(self):
        return [] if self.optimizer.ema is None else list(self.optimizer.ema.module.parameters())


class Scheduled(End):
    """The same under a scheduler, which wraps the method ``step``."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def change(self):
        self.scheduler.step()


class Update:
    """An update of an average by itself."""

    def __init__(self, ema):
        self.ema = ema

    def __call__(self):
        self.ema.update()

    def change(self):
        self.ema.decay *= 0.9
        for p in self.ema.model.parameters():
            p.data.add_(1.0)

    def averages(self):
        return list(self.ema.module.parameters())


def average_of(model):
    return trainops.EMA(model, 0.9, warmup=True, update_every=2)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    counters.clear()


def train(make_end, compiler):
    """Some steps of a function that has operations before and after the end of a step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    end, outputs = make_end(model), []

    def function(x):
        y = x * 2
        norm = end()
        return y + model.weight.sum(), norm

    function = compiler(function)
    for i in range(STEPS):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1 * i)
        outputs.append(function(X))
        end.change()
    return [x for output in outputs for x in output if x is not None] + [*model.parameters(), *end.averages()]


@over("make_end", ENDS)
def test_one_graph_break_and_no_recompilation(make_end):
    graphs = CompileCounterWithBackend("eager")
    got = train(make_end, lambda function: torch.compile(function, backend=graphs))
    expected = train(make_end, lambda function: function)
    assert graphs.frame_count == 2  # before and after
    assert sum(counters["graph_break"].values()) == 1
    assert not counters["recompiles"]
    assert len(got) == len(expected)
    assert all(map(torch.equal, got, expected))


def test_a_method_may_be_compiled_by_itself():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = trainops.AdamW([p])
    step = torch.compile(optimizer.step, backend="eager")
    step(), step()
    assert optimizer.state[p]["step"] == 2


class Overrides(trainops.AdamW):
    def step(self, closure=None):
        return super().step(closure)


def test_step_hooks_run_once():
    p, calls = nn.Parameter(torch.ones(3)), []
    p.grad = torch.ones(3)
    optimizer = trainops.AdamW([p])
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert calls == ["before", "after"] * 2


def test_a_class_that_overrides_step_is_called_as_well():
    graphs = CompileCounterWithBackend("eager")
    optimizers = []

    def make_end(model):
        optimizers.append(Overrides(model.parameters()))
        return End(optimizers[-1])

    train(make_end, lambda function: torch.compile(function, backend=graphs))
    assert graphs.frame_count == 2
    assert all(state["step"] == STEPS for state in optimizers[0].state.values())


def clip_all(utils, params):
    """The norm from which the gradients were clipped, by a function that takes it."""
    norm = utils.get_total_norm([p.grad for p in params])
    utils.clip_grads_with_norm_(params, 0.5, norm)
    return norm


CLIPS = {
    "norm": lambda utils, params: utils.clip_grad_norm_(params, 0.5),
    "norm of a generator": lambda utils, params: utils.clip_grad_norm_((p for p in params), 0.5),
    "norm of one": lambda utils, params: utils.clip_grad_norm_(params[0], 0.5),
    "inf_norm": lambda utils, params: utils.clip_grad_norm_(params, 0.5, math.inf),
    "third_norm": lambda utils, params: utils.clip_grad_norm_(params, 0.5, 3),
    "total_norm": lambda utils, params: utils.get_total_norm([p.grad for p in params], 1),
    "with_norm": clip_all,
    "value": lambda utils, params: utils.clip_grad_value_(params, 0.5),
}


def params_with_grads(dtype=torch.float32):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in [(3,), (), (4, 5), (20000,)]]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def compiled_clip(clip, utils, params):
    graphs = CompileCounterWithBackend("aot_eager")
    norm = torch.compile(lambda: clip(utils, params), backend=graphs, fullgraph=True)()
    assert graphs.frame_count == 1
    return [x for x in (norm, *[p.grad for p in params]) if x is not None]


@over("clip", CLIPS)
def test_clipping_traces_as_torchs(clip):
    ours, torchs = params_with_grads(), params_with_grads()
    got = compiled_clip(clip, trainops, ours)
    torch.compiler.reset()
    expected = compiled_clip(clip, torch.nn.utils, torchs)
    assert len(got) == len(expected)
    assert all(map(torch.equal, got, expected))


@over("clip", CLIPS)
def test_compiled_clipping_of_16_bits_is_that_of_eager_mode(clip):
    ours, eager = params_with_grads(torch.bfloat16), params_with_grads(torch.bfloat16)
    got = compiled_clip(clip, trainops, ours)
    norm = clip(trainops, eager)
    if norm is not None:
        assert got[0].dtype == norm.dtype == torch.float32
        torch.testing.assert_close(got.pop(0), norm, rtol=1e-5, atol=0)
    for x, p in zip(got, eager, strict=True):
        torch.testing.assert_close(x, p.grad, rtol=2**-7, atol=0)
    torch.testing.assert_close(
        torch.cat([x.flatten() for x in got]).float().mean(), mean_grad(eager), rtol=1e-3, atol=0
    )


def mean_grad(params):
    return torch.cat([p.grad.flatten() for p in params]).float().mean()


def test_compiled_clipping_raises_as_torchs():
    for utils in (torch.nn.utils, trainops):
        torch.compiler.reset()
        params = params_with_grads()
        params[0].grad[0] = math.inf
        before = [p.grad.clone() for p in params]
        clip = torch.compile(lambda u=utils, p=params: u.clip_grad_norm_(p, 0.5, 2.0, True), backend="eager")
        with pytest.raises(RuntimeError, match=r"The total norm of order 2.0 .* is non-finite"):
            clip()
        assert all(torch.equal(p.grad, x) for p, x in zip(params, before, strict=True))


AVERAGES = {
    "function": lambda averages, tensors: trainops.ema_update_(averages, tensors, 0.75),
    "AveragedModel": lambda averages, tensors: trainops.get_ema_multi_avg_fn(0.75)(averages, tensors, None),
}


@over("update", AVERAGES)
def test_averaging_tensors_traces(update):
    graphs = CompileCounterWithBackend("aot_eager")
    tensors, averages = [torch.full((3,), 4.0), torch.tensor(8.0)], [torch.zeros(3), torch.tensor(0.0)]
    torch.compile(update, backend=graphs, fullgraph=True)(averages, tensors)
    assert graphs.frame_count == 1
    assert averages[0].tolist() == [1.0] * 3
    assert averages[1].item() == 2.0
