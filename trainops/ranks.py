"""Norms of tensors that lie on several ranks: shards of DTensors, stages of a pipeline, what ZeRO gives each rank.

Each rank measures what it holds (kernels, float64). Then ranks add up the powers of these norms. A shard counts once.
Copies count once together: each gives its power divided by their number, so that all ranks see a NaN in any of them.
One all-reduce serves all tensors whose ranks lie among those of one mesh. Its numbers are the same on all its ranks,
and differ from those of one process by the order of sums alone.

    norm = (sum over meshes, ranks and tensors of norm_of_shard^p / copies)^(1/p)
"""

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import core, reference
from .adapters import select
from .meshes import Mesh, meshes_of, received
from .norm_order import NormOrder, norms_by
from .plain import PLAIN, all_in_memory
from .tables import local
from .uploads import uploaded

NormGroup = Any  # a torch.distributed.ProcessGroup, or the name of one


def is_spread(tensors: Iterable[Tensor], norm_group: NormGroup) -> bool:
    """Whether a norm of these takes other ranks."""
    return norm_group is not None or any(map(is_sharded, tensors))


def is_sharded(x: Tensor) -> bool:
    """Whether it is a DTensor."""
    return type(x) not in PLAIN and hasattr(x, "_spec")


def group_name(norm_group: NormGroup) -> str | None:
    """What a process group is found by later: optimizers that hold the group itself could not be copied or pickled.

    Raises:
        TypeError: it is no process group, and no name.
        ValueError: this rank is not among its ranks.
    """
    if norm_group is None or isinstance(norm_group, str):
        return norm_group
    if torch.distributed.is_available():
        if norm_group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this rank is not in norm_group")
        if isinstance(norm_group, torch.distributed.ProcessGroup):
            return str(norm_group.group_name)
    raise TypeError(f"norm_group must be a process group, its name, or None, got {norm_group!r:.60}")


