"""Statistics of tensors that lie on several ranks: each rank measures what it holds, and their rows join."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference_statistics as specification

Stats = tuple[Tensor, Tensor | None]  # rows and histograms (``trainops.reference_statistics``)


def over_group(rows: Tensor, histogram: Tensor | None, group: Any) -> Stats:
    """Joined over the ranks of a process group, all of which must call this."""
    joined = specification.join(torch.stack(_gathered(rows, group)))
    return joined, None if histogram is None else torch.stack(_gathered(histogram, group)).sum(0)


def over_meshes(rows: Tensor, histogram: Tensor | None, tensors: Sequence[Tensor]) -> Stats:
    """Joins the shards of DTensors over their meshes. Of copies, one counts."""
    by_mesh: dict[int, list[int]] = {}
    for i, x in enumerate(tensors):
        if (spec := getattr(x, "_spec", None)) is not None:
            by_mesh.setdefault(id(spec.mesh), []).append(i)
    for indices in by_mesh.values():
        part = [tensors[i] for i in indices]
        its_rows, bins = _over_mesh(selected(rows, indices), _selected(histogram, indices), part)
        if len(indices) == len(tensors):
            return its_rows, bins
        rows = rows.clone()
        histogram = None if histogram is None else histogram.clone()
        for k, i in enumerate(indices):
            rows[i] = its_rows[k]
            if histogram is not None and bins is not None:
                histogram[i] = bins[k]
    return rows, histogram


def _over_mesh(rows: Tensor, histogram: Tensor | None, tensors: Sequence[Any]) -> Stats:
    mesh = tensors[0]._spec.mesh
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    for k, x in enumerate(tensors):
        if any(p.is_replicate() and at > 0 for p, at in zip(x._spec.placements, coordinate, strict=True)):
            rows[k] = specification.nothing(rows[k])
            if histogram is not None:
                histogram[k] = 0
    for dim in range(mesh.ndim):
        rows, histogram = over_group(rows, histogram, mesh.get_group(dim))
    return rows, histogram


def selected(x: Tensor, indices: Sequence[int]) -> Tensor:
    """A copy of some rows, without uploading an index."""
    return torch.stack([x.select(0, i) for i in indices])


def _selected(x: Tensor | None, indices: Sequence[int]) -> Tensor | None:
    return None if x is None else selected(x, indices)


def _gathered(x: Tensor, group: Any) -> list[Tensor]:
    found = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(found, x.contiguous(), group=group)
    return found
