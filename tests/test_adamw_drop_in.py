"""Everything that a caller may do with an optimizer: torch's checkpoints, groups, hooks, copies, CUDA graphs."""

import copy
import math
import pickle

import pytest
import torch
from contract import same_bits
from targets import over_gpu_kernels
from training import OPTIONS, check_one_step, make_grads, make_model, run, set_grads, snapshot, twins

import trainops


def assert_same_params(ours, torchs, **tolerances):
    for p, q in zip(ours.params, torchs.params, strict=True):
        torch.testing.assert_close(p, q, **tolerances)


def test_is_a_torch_adamw():
    optimizer = trainops.AdamW([torch.nn.Parameter(torch.ones(2))])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0].keys() == torch.optim.AdamW([torch.ones(2)]).param_groups[0].keys()


class SkipsOurs(trainops.AdamW):
    def __init__(self, params, **options):
        torch.optim.AdamW.__init__(self, params, **options)


class SkipsAll(trainops.AdamW):
    def __init__(self, params, **options):
        defaults = torch.optim.AdamW([torch.zeros(1)], **options).defaults
        torch.optim.Optimizer.__init__(self, params, defaults)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("cls", [SkipsOurs, SkipsAll])
def test_a_subclass_may_call_another_constructor_than_ours(cls, fused):
    params, expected = ([torch.nn.Parameter(torch.arange(1.0, n)) for n in (3, 5)] for _ in range(2))
    optimizer, torchs = cls(params, lr=0.1, fused=fused), torch.optim.AdamW(expected, lr=0.1, fused=fused)
    optimizer = copy.deepcopy(optimizer)
    params = optimizer.param_groups[0]["params"]
    for _ in range(3):
        for p in (*params, *expected):
            p.grad = p.detach().clone()
        optimizer.step()
        torchs.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q)
    assert optimizer.grad_norm is optimizer.ema is None
    assert optimizer.skipped_steps == 0
    assert "max_grad_norm: None" in repr(optimizer)
    optimizer.max_grad_norm, optimizer.skip_nonfinite = 1.0, True
    params[0].grad.fill_(math.nan)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(map(torch.equal, params, before))
    assert optimizer.skipped_steps == 1


def test_repr_is_torchs_with_what_is_added():
    model = make_model([(2,)], torch.float32, "cpu")
    optimizer = trainops.AdamW(model.parameters(), max_grad_norm=1.0, ema=trainops.EMA(model, 0.99))
    assert repr(optimizer) == repr(torch.optim.AdamW(model.parameters()))[:-1] + (
        "max_grad_norm: 1.0\nskip_nonfinite: False\nspike_guard: None\nnorm_group: None\n"
        "ema: EMA(Model, decay=0.99, warmup=False, update_after_step=0, update_every=1, step=0)\n"
        "master: None\nstate_dtype: None\nstochastic_rounding: False\nseed: None\n"
        "stats: None\nstats_every: 1\nbackend: None\n)"
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_state_dicts_go_both_ways_mid_run(target, dtype, options):
    """Torch, then trainops, then torch again. Each 16-bit step of ours is held to the contract, the rest to torch."""
    shapes = [(33, 31), (127,), ()]
    options = {"lr": 0.05} | options
    model, torchs = twins(shapes, dtype, target.device)
    grads = make_grads(shapes, dtype, target.device, 9)
    straight = torch.optim.AdamW(torchs.parameters(), **options)
    legs = [
        torch.optim.AdamW(model.parameters(), **options),
        trainops.AdamW(model.parameters(), backend=target.backend, **options),
        torch.optim.AdamW(model.parameters(), **options),
    ]
    for i, optimizer in enumerate(legs):
        if i > 0:
            optimizer.load_state_dict(legs[i - 1].state_dict())
            for p in model.params:
                assert all(same_bits(x, legs[i - 1].state[p][name]) for name, x in optimizer.state[p].items())
        for step_grads in grads[3 * i : 3 * i + 3]:
            set_grads(model.params, step_grads)
            check_one_step(optimizer) if i == 1 and dtype.itemsize == 2 else optimizer.step()
    run(straight, torchs.params, grads)
    if dtype.itemsize > 2:
        eps = torch.finfo(dtype).eps
        assert_same_params(model, torchs, rtol=9 * eps, atol=9 * eps)
    assert legs[2].state_dict()["state"][0]["step"] == 9
    assert legs[1].state_dict()["state"][0].keys() == straight.state_dict()["state"][0].keys()


@pytest.mark.parametrize("step", [torch.zeros(2), "3", None], ids=repr)
@pytest.mark.parametrize("has_ema", [False, True])
def test_a_step_count_that_is_none_is_not_loaded(step, has_ema):
    model = make_model(((3,),), torch.float32, "cpu")
    ema = trainops.EMA(model) if has_ema else None
    optimizer = trainops.AdamW(model.parameters(), ema=ema)
    run(optimizer, model.params, make_grads(((3,),), torch.float32, "cpu", 1))
    bad = copy.deepcopy(optimizer.state_dict())
    run(optimizer, model.params, make_grads(((3,),), torch.float32, "cpu", 1))
    bad["state"][0]["step"] = step
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="step must be a number"):
        optimizer.load_state_dict(bad)
    assert str(optimizer.state_dict()) == str(before)


