"""Statistics of tensors: extremes, mean, deviation, norms, counts and exponents, in one pass over memory.

They stay on the device until somebody reads them. Those of shards, ranks and steps join: see :class:`TensorStats`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference_statistics as specification
from .adapters import check, select
from .plain import all_in_memory, all_plain
from .reference_statistics import BINS, COUNT, L1, M2, MAX, MEAN, MIN, NONFINITE, ROW, ZEROS
from .statistics_shards import over_group, over_meshes, selected
from .tables import local, summed

# The statistics of a tensor, by the names of their properties.
STATISTICS = ("min", "max", "mean", "std", "l1_norm", "l2_norm", "amax", "zeros", "nonfinite", "numel")


class TensorStats:
    """Statistics of several tensors, as 1-D tensors on their device with one number for each tensor.

    Sums, extremes and means are those of the finite elements; ``nonfinite`` counts the others. Of a tensor without
    finite elements, ``min``, ``max``, ``mean`` and ``std`` are NaN, and norms are 0. Of complex tensors, they are
    those of the real and imaginary parts. Nothing waits for the device but :meth:`to_dict`.

    Attributes:
        rows: the numbers that all others are computed from, (tensors, 8), float64 where the device has it: they join.
        histogram: how many elements have each binary exponent, (tensors, 255), int64; or None. Bin ``i`` counts
            ``2**(i - 127) <= abs(x) < 2**(i - 126)``; the first also has all smaller numbers but 0, the last all
            larger ones.
    """

    bins = BINS

    def __init__(self, rows: Tensor, histogram: Tensor | None = None) -> None:
        if rows.ndim != 2 or rows.shape[1] != len(ROW):
            raise ValueError(f"rows must have the shape (tensors, {len(ROW)}), got {tuple(rows.shape)}")
        if histogram is not None and histogram.shape != (len(rows), BINS):
            raise ValueError(f"histogram must have the shape ({len(rows)}, {BINS}), got {tuple(histogram.shape)}")
        self.rows, self.histogram = rows, histogram

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} tensors on {self.rows.device})"

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> "TensorStats":
        """The statistics of some of the tensors, by a slice or a list of indices."""
        histogram = None if self.histogram is None else self.histogram[index]
        return TensorStats(self.rows[index], histogram)

    @property
    def numel(self) -> Tensor:
        """How many elements there are, int64."""
        return (self.rows[:, COUNT] + self.rows[:, NONFINITE]).long()

    @property
    def nonfinite(self) -> Tensor:
        """How many of them are infinite or NaN, int64."""
        return self.rows[:, NONFINITE].long()

    @property
    def zeros(self) -> Tensor:
        """How many of them are 0, int64."""
        return self.rows[:, ZEROS].long()

    @property
    def min(self) -> Tensor:
        """The smallest element."""
        return self._where_some(self.rows[:, MIN])

    @property
    def max(self) -> Tensor:
        """The largest element."""
        return self._where_some(self.rows[:, MAX])

    @property
    def mean(self) -> Tensor:
        """The mean of the elements."""
        return self._where_some(self.rows[:, MEAN])

    @property
    def std(self) -> Tensor:
        """The standard deviation of the elements, ``x.std(correction=0)`` of PyTorch."""
        return (self._where_some(self.rows[:, M2]) / self.rows[:, COUNT]).sqrt()

    @property
    def l1_norm(self) -> Tensor:
        """The sum of magnitudes."""
        return self.rows[:, L1]

    @property
    def l2_norm(self) -> Tensor:
        """The root of the sum of squares."""
        return (self.rows[:, M2] + self.rows[:, COUNT] * self.rows[:, MEAN].square()).sqrt()

    @property
    def amax(self) -> Tensor:
        """The largest magnitude."""
        ends = torch.maximum(-self.rows[:, MIN], self.rows[:, MAX])
        return torch.where(self.rows[:, COUNT] > 0, ends, 0.0)

    def _where_some(self, numbers: Tensor) -> Tensor:
        return torch.where(self.rows[:, COUNT] > 0, numbers, torch.nan)

    def merge(self, *others: "TensorStats") -> "TensorStats":
        """The statistics of these and other elements of the same tensors: other shards, ranks or steps.

        Raises:
            ValueError: they are of another number of tensors, or only some have histograms.
        """
        every = (self, *others)
        if any(len(x) != len(self) for x in others):
            raise ValueError(f"statistics of {[len(x) for x in every]} tensors do not belong together")
        if any((x.histogram is None) != (self.histogram is None) for x in others):
            raise ValueError("only some of these statistics have a histogram")
        device = self.rows.device
        rows = specification.join(torch.stack([x.rows.to(device) for x in every]))
        histograms = [x.histogram.to(device) for x in every if x.histogram is not None]
        return TensorStats(rows, torch.stack(histograms).sum(0) if histograms else None)

    def divided(self, scale: Tensor) -> "TensorStats":
        """The statistics of the same elements, divided by a positive number on any device: a GradScaler's scale.

        Exponents are moved by whole bins: of a scale that is no power of 2, by the next smaller one.
        """
        scale = scale.to(self.rows.device).reshape(())
        rows = specification.scaled(self.rows, 1 / scale.to(self.rows))
        if self.histogram is None:
            return TensorStats(rows)
        shift = torch.frexp(scale.float())[1] - 1
        bins = (torch.arange(BINS, device=self.rows.device) - shift).clamp(0, BINS - 1)
        moved = torch.zeros_like(self.histogram)
        return TensorStats(rows, moved.scatter_add_(1, bins.expand_as(self.histogram), self.histogram))

    def total(self) -> "TensorStats":
        """The statistics of all tensors taken as one."""
        if len(self) == 0:
            rows = specification.nothing(self.rows.new_empty(1, len(ROW)))
        else:
            rows = specification.join(self.rows)[None]
        return TensorStats(rows, None if self.histogram is None else self.histogram.sum(0, keepdim=True))

    def over(self, group: Any = None) -> "TensorStats":
        """Merged over the ranks of a process group, each of which has other elements of the same tensors.

        ``group``: as in ``torch.distributed``; the default one if None. All its ranks must call this.
        """
        return TensorStats(*over_group(self.rows, self.histogram, group))

    def to_dict(self, names: Sequence[str] | None = None, prefix: str = "") -> dict[str, float]:
        """Plain numbers under the keys ``<prefix><statistic>/<name>``, for any logger. Waits for the device once.

        Args:
            names: one for each tensor; default: their indices.
            prefix: of all keys, such as ``"grad/"``.

        Raises:
            ValueError: there is another number of names.
        """
        names = [str(i) for i in range(len(self))] if names is None else list(names)
        if len(names) != len(self):
            raise ValueError(f"there are {len(names)} names for {len(self)} tensors")
        columns = torch.stack([getattr(self, name).to(self.rows) for name in STATISTICS]).tolist()
        found: dict[str, float] = {}
        for statistic, numbers in zip(STATISTICS, columns, strict=True):
            found |= _keyed(prefix + statistic, names, numbers)
        return found


def keyed(key: str, names: Sequence[str], numbers: Tensor) -> dict[str, float]:
    """Plain numbers under the keys ``<key>/<name>``. Waits for the device."""
    return _keyed(key, names, numbers.to(torch.float64).tolist())


def _keyed(key: str, names: Sequence[str], numbers: Sequence[float]) -> dict[str, float]:
    return {f"{key}/{name}": x for name, x in zip(names, numbers, strict=True)}


@torch.no_grad()
def tensor_stats(
    tensors: Tensor | Iterable[Tensor], histogram: bool = False, *, backend: str | None = None
) -> TensorStats:
    """Statistics of each of several tensors, in one pass over all of them.

    Equivalent to::

        [(x.min(), x.max(), x.mean(), x.std(correction=0), x.norm(1), x.norm(), x.abs().max()) for x in tensors]

    without waiting for the device. Of DTensors, this rank measures its shards, and they are merged over the ranks of
    the mesh, all of which must call this.

    Args:
        tensors: a tensor or an iterable of floating-point or complex tensors, on any devices.
        histogram: also count the elements by their binary exponents.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Returns:
        A :class:`TensorStats`, on the device of the first tensor. Against float64, means are off by at most
        ``2**-20`` of the mean magnitude, deviations by at most ``2**-20`` of deviation and mean magnitude together,
        and norms by at most ``2**-20`` of themselves; counts and extremes are exact. Squares of float64 numbers may
        overflow.

    Raises:
        TypeError: a tensor is sparse, or has integers.
        RuntimeError: the backend is not available.
    """
    check(backend)
    found = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for i, x in enumerate(found):
        if not isinstance(x, Tensor):
            raise TypeError(f"tensors[{i}] must be a tensor, got {x!r:.60}")
        if x.is_nested or x.is_meta or x.dtype.itemsize < 2:
            raise TypeError(
                f"tensors[{i}] is nested, without memory or of less than 16 bits: there are no statistics"
            )
        if x.layout is not torch.strided or not (x.is_floating_point() or x.is_complex()):
            raise TypeError(f"tensors[{i}] must be dense and of floating-point numbers, got {x.dtype}, {x.layout}")
    if not found:
        return TensorStats(torch.zeros(0, len(ROW), dtype=torch.float64), _no_histogram(histogram))
    are_plain = all_plain(found)
    own = found if are_plain else [local(summed(x)) for x in found]
    parts: dict[torch.device, list[int]] = {}
    for i, x in enumerate(own):
        parts.setdefault(x.device, []).append(i)
    measured = []
    for device, indices in parts.items():
        part = [own[i] for i in indices]
        rows, bins = select(backend, device, all_in_memory(part)).statistics(part, histogram)
        measured.append(TensorStats(rows, bins))
    stats = measured[0] if len(measured) == 1 else _in_order(measured, [i for x in parts.values() for i in x])
    return stats if are_plain else TensorStats(*over_meshes(stats.rows, stats.histogram, found))


def _no_histogram(histogram: bool) -> Tensor | None:
    return torch.zeros(0, BINS, dtype=torch.int64) if histogram else None


def _in_order(parts: list[TensorStats], indices: list[int]) -> TensorStats:
    """Statistics of parts, on the device of the first one, in the order of the tensors: part by part, ``indices``."""
    device, order = parts[0].rows.device, sorted(range(len(indices)), key=indices.__getitem__)
    rows = torch.cat([x.rows.to(device) for x in parts])
    histograms = [x.histogram.to(device) for x in parts if x.histogram is not None]
    if order != list(range(len(order))):
        rows, histograms = selected(rows, order), [selected(torch.cat(histograms), order)] if histograms else []
    return TensorStats(rows, torch.cat(histograms) if histograms else None)
