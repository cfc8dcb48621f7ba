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
from .monitor_record import BegunStep, Record, Watched, layer_of
from .step_stats import Measured, is_measured
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
            and of their norms, and else the last dimension; an activation function, a dropout or a pooling has those
            of the module that its model has before it. Where that says nothing, outputs of four dimensions and more
            have channels first. Outputs of a step that a GradScaler skips count among those of the next one.
        keep: how many records there may be. One more, and every second one is dropped, and from then on only every
            second one is kept beside the last: pictures show the whole training. ``findings()`` are of those kept.

    Attributes:
        records: the statistics of each step that was looked at, as a list of :class:`Record`. The last one has
            histograms.
        steps: how many steps there were. After a checkpoint was loaded, set it to go on counting.

    Raises:
        TypeError: ``model`` or ``optimizer`` is something else.
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
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r:.60}")
        optimizer = unwrap(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r:.60}")
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
        self._count, self._stride, self._places = 0, 1, list[int]()  # of all records; of those that are kept
        self._begun: BegunStep | None = None
        self._activations = Activations(innermost(model), activations, self._is_due)
        self._hooks = [
            optimizer.register_step_pre_hook(self._begin_step),
            optimizer.register_step_post_hook(self._finish_step),
        ]

    def remove(self) -> None:
        """Take all hooks away. What was recorded stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._begun = [], None
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
        self._advise(optimizer)
        params = {n: p for n, p in self._params.items() if is_measured(p)}
        if sparse := [n for n, p in params.items() if p.grad is not None and p.grad.layout is not torch.strided]:
            advise(self, "sparse", f"{sparse[0]!r} has sparse gradients, of which a Monitor has no statistics")
        params = {n: p for n, p in params.items() if n not in sparse}
        if not params:
            return
        scale = getattr(optimizer, "grad_scale", None)
        measured = Measured(optimizer, list(params.values()), scale, histogram=True, backend=None)
        self._begun = BegunStep(optimizer, params, measured)

    def _advise(self, optimizer: Any) -> None:
        """Warn of what the monitor cannot see."""
        own = _ids(optimizer)
        if lost := [name for name, p in self._params.items() if id(p) not in own]:
            message = (
                f"the optimizer no longer has {lost[0]!r} and {len(lost) - 1} other parameters of this Monitor: "
            )
            advise(self, "lost", message + "make it after fully_shard(), Accelerator.prepare() and the like")

    def _outputs(self) -> Watched | None:
        """What watched modules have returned, before the step or in its closure."""
        seen = self._activations.take()
        if seen is None and len(self._activations) > 0:
            message = "no watched module gave an output in train mode before this step: "
            advise(self, "unseen", message + "make a Monitor before the first call of a compiled model")
        return seen

    @_disable_dynamo
    @torch.no_grad()
    def _finish_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        is_due = self._is_due()
        self.steps += 1
        if not is_due:
            return
        seen, begun, self._begun = self._outputs(), self._begun, None
        if begun is not None:
            self._keep(begun.finish(self.steps, seen))

    def _keep(self, record: Record) -> None:
        """The last record is always there; of those before, as many as may be, at equal distances."""
        if self.records:
            self.records[-1] = self.records[-1].without_histograms()
            if self._places[-1] % self._stride:
                del self.records[-1], self._places[-1]
        self.records.append(record)
        self._places.append(self._count)
        self._count += 1
        if len(self.records) > self.keep:
            self._stride *= 2
            kept = [i for i, place in enumerate(self._places) if place % self._stride == 0]
            kept += [] if kept[-1] == len(self.records) - 1 else [len(self.records) - 1]
            self.records = [self.records[i] for i in kept]
            self._places = [self._places[i] for i in kept]

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


def _ids(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN and no infinities."""
    return {key: x if abs(x) < float("inf") else None for key, x in numbers.items()}