def test_loaded_state_keeps_the_dtype_that_the_optimizer_has_it_in(target):
    """Torch makes bfloat16 of float32 moments, once they are loaded for a bfloat16 parameter."""
    p = torch.nn.Parameter(torch.randn(33, device=target.device).bfloat16())
    p.grad = torch.randn_like(p)
    optimizer = trainops.AdamW([p], amsgrad=True, backend=target.backend)
    optimizer.step()
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    wide = {name: torch.rand(33, device=target.device) for name in names}
    optimizer.state[p] |= {name: x.clone() for name, x in wide.items()}
    checkpoint = optimizer.state_dict()
    optimizer.load_state_dict(checkpoint)
    assert all(same_bits(optimizer.state[p][name], x) for name, x in wide.items())
    assert all(optimizer.state[p][name] is not checkpoint["state"][0][name] for name in names)
    optimizer.step()
    fresh = trainops.AdamW([p], amsgrad=True, backend=target.backend)
    fresh.load_state_dict(checkpoint)
    assert {fresh.state[p][name].dtype for name in names} == {torch.bfloat16}  # as in torch


def test_groups_schedulers_and_late_groups(target):
    shapes = [(33, 31), (127,), (5,)]
    ours, torchs = twins(shapes, torch.float32, target.device)
    grads = make_grads(shapes, torch.float32, target.device, 12)

    def prepare(make, model, **options):
        first, second, third = model.params
        optimizer = make([{"params": [first], "lr": 3e-3, "weight_decay": 0.2}, {"params": [second]}], **options)
        optimizer.add_param_group({"params": [third], "betas": (0.5, 0.6), "amsgrad": True, "maximize": True})
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, 2e-2, 3e-2], total_steps=13)

    for model, make, options in (
        (ours, trainops.AdamW, {"backend": target.backend}),
        (torchs, torch.optim.AdamW, {}),
    ):
        optimizer, scheduler = prepare(make, model, **options)
        run(optimizer, model.params, grads, after=scheduler.step)
    assert_same_params(ours, torchs)


def test_parameters_without_gradients_are_left_alone(target):
    model = make_model([(3,), (4,)], torch.float32, target.device)
    optimizer = trainops.AdamW(model.parameters(), max_grad_norm=1.0, backend=target.backend)
    before = model.params[1].detach().clone()
    model.params[0].grad = torch.ones(3, device=target.device)
    optimizer.step()
    assert same_bits(model.params[1].detach(), before)
    assert model.params[1] not in optimizer.state
    assert optimizer.grad_norms.shape == (1,)
    model.params[1].grad = torch.ones(4, device=target.device)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in model.params] == [2, 1]


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}, {}])
def test_no_gradients_at_all(target, options):
    params = [torch.nn.Parameter(torch.ones(2, device=target.device))]
    optimizer = trainops.AdamW(params, backend=target.backend, **options)
    optimizer.step()
    assert not optimizer.state
    assert torch.equal(params[0], torch.ones_like(params[0]))
    if not options:
        assert optimizer.grad_norm is None
        return
    torchs = torch.nn.utils.clip_grad_norm_(params, 1.0).to(target.device)
    assert same_bits(optimizer.grad_norm, torchs)
    assert same_bits(optimizer.grad_norms, torch.zeros(0, device=target.device))


