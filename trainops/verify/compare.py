"""The tensors of a check, and how results are held to the specification."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import Kernels, _triton, select

# A chunk has at most 8192 elements, CUDA's 4096. The interpreter, which is slow, goes without the last shape.
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (127,), (33, 31), (2, 3, 5, 7), (8193,), (70_001,))


class Place(NamedTuple):
    """Where an op runs, and on numbers of which type."""

    backend: str
    device: torch.device
    dtype: torch.dtype

    @property
    def kernels(self) -> Kernels:
        """The ops of the backend."""
        return select(self.backend, self.device)

    def of(self, shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        """Those that there is time for."""
        return shapes[:-1] if self.backend == "triton" and _triton.interpreted() else shapes


class Compared(NamedTuple):
    """A result, and what it should be: within ``allowed`` of it, element by element, or to the bit."""

    what: str
    got: Tensor
    exact: Tensor
    allowed: Tensor | None


def randn(place: Place, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Random numbers that every machine draws alike."""
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(place.dtype).to(place.device)


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same numbers, lying in memory in different ways."""
    yield "contiguous", x
    yield "unaligned", torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)
    if x.ndim == 4:
        yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    if x.ndim == 2:
        yield "transposed", x.T.contiguous().T


def tensors(place: Place, generator: torch.Generator) -> dict[str, Tensor]:
    """Tensors of all shapes and layouts, by name."""
    shapes = place.of(SHAPES)
    return {f"{shape} {layout}": x for shape in shapes for layout, x in layouts(randn(place, generator, shape))}


def double(x: Tensor) -> Tensor:
    """A copy in float64 on the CPU."""
    return x.detach().cpu().to(torch.float64, copy=True).contiguous()


def rounded(what: str, got: Tensor, exact: Tensor, terms: Tensor | None = None) -> Compared:
    """A result that is rounded to its type; ``terms``: the magnitudes that it is summed from."""
    largest = (exact if terms is None else terms).abs().nan_to_num(posinf=0.0).max() if exact.numel() else 0.0
    arithmetic = 2.0**-53 if got.dtype == torch.float64 else 2.0**-24
    info = torch.finfo(got.dtype)
    allowed = exact.abs() * info.eps / 2 + info.smallest_normal * info.eps + 8 * arithmetic * largest
    return Compared(what, got, exact, allowed)


def coded(what: str, got: Tensor, exact: Tensor) -> Compared:
    """Values of 8-bit state, each one of the two next to the exact one: up to an eighth off, or by the smallest."""
    largest = exact.abs().max() if exact.numel() else 0.0
    return Compared(what, got, exact, exact.abs() / 8 + largest * 2.0**-14)


def problem_with(compared: Compared) -> tuple[float, str]:
    """The largest error in units of what is allowed, and in words if that is more than 1."""
    what, got, exact, allowed = compared
    if got.shape != exact.shape:
        return float("inf"), f"{what}: the shape is {tuple(got.shape)}, not {tuple(exact.shape)}"
    if got.numel() == 0:
        return 0.0, ""
    found = double(got)
    error = (found - exact.double()).abs()
    same = (found == exact) | (found.isnan() & exact.isnan())
    ratio = torch.where(same, 0.0, error / (0.0 if allowed is None else allowed)).nan_to_num(nan=float("inf"))
    i = int(ratio.reshape(-1).argmax())
    worst = ratio.reshape(-1)[i].item()
    if worst <= 1.0:
        return worst, ""
    values = f"{found.reshape(-1)[i].item():.9g} instead of {exact.reshape(-1)[i].item():.9g}"
    return worst, f"{what}: element {i} is {values} ({int((ratio > 1).sum())} of {got.numel()} are off)"
