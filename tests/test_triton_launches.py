"""What the Triton backend launches, and what must not disturb it."""

import pytest
import torch
from contract import same_bits
from torch import distributed
from training import Model
from triton_fixtures import BFLOAT16, FLOAT32, FLOAT64, NUMEL, WHOLE, adamw, assert_same, everything, model_of

import trainops
from trainops.adapters import triton

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("count", [1, 2, 20])
def test_a_whole_step_is_three_launches(device, launches, count):
    model = model_of([(i % 3,) for i in range(count)], device)
    ema = trainops.EMA(model, 0.9, backend="triton")
    optimizer = adamw(model, **WHOLE, ema=ema)
    for _ in range(2):
        optimizer.step()
    assert launches == ["partial_results", "plan", "update"] * 2
    assert (ema.step, optimizer.skipped_steps) == (2, 0)


@pytest.mark.parametrize("options", [{}, {"found_inf": 0.0}, {"grad_scale": 2.0}, {"ema": True}])
def test_without_a_norm_a_step_is_two_launches(device, launches, options):
    model = model_of([(3,), (0,), (5,)], device)
    optimizer = adamw(model, ema=trainops.EMA(model, backend="triton") if "ema" in options else None)
    for name in options.keys() - {"ema"}:
        setattr(optimizer, name, torch.tensor(options[name], device=device))
    for _ in range(2):
        optimizer.step()
    assert launches == ["plan", "update"] * 2


def test_each_further_combination_of_types_is_two_launches_more(device, launches):
    kinds = [FLOAT32, BFLOAT16, FLOAT32, FLOAT64, BFLOAT16, FLOAT32]
    model = model_of([((3,), kind) for kind in kinds], device)
    optimizer = adamw(model, **WHOLE)
    optimizer.step()
    assert launches == ["partial_results"] * 3 + ["plan"] + ["update"] * 3
    launches.clear()
    state = optimizer.state[model.params[1]]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].float(), state["exp_avg_sq"].float()
    optimizer.step()
    assert launches == ["partial_results"] * 4 + ["plan"] + ["update"] * 4


def test_groups_are_no_launches_of_their_own(device, launches):
    model = model_of([(3,)] * 4, device)
    groups = [{"params": [p], "lr": 0.1 * i, "eps": 10.0**-i} for i, p in enumerate(model.params, start=1)]
    trainops.AdamW(groups, backend="triton").step()
    assert launches == ["plan", "update"]


def test_launches_of_other_functions(device, launches):
    model = model_of([(3,), (0,), (NUMEL,)], device)
    params = list(model.params)
    trainops.clip_grad_norm_(params, 0.5, backend="triton")
    trainops.clip_grad_value_(params, 0.5, backend="triton")
    trainops.ema_update_([p.detach().clone() for p in params], params, 0.5, backend="triton")
    assert launches == ["partial_results", "finish_rows", "transform", "transform", "ema"]


# What is around it


@pytest.mark.skipif(triton._device_type() != "cpu", reason="one process with gloo, on the CPU")
@pytest.mark.skipif(not distributed.is_available(), reason="PyTorch is built without torch.distributed")
def test_dtensors_are_updated_where_they_lie(device):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = model_of([(5, 3)], device)
        sharded = Model([distribute_tensor(plain.params[0].detach().clone(), mesh, [Shard(0)])])
        sharded.params[0].grad = distribute_tensor(plain.params[0].grad.clone(), mesh, [Shard(0)])
        for model in (plain, sharded):
            optimizer = adamw(model)
            for _ in range(2):
                optimizer.step()
        assert same_bits(sharded.params[0].detach().to_local(), plain.params[0].detach())
    finally:
        distributed.destroy_process_group()


def test_another_default_device_is_no_matter(device):
    model = model_of([(5,), (3,)], device)
    optimizer = adamw(model, **WHOLE, ema=trainops.EMA(model, 0.9, backend="triton"))
    with torch.device("meta"):
        optimizer.step()
        norm = trainops.clip_grad_norm_(model.params, 0.5, backend="triton")
    assert norm.device == optimizer.grad_norm.device == optimizer.skipped_steps.device == model.params[0].device
    assert norm.item() > 0


def test_inference_mode_makes_nothing_that_training_cannot_use(device):
    model = model_of([(5,)], device)
    with torch.inference_mode():
        triton.reduce("l2_norm", [p.detach() for p in model.params])
        triton.clamp_([torch.ones(3, device=device)], 0.5)
    optimizer = adamw(model, **WHOLE)
    optimizer.step()
    trainops.clip_grad_value_(model.params, 0.5, backend="triton")
    assert optimizer.grad_norm.isfinite()


def test_a_gradient_that_becomes_sparse_raises_and_changes_nothing(device):
    model = model_of([(3, 2), (3, 2)], device)
    optimizer = adamw(model)
    optimizer.step()
    before = everything(optimizer)
    model.params[1].grad = torch.ones(3, 2, device=device).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert_same(everything(optimizer), before)


def test_lists_without_elements(device):
    empty = [torch.nn.Parameter(torch.ones(0, 3, device=device)) for _ in range(2)]
    for p in empty:
        p.grad = torch.ones(0, 3, device=device)
    optimizer = trainops.AdamW(empty, **WHOLE, backend="triton")
    optimizer.step()
    optimizer.step()
    assert optimizer.grad_norm == 0
    assert optimizer.grad_norms.tolist() == [0, 0]
    assert [state["step"].item() for state in optimizer.state.values()] == [2, 2]
    assert trainops.clip_grad_norm_(empty, 1.0, backend="triton") == 0
    assert trainops.clip_grad_norm_([], 1.0, backend="triton") == 0
    trainops.clip_grad_value_([], 1.0, backend="triton")
    trainops.ema_update_([], [], 0.5, backend="triton")
    triton.ema_([], [], 0.5)
