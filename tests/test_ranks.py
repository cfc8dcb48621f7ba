"""One norm over shards, copies, meshes and process groups: that of one process, and the same bits on every rank."""

import math

import pytest
import torch
from contract import same_bits
from process_groups import assert_same_on_all_ranks, distributed, forks, on_ranks
from targets import CPU_TARGETS, over_cpu_targets, thorough

import trainops

pytestmark = forks
RANKS = 4
SHAPES = {"rows": (5, 3), "both": (9, 6), "copies": (4, 3), "tp": (7, 4), "plain": (3, 5), "none": (2,)}
OPTIONS = {"lr": 0.1, "max_grad_norm": 0.5, "skip_nonfinite": True}


def whole(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


class Places:
    """Where each tensor lies: on meshes of all four ranks, on one of two of them, on no mesh."""

    def __init__(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard

        self.line = init_device_mesh("cpu", (RANKS,))
        self.grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        self.of = {
            "rows": (self.line, [Shard(0)]),  # unevenly: the last rank has none
            "both": (self.grid, [Shard(0), Shard(1)]),
            "copies": (self.grid, [Replicate(), Shard(0)]),
            "tp": (self.grid["tp"], [Shard(0)]),
            "none": (self.grid["dp"], [Replicate()]),
        }

    def put(self, tensors):
        from torch.distributed.tensor import distribute_tensor

        def place(name, x):
            return distribute_tensor(x, *self.of[name], src_data_rank=None) if name in self.of else x

        return {name: place(name, x.clone()) for name, x in tensors.items()}


def train(places, backend, grads, dtype=torch.float32, **options):
    """Steps with these gradients, of which None are left out; with places, of their shards."""
    start = whole(0, dtype)
    params = {n: torch.nn.Parameter(x) for n, x in (places.put(start) if places else start).items()}
    optimizer = trainops.AdamW(params.values(), backend=backend, **(OPTIONS | options))
    seen, written = [], getattr(params["both"], "_local_tensor", params["both"])
    for step in grads:
        step = places.put(step) if places else step
        for name, p in params.items():
            p.grad = step.get(name)
        version = written._version
        optimizer.step()
        assert written._version > version, "autograd is not told"
        seen.append((optimizer.grad_norm, optimizer.grad_norms))
    return {n: p.detach() for n, p in params.items()}, optimizer, seen


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def own(x):
    return x.to_local() if hasattr(x, "to_local") else x


def check_steps(rank, backend):
    """Several meshes and plain tensors, also some without a gradient: the numbers of one process."""
    places = Places()
    for dtype, tolerance in ((torch.float32, {}), (torch.float64, {"rtol": 1e-13, "atol": 1e-13})):
        grads = [whole(1 + i, dtype) for i in range(3)]
        del grads[0]["rows"], grads[1]["plain"]
        ours, optimizer, seen = train(places, backend, grads, dtype)
        theirs, their_optimizer, true = train(None, backend, grads, dtype)
        for (norm, norms), (true_norm, true_norms) in zip(seen, true, strict=True):
            assert norm.dtype == true_norm.dtype
            torch.testing.assert_close(norm, true_norm, **tolerance)
            torch.testing.assert_close(norms, true_norms, **tolerance)
            assert_same_on_all_ranks(norm)
        for name, x in theirs.items():
            assert not torch.equal(x, whole(0, dtype)[name]) or name == "none"
            torch.testing.assert_close(full(ours[name]), x, **tolerance)
            assert name == "plain" or type(ours[name]) is not torch.Tensor
        assert optimizer.skipped_steps == their_optimizer.skipped_steps == 0


def check_copies(rank, backend):
    """A NaN or an infinity in one copy, of any tensor, is seen by all ranks, which leave out the step."""
    places = Places()
    for name in SHAPES:
        for poison, at in ((math.nan, 2), (math.inf, 1)):
            grads = places.put(whole(1))
            if rank == at:
                own(grads[name]).view(-1)[0] = poison
            params = {n: torch.nn.Parameter(x) for n, x in places.put(whole(0)).items()}
            before = {n: own(p.detach()).clone() for n, p in params.items()}
            optimizer = trainops.AdamW(params.values(), backend=backend, **OPTIONS)
            for n, p in params.items():
                p.grad = grads[n]
            optimizer.step()
            assert optimizer.skipped_steps == 1, (name, poison)
            assert not optimizer.grad_norm.isfinite()
            assert all(same_bits(own(p.detach()), before[n]) for n, p in params.items())
            assert_same_on_all_ranks(optimizer.grad_norm.isnan())


def check_orders(rank, backend):
    """``get_total_norm`` and ``clip_grad_norm_`` of all orders; sums that are still to be taken; NaN in maxima."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    places = Places()
    tensors = whole(1, torch.float64)
    for p in (1.0, 2.0, 3.0, 0.5, 0.0, math.inf, -1.0, -math.inf):
        true = torch.nn.utils.get_total_norm(list(tensors.values()), p)
        norm = trainops.get_total_norm(places.put(tensors).values(), p, backend=backend)
        torch.testing.assert_close(norm, true, rtol=1e-13, atol=0, msg=lambda text, p=p: f"order {p}: {text}")
        assert_same_on_all_ranks(norm)
        params = {n: torch.nn.Parameter(x) for n, x in places.put(tensors).items()}
        for name, grad in places.put(tensors).items():
            params[name].grad = grad
        versions = [x.grad._version for x in params.values()]
        assert same_bits(trainops.clip_grad_norm_(params.values(), 0.01, p, backend=backend), norm)
        coefficient = min(1.0, 0.01 / (true.item() + 1e-6))
        for name, x in tensors.items():
            torch.testing.assert_close(full(params[name].grad), x * coefficient, rtol=1e-12, atol=0)
        assert all(x.grad._version > version for x, version in zip(params.values(), versions, strict=True))
    grads = places.put(whole(1))
    if rank == 2:
        grads["copies"].to_local().fill_(math.nan)
    norm = trainops.get_total_norm(grads.values(), math.inf, backend=backend)
    assert norm.isnan()
    with pytest.raises(RuntimeError, match="non-finite"):
        trainops.get_total_norm(grads.values(), math.inf, error_if_nonfinite=True, backend=backend)
    mesh = places.line
    summands = DTensor.from_local(torch.full((3,), rank + 1.0), mesh, [Partial()])
    norm = trainops.get_total_norm(
        [summands, DTensor.from_local(torch.ones(2), mesh, [Replicate()])], backend=backend
    )
    assert norm.item() == pytest.approx(math.sqrt(3 * 10.0**2 + 2))
    odd = DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)])
    assert trainops.get_total_norm(odd, backend=backend).item() == 4.0


def check_crossing_meshes(rank, backend):
    """No mesh has all ranks: all-reduces of both, and what one finds reaches the ranks of the other."""
    from torch.distributed.tensor import Shard, distribute_tensor

    grid = Places().grid
    x, y, z = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64), torch.ones(2).double()
    first, second = (distribute_tensor(t, grid[n], [Shard(0)], src_data_rank=None) for t, n in ((x, "dp"), (y, "tp")))
    for tensors in ([first, second, z], [z, second, first]):
        norm = trainops.get_total_norm(tensors, backend=backend)
        torch.testing.assert_close(norm, torch.cat([t.flatten() for t in (x, y, z)]).norm(), rtol=1e-14, atol=0)
        assert_same_on_all_ranks(norm)
    for poisoned in (first, second):
        kept = poisoned.to_local().clone()
        if rank == 3:
            poisoned.to_local().fill_(math.nan)
        assert trainops.get_total_norm([first, second], backend=backend).isnan()
        poisoned.to_local().copy_(kept)


def check_missing(rank, backend):
    """Ranks that have no gradient, or none at all, take part: nobody waits for them, and all skip alike."""
    places = Places()
    params = {n: torch.nn.Parameter(x) for n, x in places.put(whole(0)).items()}
    optimizer = trainops.AdamW(params.values(), backend=backend, **OPTIONS)
    for step in range(3):
        for name, grad in places.put(whole(1)).items():
            if rank == 3 and name == "both" and step == 2:
                grad.to_local().fill_(math.inf)
            params[name].grad = None if rank == 0 or (rank == 1 and name == "rows") else grad
        optimizer.step()
        assert_same_on_all_ranks(optimizer.grad_norm)
        assert len(optimizer.grad_norms) == sum(p.grad is not None for p in params.values())
    assert_same_on_all_ranks(optimizer.skipped_steps)
    assert optimizer.skipped_steps == 1
    assert trainops.clip_grad_norm_(params.values(), 1.0, backend=backend) == math.inf


def check_alike(rank, backend):
    """Of parameters placed alike, the all-reduce goes on while rows are collected, on each rank that can do so."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = distributed.device_mesh.init_device_mesh("cpu", (RANKS,))
    original, begun = distributed.all_reduce, []

    def counted(*args, async_op=False, **options):
        begun.append(async_op)
        return original(*args, async_op=async_op, **options)

    for placement, later in (([Shard(0)], 1), ([Replicate()], 1), ([Shard(0)], 3)):
        start, grads = whole(0), [whole(1 + i) for i in range(3)]
        params = {n: torch.nn.Parameter(distribute_tensor(x, mesh, placement)) for n, x in start.items()}
        true = {n: torch.nn.Parameter(x) for n, x in start.items()}
        ours, theirs = (trainops.AdamW(x.values(), backend=backend, **OPTIONS) for x in (params, true))
        distributed.all_reduce = counted
        for i, step in enumerate(grads):
            for n, p in params.items():
                true[n].grad, p.grad = step[n], distribute_tensor(step[n], mesh, placement, src_data_rank=None)
            if i == later:  # of two rows, which the last ranks have nothing of
                if later == 1 and placement[0].is_shard() and rank == 3:
                    params["none"].grad = None
                if placement[0].is_replicate():
                    params["both"].grad = DTensor.from_local(step["both"] / RANKS, mesh, [Partial()])
            begun.clear()
            ours.step()
            theirs.step()
            partial = i == later and placement[0].is_replicate()
            missing = i == later and rank == 3 and placement[0].is_shard()
            if i > 0 and backend == "cpu":
                assert begun == [not (partial or missing)], (i, placement, begun)
            torch.testing.assert_close(ours.grad_norm, theirs.grad_norm)
            assert_same_on_all_ranks(ours.grad_norm)
        distributed.all_reduce = original
        for n, p in params.items():
            torch.testing.assert_close(full(p.detach()), true[n].detach())


def check_stages(rank, backend):
    """Pipeline stages whose parameters are shards on a mesh of their own, or plain."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = rank // 2
    tensors = [[t * (i + 1) for t in whole(i, torch.float64).values()][: 4 - i] for i in range(2)]
    true = torch.cat([t.flatten() for s in tensors for t in s]).norm()
    grads = [distribute_tensor(t, grid["dp"], [Shard(0)], src_data_rank=None) for t in tensors[stage][:-1]] + tensors[
        stage
    ][-1:]
    group = grid.get_group("pp")
    for some in (grads, grads[:-1]):
        expected = true if some is grads else torch.cat([t.flatten() for s in tensors for t in s[:-1]]).norm()
        norm = trainops.get_total_norm(some, norm_group=group, backend=backend)
        torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
        assert_same_on_all_ranks(norm)
    # Over all ranks, a mesh counts once, and a plain tensor for each of them.
    norm = trainops.get_total_norm(grads, norm_group=distributed.group.WORLD, backend=backend)
    expected = torch.cat([t.flatten() for s in tensors for t in [*s, s[-1]]]).norm()
    torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
    plain = trainops.get_total_norm(tensors[stage], norm_group=group, backend=backend)
    torch.testing.assert_close(plain, true, rtol=1e-14, atol=0)
    poisoned = [t.clone() for t in tensors[stage]]
    if rank == 2:
        poisoned[0].fill_(math.nan)
    seen = trainops.get_total_norm(poisoned, norm_group="world", backend=backend)
    assert seen.isnan()


def check_shared_norm(rank, backend):
    """Optimizers that share a norm, one of them PyTorch's."""
    places = Places()

    def steps(put, clip):
        params = {n: torch.nn.Parameter(x) for n, x in put(whole(0)).items()}
        ours = {n: params[n] for n in ("rows", "plain", "copies")}
        others = [p for n, p in params.items() if n not in ours]
        optimizers = [trainops.AdamW(ours.values(), backend=backend, **OPTIONS), torch.optim.SGD(others, lr=0.1)]
        for name, grad in put(whole(1)).items():
            params[name].grad = grad
        clip(list(params.values()), others, *optimizers)
        return {n: full(p.detach()) for n, p in params.items()}

    def ours(params, others, adamw, sgd):
        norm = trainops.get_total_norm([p.grad for p in params], backend=backend)
        assert_same_on_all_ranks(norm)
        adamw.step(total_norm=norm)
        assert same_bits(adamw.grad_norm, norm)
        assert adamw.grad_norms is None
        trainops.clip_grads_with_norm_(others, 0.5, norm, backend=backend)
        sgd.step()

    def theirs(params, others, adamw, sgd):
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        adamw.max_grad_norm = None
        adamw.step()
        sgd.step()

    expected = steps(lambda tensors: tensors, theirs)
    for name, x in steps(places.put, ours).items():
        torch.testing.assert_close(x, expected[name])


CHECKS = [
    check_steps,
    check_copies,
    check_orders,
    check_crossing_meshes,
    check_missing,
    check_alike,
    check_stages,
    check_shared_norm,
]


def check_all(rank, backend):
    for check in CHECKS:
        torch.manual_seed(0)
        check(rank, backend)


@thorough(lambda target: target.backend != "cpu" and "cpu" in {x.backend for x in CPU_TARGETS})
@over_cpu_targets
def test_one_norm_over_four_ranks(target, tmp_path):
    on_ranks(RANKS, tmp_path, check_all, target.backend)