def test_a_grad_scaler_steps_without_gradients(target):
    """It then sets found_inf to a number, the sum of no tensors."""
    model = make_model([(2,)], torch.float32, target.device)
    optimizer = trainops.AdamW(model.parameters(), max_grad_norm=1.0, backend=target.backend)
    scaler = torch.amp.GradScaler(target.device, init_scale=4.0)
    scaler.scale(torch.ones((), device=target.device))
    before = model.params[0].detach().clone()
    scaler.step(optimizer)
    assert same_bits(model.params[0].detach(), before)
    assert (optimizer.skipped_steps, optimizer.grad_norm) == (0, 0)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_step_without_gradients_is_skipped_as_any_other(target, found_inf):
    model = make_model([(2,)], torch.float32, target.device)
    ema = trainops.EMA(model, 0.0, backend=target.backend)
    optimizer = trainops.AdamW(model.parameters(), ema=ema, backend=target.backend)
    with torch.no_grad():
        model.params[0].add_(1.0)
    before = ema.module.params[0].clone()
    optimizer.found_inf = torch.full((1,), found_inf, device=target.device)
    optimizer.step()
    assert optimizer.skipped_steps == found_inf
    assert same_bits(ema.module.params[0].detach(), before if found_inf else model.params[0].detach())


def test_tensor_hyperparameters(target):
    ours, torchs = twins([(33, 31)], torch.float32, target.device)
    grads = make_grads([(33, 31)], torch.float32, target.device, 5)
    lr = torch.tensor(1e-2)
    betas = (torch.tensor(0.8), torch.tensor([0.95]))
    run(trainops.AdamW(ours.parameters(), lr=lr, betas=betas, backend=target.backend), ours.params, grads)
    run(torch.optim.AdamW(torchs.parameters(), lr=1e-2, betas=(0.8, 0.95)), torchs.params, grads)
    assert_same_params(ours, torchs)


def test_closure_hooks_and_their_number(target):
    model = make_model([(3,)], torch.float32, target.device)
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # hooks torch's own step, which must not run ours twice
    optimizer = trainops.AdamW(model.parameters(), backend=target.backend)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = (model.params[0] ** 2).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert calls == ["pre", "post"] * 2


def test_differentiable_runs_torchs_step():
    calls = []
    param = torch.nn.Parameter(torch.ones(3))
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    optimizer = trainops.AdamW([param.clone()], lr=0.1, differentiable=True)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    updated = optimizer.param_groups[0]["params"][0]
    updated.sum().backward()
    assert param.grad is not None
    assert calls == ["pre"]


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_go_on_alike(target, copy_of):
    shapes = [(33, 31), (7,)]
    model = make_model(shapes, torch.float32, target.device)
    ema = trainops.EMA(model, 0.9, backend=target.backend)
    optimizer = trainops.AdamW(
        model.parameters(), max_grad_norm=0.1, skip_nonfinite=True, ema=ema, backend=target.backend
    )
    grads = make_grads(shapes, torch.float32, target.device, 4)
    run(optimizer, model.params, grads[:2])
    copied = copy_of(optimizer)
    assert copied._step_supports_amp_scaling
    before = snapshot(model, optimizer, ema)
    for each in (optimizer, copied):
        run(each, each.param_groups[0]["params"], grads[2:])
    assert not any(map(same_bits, snapshot(model, optimizer, ema), before))
    assert all(map(same_bits, optimizer.param_groups[0]["params"], copied.param_groups[0]["params"]))
    assert all(map(same_bits, optimizer.ema.module.params, copied.ema.module.params))
    assert same_bits(optimizer.grad_norm, copied.grad_norm)
    assert copied.ema.step == 4


