"""Pictures and tables of what a monitor has seen."""

import math
from collections.abc import Callable, Sequence

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from rich.table import Table
from torch import Tensor

from .monitor_record import Record
from .statistics import TensorStats

LEAST_EXPONENT = -127  # of the first bin of a histogram
TAIL = 20.0  # percent of a layer's elements: its smallest ones, which share the first column of a picture


def table(record: Record) -> Table:
    """A line for each layer."""
    shown = Table(title=f"step {record.step}: norms, and elements of the gradient")
    shown.add_column("layer", no_wrap=True)
    for column in ("gradient", "weight", "update/weight", "zeros", "NaN, inf"):
        shown.add_column(column, justify="right")
    grads = record.grads
    gradients, weights, updates = map(record.norms_by_layer, (grads, record.weights, record.updates))
    zeros, numel, bad = map(record.sums_by_layer, (grads.zeros, grads.numel, grads.nonfinite))
    for layer, gradient in gradients.items():
        shown.add_row(
            layer,
            f"{gradient:.2e}",
            f"{weights[layer]:.2e}",
            f"{updates[layer] / weights[layer]:.1e}" if weights[layer] else "-",
            f"{100 * zeros[layer] / max(numel[layer], 1):.0f}%",
            str(bad[layer] or ""),
        )
    return shown


def norms(records: Sequence[Record]) -> Figure:
    """Log-norms of gradients, and of updates over weights: layer against step."""
    layers = list(dict.fromkeys(layer for record in records for layer in record.by_layer()))
    of_grads = _matrix(records, layers, lambda record: record.grads)
    ratios = _matrix(records, layers, lambda record: record.updates) / _matrix(
        records, layers, lambda record: record.weights
    )
    figure = Figure(figsize=(11.0, 1.6 + 0.2 * len(layers)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for place, (values, title) in enumerate(
        ((of_grads, "norm of the gradient"), (ratios, "norm of the update / norm of the weights"))
    ):
        image = _image(axes[place], values.log10(), [str(record.step) for record in records], layers, "viridis")
        axes[place].set_title(title, fontsize=10)
        axes[place].set_xlabel("step")
        figure.colorbar(image, ax=axes[place], label="log10")
    return figure


def distributions(record: Record) -> Figure:
    """The shares of each layer's elements by magnitude: gradients, weights, updates."""
    layers = record.by_layer()
    parts = {"gradients": record.grads, "weights": record.weights, "updates": record.updates}
    figure = Figure(figsize=(12.0, 1.8 + 0.2 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(parts), sharey=True)
    for place, (title, stats) in enumerate(parts.items()):
        if stats.histogram is None:
            raise RuntimeError("this record has no histograms: those of the last one are kept alone")
        counts = torch.stack([stats.histogram[rows].sum(0) for rows in layers.values()]).double().cpu()
        shares = 100.0 * counts / counts.sum(1, keepdim=True).clamp(min=1)
        first, last = _shown(shares)
        shares[:, first] += shares[:, :first].sum(1)  # what is smaller is shown with the first ones
        shares = shares[:, first : last + 1]
        shares[shares == 0] = torch.nan
        labels = [f"$2^{{{LEAST_EXPONENT + i}}}$" for i in range(first, last + 1)]
        labels[0] = f"\u2264{labels[0]}" if first else labels[0]
        image = _image(axes[place], shares, labels, list(layers), "Blues")  # few are pale
        axes[place].set_title(title, fontsize=10)
        axes[place].set_xlabel("magnitude")
        figure.colorbar(image, ax=axes[place], label="% of the elements")
    figure.suptitle(f"step {record.step}", fontsize=11)
    return figure


def _shown(shares: Tensor) -> tuple[int, int]:
    """The first bin, below which no layer has much, and the last one that has anything."""
    seen = shares.sum(0).nonzero().flatten().tolist() or [0]
    below = shares.cumsum(1).amax(0)
    visible = (below >= TAIL).nonzero().flatten().tolist() or seen
    return visible[0], seen[-1]


def _matrix(records: Sequence[Record], layers: list[str], stats_of: Callable[[Record], TensorStats]) -> Tensor:
    """A norm for each layer (rows) and record (columns); NaN where a layer had no gradient."""
    found = torch.full((len(layers), len(records)), torch.nan, dtype=torch.float64)
    places = {layer: i for i, layer in enumerate(layers)}
    for column, record in enumerate(records):
        for layer, norm in record.norms_by_layer(stats_of(record)).items():
            found[places[layer], column] = norm
    return found


def _image(axes: Axes, values: Tensor, columns: list[str], rows: list[str], colours: str) -> AxesImage:
    """Colours, with at most eight labels below. White is where there is no number."""
    values = torch.where(values.isfinite(), values, torch.nan)
    colormap = matplotlib.colormaps[colours].with_extremes(bad="white")
    image = axes.imshow(values.numpy(), aspect="auto", cmap=colormap, interpolation="nearest")
    step = max(1, math.ceil(len(columns) / 8))
    axes.set_xticks(range(0, len(columns), step), columns[::step], fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    return image
