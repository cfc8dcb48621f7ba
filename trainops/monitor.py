"""Watch a model train: statistics of gradients, weights, updates and activations, now and then, by name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, which imports no compiler until it is called

from .advice import advise
from .ema_policy import Patterns, checked_patterns, fits
from .monitor_activations import Activations
from .monitor_findings import Finding, findings_of
from .monitor_record import Record, Watched, layer_of
from .step_stats import Measured, is_measured
from .tables import local
from .wrappers import innermost, unwrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


class Monitor:
    """Statistics of a model while an optimizer trains it: of the first step, and of every so many after it.

    Of gradients (before clipping in the step, without a GradScaler's scale), weights and updates, by the names of
    ``model.named_parameters()``; of the outputs of chosen modules, by their names, over all batches of the step. They
    stay on the device: nothing waits for it until you read something. Steps in between cost a count. A step that is
    looked at copies the weights, in float32.

    Works with any optimizer of PyTorch, with accumulation, under DDP, FSDP2 (statistics are those of all shards, so
    that every rank has to have a monitor) and ``torch.compile`` (activations need a hook, which the compiled code
    calls by a graph break). A step that a GradScaler skips is no step, but with ``fused=True``: there, and with
    ``skip_nonfinite``, its updates are 0. Of a step with a closure, gradients are those from before the closure.

    Equivalent, but for the waiting, to what ``wandb.watch`` and ``SummaryWriter.add_histogram`` are used for::

        monitor = trainops.Monitor(model, optimizer, every=50, activations=["blocks.*.mlp.0"])
        ...                                     # training
        for finding in monitor.findings():      # "step 51: blocks.3.mlp.0: 71% of the units are dead"
            print(finding)
        logger.log(monitor.flat())              # {"grad/l2_norm/blocks.0.attn.qkv.weight": 0.031, ...}

    Args:
        model: the model; inside or outside of wrappers.
        optimizer: its optimizer, or a framework's wrapper of it.
        every: statistics are those of steps 1, 1 + every, 1 + 2 * every, ...
        include: names or patterns of parameters, as for :class:`trainops.EMA`; default: all that the optimizer has.
        activations: the modules whose outputs are watched, in train mode; of each rank its own. A name is that module
            alone; patterns also fit the names of modules inside of modules. Units are the channels of convolutions
            and of their norms, else the last dimension; an activation function has those of the layer before it.
        keep: how many records there may be. One more, and every second one is dropped: pictures show the whole
            training, its beginning in ever fewer steps.

    Attributes:
        records: the statistics of each step that was looked at, as a list of :class:`Record`. The last one has
            histograms.
        steps: how many steps there were. After a checkpoint was loaded, set it to go on counting.

    Raises:
        ValueError: ``every`` or ``keep`` is too small, a pattern fits no name, or the optimizer has none of these
            parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        every: int = 50,
        include: Patterns | None = None,
        activations: Patterns = (),
        keep: int = 500,
    ) -> None:
        for name, value, least in (("every", every, 1), ("keep", keep, 2)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r:.60}")
        optimizer = unwrap(optimizer)
        named = list(innermost(model).named_parameters(remove_duplicate=False))
        chosen = None if include is None else checked_patterns("include", include, [n for n, _ in named], "parameter")
        own, names = _ids(optimizer), dict[Tensor, str]()
        for name, p in named:
            if id(p) in own and (chosen is None or any(fits(name, x) for x in chosen)):
                names.setdefault(p, name)
        self._params = {name: p for p, name in names.items()}
        if not self._params:
            raise ValueError("the optimizer has none of these parameters of the model")
        self.model, self.optimizer, self.every, self.keep = model, optimizer, every, keep
        self.records: list[Record] = []
        self.steps = 0
        self._begun: _Begun | None = None
        self._activations = Activations(innermost(model), activations, self._params.values(), self._is_due)
        self._hooks = [
            optimizer.register_step_pre_hook(self._begin_step),
            optimizer.register_step_post_hook(self._finish_step),
        ]

    def remove(self) -> None:
        """Take all hooks away. What was recorded stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._activations.remove()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def _is_due(self) -> bool:
        """Whether the step that comes is looked at."""
        return self.steps % self.every == 0

    @_disable_dynamo
    @torch.no_grad()
    def _begin_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._begun = None
        if not self._is_due():
            return
        seen = self._activations.take()
        self._advise(optimizer, seen)
        params = {n: p for n, p in self._params.items() if is_measured(p)}
        if sparse := [n for n, p in params.items() if p.grad is not None and p.grad.layout is not torch.strided]:
            advise(self, "sparse", f"{sparse[0]!r} has sparse gradients, of which a Monitor has no statistics")
        params = {n: p for n, p in params.items() if n not in sparse}
        if not params:
            return
        scale = getattr(optimizer, "grad_scale", None)
        measured = Measured(optimizer, list(params.values()), scale, histogram=True, backend=None)
        self._begun = _Begun(optimizer, params, measured, seen)

    def _advise(self, optimizer: Any, seen: Watched | None) -> None:
        """Warn of what the monitor cannot see."""
        own = _ids(optimizer)
        if lost := [name for name, p in self._params.items() if id(p) not in own]:
            message = (
                f"the optimizer no longer has {lost[0]!r} and {len(lost) - 1} other parameters of this Monitor: "
            )
            advise(self, "lost", message + "make it after fully_shard(), Accelerator.prepare() and the like")
        if seen is None and len(self._activations) > 0:
            message = "no watched module gave an output in train mode before this step: "
            advise(self, "unseen", message + "make a Monitor before the first call of a compiled model")

    @_disable_dynamo
    @torch.no_grad()
    def _finish_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.steps += 1
        if self._begun is None:
            return
        begun, self._begun = self._begun, None
        if self.records:
            self.records[-1] = self.records[-1].without_histograms()
        self.records.append(begun.finish(self.steps))
        if len(self.records) > self.keep:
            del self.records[1:-1:2]

    # Reading: from here on everything waits for the device.

    def last(self) -> Record:
        """The last record.

        Raises:
            RuntimeError: no step with dense gradients was looked at yet.
        """
        if not self.records:
            raise RuntimeError(
                "no step was looked at yet: statistics begin with the first one that has dense gradients"
            )
        return self.records[-1]

    def flat(self, record: Record | None = None) -> dict[str, float]:
        """The numbers of a record (default: the last) under keys for loggers.

        ``grad/l2_norm/<parameter>``, ``weight/std/<parameter>``, ``update/ratio/<parameter>``,
        ``activation/mean/<module>`` and so on; ``activation/dead/<module>`` is the share of units that were 0 for all
        inputs, ``activation/saturated/<module>`` of outputs that are at an end of their range.
        """
        return (self.last() if record is None else record).flat()

    def findings(self, **limits: float) -> list[Finding]:
        """What looks wrong, each with the name and the first step where it was seen; see :func:`findings_of`."""
        return findings_of(self.records, **limits)

    def write(self, path: str | Path) -> None:
        """Write JSON lines: an object for each record, with its ``step`` and the keys of :meth:`flat`."""
        with Path(path).open("w") as file:
            for record in self.records:
                file.write(json.dumps({"step": record.step, **_finite(record.flat())}) + "\n")

    def table(self) -> "Table":
        """The last record by layer, for ``rich.print``."""
        from .monitor_plots import table

        return table(self.last())

    def plot(self) -> "Figure":
        """Norms of gradients and of updates as colours, layer against step. Save it by ``.savefig("norms.png")``."""
        from .monitor_plots import norms

        self.last()
        return norms(self.records)

    def plot_distributions(self) -> "Figure":
        """How the magnitudes of the last record are distributed, by layer: gradients, weights and updates."""
        from .monitor_plots import distributions

        return distributions(self.last())

    def layers(self) -> Iterator[str]:
        """The names of the layers: parameters are those of one layer if one module has them."""
        return iter(dict.fromkeys(map(layer_of, self._params)))

    def __repr__(self) -> str:
        return (
            f"Monitor({len(self._params)} parameters, {len(self._activations)} modules, every={self.every}, "
            f"{len(self.records)} records)"
        )


class _Begun:
    """A step that is looked at, before it is taken."""

    def __init__(self, optimizer: Any, params: dict[str, Tensor], measured: Measured, seen: Watched | None) -> None:
        self.optimizer, self.names, self.measured, self.seen = optimizer, list(params), measured, seen
        self.first = next((p for p in params.values() if p.grad is not None), None)
        self.counted = self._count(0)
        lr_of = {p: group["lr"] for group in optimizer.param_groups for p in group["params"] if "lr" in group}
        self.lrs = tuple(_own(lr_of.get(p, 1.0)) for p in params.values())

    def _count(self, default: Any) -> Any:
        """How many steps the optimizer has counted of a parameter; most keep that as its state."""
        return default if self.first is None else _own(self.optimizer.state.get(self.first, {}).get("step", default))

    def finish(self, step: int) -> Record:
        """The record, when the step was taken."""
        its, count = self.measured, self._count(None)
        skipped = None if count is None else count == self.counted
        return Record(step, self.names, its.grads, its.weights, its.updates(), self.seen, skipped, self.lrs)


def _own(x: Any) -> Any:
    """A number; of one on a device, which may be written in place, a copy."""
    return local(x.detach()).clone().reshape(()) if isinstance(x, Tensor) else x


def _ids(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN and no infinities."""
    return {key: x if abs(x) < float("inf") else None for key, x in numbers.items()}