def group_named(name: str) -> Any:
    """The process group of a name; ``"world"`` is the default one.

    Raises:
        RuntimeError: there is none.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError(f"norm_group is {name!r}, but torch.distributed has not been initialized")
    if name == "world":
        return torch.distributed.group.WORLD
    try:
        found: Any = torch.distributed.distributed_c10d
        return found._resolve_process_group(name)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"there is no process group of the name {name!r}, which is norm_group") from error


class OverRanks(NamedTuple):
    """A norm, and the norm of each tensor, in the dtype of scalars, and the dtype in which they are returned."""

    total_norm: Tensor
    norms: Tensor
    dtype: torch.dtype


def norms_over_ranks(
    measured: Sequence[Tensor | None],
    placed: Sequence[Tensor],
    norm_type: float,
    norm_group: NormGroup,
    backend: str | None,
) -> OverRanks:
    """The norm of all tensors on all ranks, and of each, on the first tensor's device.

    ``measured``: this rank's tensors, or None for one that it has no gradient of, while others may. ``placed``:
    tensors that are placed as these are. All ranks of a mesh have the same number of DTensors.

    Other than DTensors, tensors count as copies of each other on the ranks of the meshes. With a ``norm_group`` they
    count as each rank's own, and so do DTensors whose meshes have a single rank in it. The norm of each is that over
    its mesh.
    """
    device = next((x.device for x in measured if x is not None), placed[0].device if placed else torch.device("cpu"))
    own = [torch.empty(0, device=p.device) if x is None else local(x) for x, p in zip(measured, placed, strict=True)]
    order = NormOrder(norm_type)
    powers = order.powers(own_norms(own, norm_type, backend, device), own)
    total, powers = _joined(order, powers, meshes_of(placed), norm_group)
    return OverRanks(order.norm(total), order.norm(powers), _result_dtype(own))


@dataclass
class ComingNorm:
    """The norm of gradients whose all-reduce has begun: see ``begin_norm``."""

    order: NormOrder
    message: Tensor
    work: Any
    dtype: torch.dtype

    def finish(self) -> OverRanks:
        """Wait for the other ranks; as of ``norms_over_ranks``."""
        self.work.wait()
        total, powers = received(self.order, self.message)
        return OverRanks(self.order.norm(total), self.order.norm(powers), self.dtype)


def begin_norm(param_groups: Sequence[dict[str, Any]], backend: str | None) -> ComingNorm | None:
    """Begin what ``norms_over_ranks`` does of all parameters' gradients, of order 2, so that it goes on meanwhile.

    None where not all are placed alike, or where a gradient is not there, or is placed otherwise.
    The message is the same as there: ranks may decide differently.
    """
    if (found := core.shards_of_gradients(param_groups)) is None:
        return None
    own, is_double = found
    first: Tensor = next(p for group in param_groups for p in group["params"])
    (mesh,), order = meshes_of([first]), NormOrder(2.0)
    device = own[0].device
    if len(mesh.groups) != 1 or not order.reaches(mesh.groups[0], device):
        return None
    powers = order.powers(norms_by(select(backend, device), own, order.p, unrounded=True)[1], own)
    message = mesh.message(order, powers, mesh.weights[0], None)
    work = torch.distributed.all_reduce(message, group=mesh.groups[0], async_op=True)
    return ComingNorm(order, message, work, torch.float64 if is_double else torch.float32)


def _result_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    is_double = not {torch.float64, torch.complex128}.isdisjoint(x.dtype for x in tensors)
    return torch.float64 if is_double else torch.float32


def own_norms(tensors: Sequence[Tensor], norm_type: float, backend: str | None, device: torch.device) -> Tensor:
    """The norm of each tensor of this rank, unrounded, on ``device``."""
    devices = dict.fromkeys(x.device for x in tensors)
    each: dict[int, Tensor] = {}
    for of_part in devices:
        rows = range(len(tensors)) if len(devices) == 1 else [i for i, x in enumerate(tensors) if x.device == of_part]
        part = tensors if len(devices) == 1 else [tensors[row] for row in rows]
        norms = norms_by(select(backend, of_part, all_in_memory(part)), part, norm_type, unrounded=True)[1].to(device)
        if len(devices) == 1:
            return norms
        each |= {row: norms.select(0, i) for i, row in enumerate(rows)}
    if not each:
        return torch.zeros(0, dtype=reference.scalar_dtype(device), device=device)
    return torch.stack([each[row] for row in range(len(tensors))])  # an index would have to be uploaded


def _joined(order: NormOrder, powers: Tensor, meshes: list[Mesh], norm_group: NormGroup) -> tuple[Tensor, Tensor]:
    """The power of all, and of each over its mesh."""
    group = None if norm_group is None else group_named(group_name(norm_group) or "")
    members = () if group is None else torch.distributed.get_process_group_ranks(group)
    # The number of ranks of the group that a mesh gives the same total.
    alike = math.prod(max(1, len(set(mesh.ranks).intersection(members))) for mesh in meshes)
    rest = set(range(len(powers))).difference(*(mesh.weights for mesh in meshes))
    total = order.total(_picked(powers, sorted(rest)))
    total = order.share(total, alike)  # one of the copies on each mesh, unless each of these ranks has its own
    for mesh in meshes:  # each carries the total of those before it, of which its ranks have copies
        rows = sorted(mesh.weights)
        weights = _weights([mesh.weights[row] for row in rows], powers)
        sent = mesh.message(order, _picked(powers, rows), weights, total)
        total, its = received(order, mesh.over(order, sent))
        powers = its if len(rows) == len(powers) else powers.index_copy(0, _rows(rows, powers), its)
    for mesh in reversed(meshes[:-1]):  # which do not know yet what the later ones found
        total = mesh.over(order, order.share(total, 1 / len(mesh.ranks)).reshape(1))[0]
    if group is not None:
        total = order.over(group, order.share(total, 1 / alike).reshape(1))[0]
    return total, powers


def _picked(powers: Tensor, rows: list[int]) -> Tensor:
    return powers if len(rows) == len(powers) else powers.index_select(0, _rows(rows, powers))


def _rows(rows: list[int], like: Tensor) -> Tensor:
    return _on_device(rows, "q", torch.int64, like.device)


def _weights(weights: list[float], like: Tensor) -> float | Tensor:
    return weights[0] if len(set(weights)) == 1 else _on_device(weights, "d", torch.float64, like.device).to(like)


def _on_device(numbers: Sequence[float], code: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor, without waiting for the device."""
    if device.type != "cuda" or not numbers:
        return torch.tensor(numbers, dtype=dtype, device=device)
    return uploaded(struct.pack(f"{len(numbers)}{code}", *numbers), device).view(dtype)
