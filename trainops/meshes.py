"""The meshes that DTensors lie on, as the ranks that a norm is taken over, and what these send each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .norm_order import NormOrder
from .plain import PLAIN


@dataclass
class Mesh:
    """The ranks of a mesh, the groups to reduce over one after the other, and tensors with their weights."""

    ranks: tuple[int, ...]
    groups: list[Any]
    weights: dict[int, float]  # by row: 1 / copies

    def message(self, order: NormOrder, powers: Tensor, weights: float | Tensor, total: Tensor | None) -> Tensor:
        """What a rank sends: its part of each tensor's power, and of a ``total`` of others that all ranks know."""
        own = powers if isinstance(weights, float) and weights == 1.0 else order.share(powers, weights)
        if total is None:  # of orders whose joining begins at 0
            return torch.nn.functional.pad(own, (0, 1))
        return torch.cat([own, order.share(total, 1 / len(self.ranks)).reshape(1)])

    def over(self, order: NormOrder, powers: Tensor) -> Tensor:
        """All-reduced over its ranks."""
        for group in self.groups:
            powers = order.over(group, powers)
        return powers


def meshes_of(tensors: Sequence[Tensor]) -> list[Mesh]:
    """The meshes that DTensors lie on, in an order that is the same on all ranks.

    One whose ranks lie within those of another one joins that: its tensors count as copies on the ranks of the other.
    """
    found: dict[tuple[int, ...], Mesh] = {}
    known: dict[tuple[int, ...], tuple[Mesh, float]] = {}
    last: Any = None
    for row, x in enumerate(tensors):
        if type(x) in PLAIN or (spec := getattr(x, "_spec", None)) is None:
            continue
        mesh, placements = spec.mesh, spec.placements
        if last is None or (spec is not last and (mesh is not last.mesh or placements != last.placements)):
            last, key = spec, (id(mesh), *map(id, placements))
            if key not in known:
                new = _ranks_of(mesh)
                copies = math.prod(mesh.size(i) for i, p in enumerate(placements) if p.is_replicate())
                known[key] = found.setdefault(new.ranks, new), 1 / copies
            its, weight = known[key]
        its.weights[row] = weight
    kept: list[Mesh] = []
    for mesh in sorted(found.values(), key=lambda mesh: -len(mesh.ranks)):  # else as they come, which ranks agree on
        around = next((x for x in kept if set(mesh.ranks) < set(x.ranks)), None)
        if around is None:
            kept.append(mesh)
        else:
            copies = len(around.ranks) / len(mesh.ranks)
            around.weights |= {row: weight / copies for row, weight in mesh.weights.items()}
    return kept


def _ranks_of(mesh: Any) -> Mesh:
    """One group for all dimensions of a mesh, if there can be one."""
    if mesh.ndim == 1:
        groups = [mesh.get_group()]
    elif mesh.size() == torch.distributed.get_world_size():
        groups = [torch.distributed.group.WORLD]
    else:
        try:
            groups = [mesh._flatten().get_group()]  # made once
        except (AttributeError, RuntimeError, ValueError):  # a mesh without names, or PyTorch does otherwise
            groups = [mesh.get_group(i) for i in range(mesh.ndim)]
    its = groups[0] if len(groups) == 1 else None
    ranks = mesh.mesh.flatten().tolist() if its is None else torch.distributed.get_process_group_ranks(its)
    return Mesh(tuple(sorted(ranks)), groups, {})


def received(order: NormOrder, message: Tensor) -> tuple[Tensor, Tensor]:
    """Of a mesh's message that was reduced: the power of all, and of each tensor."""
    powers = message[:-1]
    return order.join(order.total(powers), message[-1]), powers
