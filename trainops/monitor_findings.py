"""What looks wrong in a training, by name and step."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from statistics import median
from typing import NamedTuple

from .monitor_record import Record

EARLIER = 3  # records that tell what is usual

# In the order in which those of one step are told.
KINDS = ("nonfinite", "exploding_weights", "exploding", "vanishing", "still", "dead", "saturated")


class Finding(NamedTuple):
    """Something that looks wrong.

    Attributes:
        kind: one of ``KINDS``.
        name: of the parameter, the layer or the module.
        step: where it was first seen.
        seen: in how many of the records.
        message: what was seen there, in words.
    """

    kind: str
    name: str
    step: int
    seen: int
    message: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.name}: {self.message}"


class _Layer(NamedTuple):
    name: str
    gradient: float  # norms over all of its parameters
    weight: float
    update: float
    rms: float  # of the gradient's elements
    finite: bool  # whether all elements of the gradient are; norms are those of the others
    rests: bool  # its learning rate is 0, or its update is not finite: nobody knows its norm


def findings_of(
    records: Sequence[Record],
    *,
    exploding: float = 100.0,
    growth: float = 30.0,
    vanishing: float = 1e-4,
    still: float = 1e-8,
    share: float = 0.5,
) -> list[Finding]:
    """What looks wrong in these records; each kind once for each name.

    Args:
        records: of a :class:`trainops.Monitor`.
        exploding: a layer's gradient explodes if its norm is more than so many times the norm of the layer's weights.
        growth: a layer's gradient explodes, and so do its weights, if their norm is more than so many times
            that of the median of the earlier records, of which there have to be three.
        vanishing: it vanishes if the root mean square of its elements is less than so many times that of the median
            layer, of those that do not explode; or if it is 0.
        still: a layer does not move if its update's norm is less than so many times that of its weights, although it
            has a gradient and a learning rate, and the step was not skipped. (In bfloat16, rounding may lose every
            update.)
        share: units are dead, and outputs saturated, if more than this share of them are, from 0 to 1.

    Raises:
        ValueError: a limit is negative or NaN, or ``share`` is more than 1.
    """
    limits = {"exploding": exploding, "growth": growth, "vanishing": vanishing, "still": still, "share": share}
    for name, limit in limits.items():
        if not 0.0 <= limit <= (1.0 if name == "share" else math.inf):
            raise ValueError(f"{name} must be at least 0{', at most 1' if name == 'share' else ''}, got {limit}")
    found: dict[tuple[str, str], Finding] = {}
    history = _History(growth)
    for record in records:
        layers = list(_layers(record))
        every = chain(
            _of_tensors(record),
            _of_layers(
                layers, history.grown(layers), exploding, vanishing, 0.0 if _is_skipped(record, layers) else still
            ),
            _of_activations(record, share),
        )
        for kind, name, message in every:
            before = found.get((kind, name))
            found[kind, name] = (
                Finding(kind, name, record.step, 1, message)
                if before is None
                else before._replace(seen=before.seen + 1)
            )
    return sorted(found.values(), key=lambda x: (x.step, KINDS.index(x.kind)))


class _History:
    """The norms of layers in earlier records, of those that had not grown."""

    def __init__(self, growth: float) -> None:
        self.growth = growth
        self.norms: dict[tuple[str, str], list[float]] = {}

    def grown(self, layers: list[_Layer]) -> dict[tuple[str, str], str]:
        """What is to be said of the layers that have grown, by kind and name."""
        said = {}
        for layer in layers:
            for kind, what, norm in (
                ("exploding_weights", "weights explode", layer.weight),
                ("exploding", "gradient explodes", layer.gradient),
            ):
                before = self.norms.setdefault((kind, layer.name), [])
                usual = median(before) if len(before) >= EARLIER else 0.0
                if norm > self.growth * usual > 0.0:
                    said[kind, layer.name] = f"the {what}: from a norm of {usual:.1e} to {norm:.1e}"
                elif math.isfinite(norm):
                    before.append(norm)
        return said


def _of_tensors(record: Record) -> Iterator[tuple[str, str, str]]:
    for what, stats in (("gradient", record.grads), ("weight", record.weights), ("update", record.updates)):
        for name, count, total in zip(record.names, stats.nonfinite.tolist(), stats.numel.tolist(), strict=True):
            if count:
                yield "nonfinite", name, f"{count} of {total} elements of the {what} are infinite or NaN"


def _of_layers(
    layers: list[_Layer], grown: dict[tuple[str, str], str], exploding: float, vanishing: float, still: float
) -> Iterator[tuple[str, str, str]]:
    others = []
    for (kind, name), message in grown.items():
        yield kind, name, message
    for x in layers:
        if ("exploding", x.name) in grown or not x.finite:
            continue
        if x.gradient > exploding * x.weight > 0.0:
            yield (
                "exploding",
                x.name,
                f"the gradient explodes: its norm is {x.gradient:.1e}, the weights' {x.weight:.1e}",
            )
        else:
            others.append(x)
    usual = median(x.rms for x in others) if others else 0.0
    for x in others:
        if x.rms < vanishing * usual:
            yield (
                "vanishing",
                x.name,
                f"the gradient vanishes: {x.rms:.1e} (rms), where the median layer has {usual:.1e}",
            )
        elif x.gradient == 0.0:
            yield "vanishing", x.name, "the gradient is 0"
        elif x.update < still * x.weight and not x.rests:
            yield "still", x.name, f"it does not move: an update of norm {x.update:.1e}, weights of {x.weight:.1e}"


def _is_skipped(record: Record, layers: list[_Layer]) -> bool:
    """Whether the step was skipped; of an optimizer that counts no steps, whether it looks so."""
    if record.skipped is not None:
        return bool(record.skipped)
    return not all(x.finite for x in layers) and not any(x.update for x in layers)


def _layers(record: Record) -> Iterator[_Layer]:
    """The layers that have a gradient on some rank, each with the norms over its parameters."""
    gradients, weights, updates = map(record.norms_by_layer, (record.grads, record.weights, record.updates))
    counts = (record.grads.numel, record.grads.nonfinite, record.updates.nonfinite)
    numel, bad, moved_badly = map(record.sums_by_layer, counts)
    rows = record.by_layer()
    resting = {id(lr): float(lr) == 0.0 for lr in {id(x): x for x in record.lrs}.values() if lr is not None}
    for name, gradient in gradients.items():
        if numel[name] + bad[name] == 0:
            continue
        rms = gradient / math.sqrt(max(numel[name], 1))
        has_no_lr = bool(record.lrs) and all(resting.get(id(record.lrs[i]), False) for i in rows[name])
        rests = has_no_lr or moved_badly[name] > 0
        yield _Layer(name, gradient, weights[name], updates[name], rms, bad[name] == 0, rests)


def _of_activations(record: Record, share: float) -> Iterator[tuple[str, str, str]]:
    if (watched := record.activations) is None:
        return
    outputs = watched.outputs
    columns = (outputs.nonfinite, outputs.numel, watched.dead, watched.saturated)
    for name, bad, total, dead, saturated in zip(watched.names, *(x.tolist() for x in columns), strict=True):
        if bad:
            yield "nonfinite", name, f"{bad} of {total} outputs are infinite or NaN"
        if dead > share:
            yield "dead", name, f"{100 * dead:.0f}% of the units are dead: 0 for every input"
        if saturated > share:
            yield "saturated", name, f"{100 * saturated:.0f}% of the outputs are saturated"
