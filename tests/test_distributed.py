"""AdamW on the shards of DTensors, over two processes: the weights and the norm of the unsharded step."""

import pytest
import torch
import torch.multiprocessing as mp
from targets import TARGETS

import trainops

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

RANKS = 2
STEPS = 3


def full_grads():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 3, generator=generator) for _ in range(STEPS)]


def train(param, grads, **options):
    optimizer = trainops.AdamW([param], lr=0.1, **options)
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return param.detach(), optimizer


def on_each_rank(rank, path, backend):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    options = {"max_grad_norm": 0.5, "skip_nonfinite": True, "backend": backend}
    true, true_optimizer = train(torch.nn.Parameter(torch.ones(5, 3)), full_grads(), **options)

    shares = {  # how the gradient is spread, and each rank's part of it; the parameter's own placement
        "sharded": (Shard(0), lambda grad: distribute_tensor(grad, mesh, [Shard(0)])),
        "partial": (Replicate(), lambda grad: DTensor.from_local(grad / RANKS, mesh, [Partial()])),
        "other dim": (Shard(0), lambda grad: distribute_tensor(grad, mesh, [Shard(1)])),
    }
    for name, (placement, spread) in shares.items():
        param = torch.nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [placement]))
        result, optimizer = train(param, [spread(grad) for grad in full_grads()], **options)
        torch.testing.assert_close(result.full_tensor(), true, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(optimizer.grad_norm, true_optimizer.grad_norm)
        exp_avg = optimizer.state[param]["exp_avg"].full_tensor()
        torch.testing.assert_close(exp_avg, next(iter(true_optimizer.state.values()))["exp_avg"])
    distributed.destroy_process_group()


@pytest.mark.parametrize("target", [x for x in TARGETS if x.device == "cpu"], indirect=True, ids="-".join)
def test_shards_give_the_unsharded_step(target, tmp_path):
    mp.spawn(on_each_rank, args=(tmp_path / "store", target.backend), nprocs=RANKS)
