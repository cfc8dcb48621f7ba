"""AdamW over two processes: on the shards of DTensors, and on gradients that are views of DDP's buckets."""

import torch
from contract import same_bits
from operations import Operations
from process_groups import forks, on_ranks
from targets import over_cpu_targets
from torch import nn

import trainops

RANKS = 2
STEPS = 3


def full_grads():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 3, generator=generator) for _ in range(STEPS)]


def train(param, grads, **options):
    ema = trainops.EMA([param], 0.5, backend=options["backend"])
    optimizer = trainops.AdamW([param], lr=0.1, ema=ema, **options)
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return param.detach(), optimizer


def on_each_rank(rank, backend):
    check_shards(backend)
    check_bucket_views(rank, backend, torch.float32, set_to_none=False)
    check_bucket_views(rank, backend, torch.bfloat16, set_to_none=True)


def check_shards(backend):
    """The weights, the norm and the average are those of the unsharded step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    options = {"max_grad_norm": 0.5, "skip_nonfinite": True, "backend": backend}
    true, true_optimizer = train(torch.nn.Parameter(torch.ones(5, 3)), full_grads(), **options)
    true_average = true_optimizer.ema.module[0]
    assert ((true - 1).abs() > 0.01).all()
    assert ((true - true_average).abs() > 0.01).any()

    shares = {  # how the gradient is spread, and each rank's part of it; the parameter's own placement
        "sharded": (Shard(0), lambda grad: distribute_tensor(grad, mesh, [Shard(0)])),
        "partial": (Replicate(), lambda grad: DTensor.from_local(grad / RANKS, mesh, [Partial()])),
        "other dim": (Shard(0), lambda grad: distribute_tensor(grad, mesh, [Shard(1)])),
    }
    for name, (placement, spread) in shares.items():
        param = torch.nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [placement]))
        result, optimizer = train(param, [spread(grad) for grad in full_grads()], **options)
        seen_param = torch.nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [placement]))
        with Operations() as seen:
            seen_result, seen_optimizer = train(seen_param, [spread(grad) for grad in full_grads()], **options)
        assert "lerp" in seen.names
        torch.testing.assert_close(seen_result.full_tensor(), true)
        torch.testing.assert_close(result.full_tensor(), true, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(optimizer.grad_norm, true_optimizer.grad_norm)
        exp_avg = optimizer.state[param]["exp_avg"].full_tensor()
        torch.testing.assert_close(exp_avg, next(iter(true_optimizer.state.values()))["exp_avg"])
        for its in (optimizer, seen_optimizer):
            torch.testing.assert_close(its.ema.module[0].full_tensor(), true_average.detach())


def check_bucket_views(rank, backend, dtype, set_to_none):
    """Gradients that lie in DDP's buckets, at whatever address, make the steps of gradients of their own."""
    of_views, views = train_ddp(rank, backend, dtype, set_to_none, gradient_as_bucket_view=True)
    of_own, own = train_ddp(rank, backend, dtype, set_to_none, gradient_as_bucket_view=False)
    assert all(x.data_ptr() % 16 == 0 for x in own)
    assert any(x.data_ptr() % 16 != 0 for x in views), "no gradient is at an odd address"
    what = f"{dtype}, set_to_none={set_to_none}"
    assert len(of_views) == len(of_own), what
    assert all(map(same_bits, of_views, of_own)), what


def train_ddp(rank, backend, dtype, set_to_none, gradient_as_bucket_view):
    """All tensors of the training, and the gradients."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 67), nn.Tanh(), nn.Linear(67, 35)).to(dtype)
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=gradient_as_bucket_view)
    ema = trainops.EMA(model, 0.9, backend=backend)
    optimizer = trainops.AdamW(ddp.parameters(), lr=0.1, max_grad_norm=0.5, ema=ema, backend=backend)
    trained = [*model.parameters(), *ema.module.parameters()]
    before = [x.detach().clone() for x in trained]
    results = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(RANKS * step + rank)
        optimizer.zero_grad(set_to_none)
        ddp(torch.randn(11, 3, generator=generator).to(dtype)).square().sum().backward()
        optimizer.step()
        results.append(optimizer.grad_norm)
    assert not any(map(same_bits, trained, before))
    results += [x.detach() for x in trained]
    results += [x for state in optimizer.state.values() for x in state.values()]
    return results, [param.grad for param in model.parameters()]


@forks
@over_cpu_targets
def test_shards_and_views_of_buckets(target, tmp_path):
    on_ranks(RANKS, tmp_path, on_each_rank, target.backend)