def test_autograd_notices_the_update(target):
    model = make_model([(3,)], torch.float32, target.device)
    loss = (model.params[0] ** 2).sum()
    model.params[0].grad = torch.ones(3, device=target.device)
    trainops.AdamW(model.parameters(), backend=target.backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_replaced_parameters_are_followed(target):
    """Frameworks replace the parameters of an optimizer, and what parameters hold, after it was made."""
    model = make_model([(3,), (4,)], torch.float32, target.device)
    optimizer = trainops.AdamW(model.parameters(), backend=target.backend)
    run(optimizer, model.params, make_grads([(3,), (4,)], torch.float32, target.device, 1))
    model.params[0].data = model.params[0].data.clone()
    new = torch.nn.Parameter(torch.ones(5, device=target.device))
    optimizer.param_groups[0]["params"] = [model.params[0], new]
    before = [p.detach().clone() for p in (*model.params, new)]
    run(optimizer, [model.params[0], new], make_grads([(3,), (5,)], torch.float32, target.device, 1))
    changed = [not same_bits(p.detach(), q) for p, q in zip((*model.params, new), before, strict=True)]
    assert changed == [True, False, True]


@pytest.mark.parametrize("shapes", [[(5,)], [(70001,)], [(5,)] * 300, [(200_003,), (5,), (100_000,)]])
def test_same_bits_with_any_number_of_threads(shapes):
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            torch.manual_seed(0)
            model = make_model(shapes, torch.float32, "cpu")
            before = [p.detach().clone() for p in model.params]
            optimizer = trainops.AdamW(model.parameters(), max_grad_norm=0.1)
            run(optimizer, model.params, make_grads(shapes, torch.float32, "cpu", 3))
            assert not any(map(same_bits, model.params, before))
            results.append([*model.params, optimizer.grad_norm, optimizer.grad_norms])
    finally:
        torch.set_num_threads(threads)
    assert all(map(same_bits, results[0], results[1]))
    assert all(map(same_bits, results[0], results[2]))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "learning rate: -1.0"),
        ({"eps": -1.0}, "epsilon value: -1.0"),
        ({"weight_decay": -1.0}, "weight_decay value: -1.0"),
        ({"betas": (1.0, 0.9)}, "beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, "beta parameter at index 1: -0.1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: -1.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm: nan"),
        ({"backend": "gpu"}, "unknown backend 'gpu'.*reference, foreach, cpu"),
        ({"differentiable": True, "max_grad_norm": 1.0}, "differentiable"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        trainops.AdamW([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    ("bad", "error"), [(-1, ValueError), (float("nan"), ValueError), ("1", TypeError), (True, TypeError)]
)
def test_a_bad_max_grad_norm_is_refused_whenever_it_is_set(bad, error):
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=f"max_grad_norm.*{bad}"):
        trainops.AdamW([param], max_grad_norm=bad)
    optimizer = trainops.AdamW([param], max_grad_norm=1.0)
    with pytest.raises(error, match=f"max_grad_norm.*{bad}"):
        optimizer.max_grad_norm = bad
    assert optimizer.max_grad_norm == 1.0


def test_max_grad_norm_may_be_changed(target):
    param = torch.nn.Parameter(torch.ones(2, device=target.device))
    optimizer = trainops.AdamW([param], weight_decay=0.0, backend=target.backend)
    assert optimizer.max_grad_norm is None
    optimizer.max_grad_norm = 0
    param.grad = torch.ones(2, device=target.device)
    optimizer.step()
    assert torch.equal(param, torch.ones_like(param))
    assert copy.deepcopy(optimizer).max_grad_norm == 0
    optimizer.max_grad_norm = 1.0
    optimizer.step()
    assert (param < 1.0).all()


def test_weight_decay_is_decoupled_in_every_group():
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    coupled = {"params": [second], "decoupled_weight_decay": False}
    with pytest.raises(ValueError, match="decoupled_weight_decay=False is Adam"):
        trainops.AdamW([{"params": [first]}, coupled])
    optimizer = trainops.AdamW([first])
    with pytest.raises(ValueError, match="decoupled_weight_decay=False is Adam"):
        optimizer.add_param_group(coupled)
    assert len(optimizer.param_groups) == 1
    optimizer.load_state_dict(torch.optim.Adam([first]).state_dict())  # torch's AdamW decouples what it loads
    assert optimizer.param_groups[0]["decoupled_weight_decay"]


def test_sparse_gradients_raise_and_change_nothing(target):
    dense, sparse = (torch.nn.Parameter(torch.ones(3, 2, device=target.device)) for _ in range(2))
    optimizer = trainops.AdamW([dense, sparse], backend=target.backend)
    dense.grad = torch.ones(3, 2, device=target.device)
    sparse.grad = torch.ones(3, 2, device=target.device).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(dense, torch.ones_like(dense))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state["exp_avg"].resize_(7), r"exp_avg has shape \(7,\).*\(3, 2\)"),
        (lambda state: state.pop("exp_avg_sq"), r"\(3, 2\) has no exp_avg_sq"),
        (lambda state: state.pop("step"), r"\(3, 2\) has no step"),
    ],
)
def test_checkpoints_that_do_not_fit_change_nothing(damage, message):
    def fresh():
        model = make_model([(4,), (3, 2)], torch.float32, "cpu")
        optimizer = trainops.AdamW(model.parameters())
        run(optimizer, model.params, make_grads([(4,), (3, 2)], torch.float32, "cpu", 1))
        return optimizer

    optimizer, damaged = fresh(), fresh().state_dict()
    damage(damaged["state"][1])
    damaged["param_groups"][0]["lr"] = 123.0
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(damaged)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i in (0, 1):
        assert all(same_bits(after["state"][i][name], before["state"][i][name]) for name in before["state"][i])


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_empty_groups(target, empty):
    ours, torchs = twins([(3,), (4,)], torch.float32, target.device)
    grads = make_grads([(3,), (4,)], torch.float32, target.device, 2)
    options = {"backend": target.backend}
    for model, make, chosen in ((ours, trainops.AdamW, options), (torchs, torch.optim.AdamW, {})):
        groups = [{"params": [p]} for p in model.params]
        groups.insert(empty, {"params": []})
        run(make(groups, **chosen), model.params, grads)
    assert_same_params(ours, torchs)


def test_another_default_device_is_no_matter():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = trainops.AdamW([param], max_grad_norm=1.0, skip_nonfinite=True)
    param.grad = torch.ones(3)
    with torch.device("meta"):
        optimizer.step()
        norm = trainops.clip_grad_norm_([param], 0.5)
    assert norm.device.type == "cpu"
    assert optimizer.grad_norm.device.type == "cpu"


def test_differentiable_leaves_scaling_to_the_scaler():
    param = torch.ones(3)
    optimizer = trainops.AdamW([param], lr=0.1, differentiable=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    param.grad = torch.full((3,), 4.0)
    scaler.step(optimizer)
    assert torch.equal(param.grad, torch.ones(3))


# CUDA graphs


@over_gpu_kernels
def test_a_captured_step_is_the_step(target):
    for graphs in (1, 2):
        check_capture(target, graphs)


def check_capture(target, graphs):
    """Clip, AdamW and EMA with a learning rate on the device, replayed with other gradients, some of them skipped."""
    shapes = [(33, 31), (127,), (), (70001,)]
    model, twin = twins(shapes, torch.float32, target.device)
    lr = torch.tensor(1e-2, device=target.device)
    makers = []
    for net in (model, twin):
        ema = trainops.EMA(net, 0.5, update_after_step=-2, backend=target.backend)
        options = {"lr": lr, "capturable": True, "max_grad_norm": 0.5, "skip_nonfinite": True}
        makers.append((net, ema, trainops.AdamW(net.parameters(), ema=ema, backend=target.backend, **options)))
    (model, ema, optimizer), (twin, twin_ema, twin_optimizer) = makers
    grads = make_grads(shapes, torch.float32, target.device, 8)
    grads[5][1][3] = float("nan")
    buffers = [torch.zeros_like(p) for p in model.params]
    stream = torch.cuda.Stream()

    def run_both(step_grads, step):
        for buffer, p, grad in zip(buffers, twin.params, step_grads, strict=True):
            buffer.copy_(grad)
            p.grad = grad
        step()
        twin_optimizer.step()

    for p, buffer in zip(model.params, buffers, strict=True):
        p.grad = buffer
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_both(grads[0], optimizer.step)
        run_both(grads[1], optimizer.step)
    torch.cuda.current_stream().wait_stream(stream)
    for first in range(2, 8, 6 // graphs):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            optimizer.step()
        for step_grads in grads[first : first + 6 // graphs]:
            lr.mul_(0.9)
            run_both(step_grads, graph.replay)
    ours, theirs = snapshot(model, optimizer, ema), snapshot(twin, twin_optimizer, twin_ema)
    assert all(map(same_bits, ours, theirs))
    assert optimizer.skipped_steps == twin_optimizer.skipped_steps == 1
    assert same_bits(optimizer.grad_norms, twin_optimizer.grad_norms)


def test_an_average_is_checked_whenever_it_is_set():
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = trainops.AdamW(model.parameters())
    for wrong in (True, torch.optim.swa_utils.AveragedModel(model)):
        with pytest.raises(TypeError, match=r"ema must be a trainops\.EMA"):
            optimizer.ema = wrong
    with pytest.raises(ValueError, match="none of these parameters"):
        optimizer.ema = trainops.EMA(other)
    assert optimizer.ema is None
    optimizer.ema = ema = trainops.EMA(model)
    assert optimizer.ema is ema


@pytest.mark.parametrize("name", ["max_grad_norm", "skip_nonfinite", "norm_group", "ema", "backend"])
def test_a_group_has_none_of_the_optimizers_settings(name):
    params = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=f"{name} is a setting of the optimizer"):
        trainops.AdamW([{"params": params, name: "another value than the constructor's"}])
