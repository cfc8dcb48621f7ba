"""Find a learning rate: train for some steps while it grows, look at the loss, and put everything back."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .lr_finder_result import LRFinderResult
from .training_ranks import TrainingRanks
from .training_state import restored
from .wrappers import unwrap


def lr_finder(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    start_lr: float = 1e-7,
    end_lr: float = 10.0,
    steps: int = 100,
    sweep: str = "exponential",
    accumulate: int = 1,
    smoothing: float = 0.9,
    divergence: float | None = 4.0,
    repeat: bool = False,
    scaler: Any = None,
) -> LRFinderResult:
    """Train while the learning rate grows, and put everything back: https://arxiv.org/abs/1506.01186, section 3.3.

    Parameters, buffers, gradients and modes of the model, the optimizer's state and groups, its averages, the scaler,
    and random numbers are then what they were, bit for bit and in the same tensors; also after an error. So is the
    state of a loader that has one. Needs memory for one more copy of the model, its gradients and the state. What
    ``loss_fn`` keeps elsewhere, other hooks of the optimizer, and random numbers of persistent workers see the steps.

    Args:
        model: is set to train mode. Under DDP and FSDP, all ranks call this, and see the mean of their losses.
        optimizer: any optimizer of PyTorch, also in Accelerate's or Lightning's wrapper. Groups keep the ratios of
            their learning rates; where a scheduler has set all to 0, of those that it began with.
        batches: a loader or a list. It is begun anew; an iterator would be used up, and is refused.
        loss_fn: ``loss_fn(model, batch)`` returns the loss, one number. Autocast is its own affair.
        start_lr: the first learning rate, of the group with the largest one.
        end_lr: the last one.
        steps: how many steps of the optimizer; each is one learning rate.
        sweep: ``"exponential"`` or ``"linear"``: how the learning rate grows.
        accumulate: how many batches each step has; their gradients have the mean of their losses.
        smoothing: how much of the smoothed loss stays at each step, in [0, 1).
        divergence: stop where the smoothed loss is more than so many times its least value so far (of positive
            losses); None: only where it is not finite.
        repeat: begin the batches anew where they are too few.
        scaler: a GradScaler.

    Raises:
        ValueError: an argument makes no sense; the optimizer has no parameter of the model; ``batches`` are too few,
            on any rank; the first loss is not finite. Everything is as it was.
        TypeError: an argument is of another type, ``batches`` is an iterator, or ``loss_fn`` returns something else
            than one number.
    """
    optimizer = unwrap(optimizer)
    _check(model, optimizer, batches, start_lr, end_lr, steps, sweep, accumulate, smoothing, divergence)
    ranks = TrainingRanks(model)
    found = math.inf if repeat else _length(batches)
    if not ranks.all_have(found >= steps * accumulate):
        raise ValueError(_too_few(found, steps, accumulate))
    rates = _rates(start_lr, end_lr, steps, sweep)
    with restored(model, optimizer, scaler, batches):
        model.train()
        every = _endless(batches) if repeat else iter(batches)
        trial = _Trial(model, ranks, optimizer, every, loss_fn, scaler)
        return _run(trial, rates, accumulate, smoothing, divergence)


def _check(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Any,
    start_lr: float,
    end_lr: float,
    steps: int,
    sweep: str,
    accumulate: int,
    smoothing: float,
    divergence: float | None,
) -> None:
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"a model and its optimizer are needed, got {model!r:.40} and {optimizer!r:.40}")
    numbers = {"start_lr": start_lr, "end_lr": end_lr, "smoothing": smoothing, "divergence": divergence or 2.0}
    if wrong := [name for name, x in numbers.items() if not isinstance(x, Real)]:
        raise TypeError(f"{wrong[0]} must be a number, got {numbers[wrong[0]]!r:.60}")
    if not 0.0 < start_lr < end_lr < math.inf:
        raise ValueError(f"start_lr and end_lr must be such that 0 < start_lr < end_lr, got {start_lr} and {end_lr}")
    if not isinstance(steps, int) or not isinstance(accumulate, int) or steps < 2 or accumulate < 1:
        raise ValueError(f"steps must be an integer of at least 2, accumulate of 1, got {steps} and {accumulate}")
    if sweep not in ("exponential", "linear"):
        raise ValueError(f"sweep must be 'exponential' or 'linear', got {sweep!r}")
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
    if divergence is not None and not divergence > 1.0:
        raise ValueError(f"divergence must be more than 1, or None, got {divergence}")
    if isinstance(batches, Iterator):
        raise TypeError("batches is an iterator, which this would use up: give the loader, or a list of batches")
    own = {id(p) for p in model.parameters() if p.requires_grad}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("the optimizer has no parameter of this model that is trained")


def _too_few(found: float, steps: int, accumulate: int) -> str:
    needed = steps * accumulate
    there_are = f"there are {found}" if found < needed else "another rank has fewer"
    return (
        f"{steps} steps of {accumulate} batches need {needed} batches, {there_are}: give more, or fewer steps, or "
        "repeat=True"
    )


def _length(batches: Any) -> float:
    """How many batches there are; infinity where nobody knows, as of a loader of a stream."""
    try:
        return len(batches)
    except TypeError:
        return math.inf


def _rates(start: float, end: float, steps: int, sweep: str) -> list[float]:
    places = [i / (steps - 1) for i in range(steps)]
    if sweep == "linear":
        return [start + (end - start) * x for x in places]
    return [start * (end / start) ** x for x in places]


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        count = 0
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            yield batch
        if count == 0:
            return


class _Trial:
    """Steps of an optimizer at given learning rates."""

    def __init__(
        self,
        model: nn.Module,
        ranks: TrainingRanks,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[Any],
        loss_fn: Callable[[nn.Module, Any], Tensor],
        scaler: Any,
    ) -> None:
        self.model, self.ranks, self.optimizer, self.batches = model, ranks, optimizer, batches
        self.loss_fn, self.scaler = loss_fn, scaler
        self.ratios = _ratios(optimizer)
        self.current: list[Any] = []  # the batches of this step

    def set_lr(self, lr: float) -> None:
        """Give each group its share of a learning rate; a tensor stays the tensor that it is."""
        for group, ratio in zip(self.optimizer.param_groups, self.ratios, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * ratio)
            else:
                group["lr"] = lr * ratio

    def gradients(self, accumulate: int) -> float | None:
        """Gradients of the next batches, and the mean loss over ranks; None where one of them has no more batches."""
        self.current = list(islice(self.batches, accumulate))
        if not self.ranks.all_have(len(self.current) == accumulate):
            return None
        return float(self.ranks.mean(self.backward()))

    @torch.enable_grad()
    def backward(self) -> Tensor:
        """The gradients of the batches of this step, and the mean of their losses."""
        self.optimizer.zero_grad()
        losses = []
        for batch in self.current:
            loss = self.loss_fn(self.model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
                raise TypeError(f"loss_fn must return one number as a tensor, got {loss!r:.60}")
            if not loss.requires_grad:
                raise ValueError("the loss has no gradient: it was detached, or no parameter takes part in it")
            loss = loss.reshape(()) / len(self.current)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def step(self) -> None:
        """A step of the optimizer; LBFGS computes gradients of the same batches again."""
        if self.scaler is None and _needs_closure(self.optimizer):
            self.optimizer.step(lambda: self.ranks.mean(self.backward()))  # type: ignore[arg-type,return-value]
        elif self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


def _ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rate of each group over the largest; where all are 0, that which a scheduler began with."""
    for key in ("lr", "initial_lr"):
        rates = [float(group.get(key, 0.0)) for group in optimizer.param_groups]
        if max(rates) > 0.0:
            return [x / max(rates) for x in rates]
    return [1.0] * len(optimizer.param_groups)


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _run(
    trial: _Trial, rates: list[float], accumulate: int, smoothing: float, divergence: float | None
) -> LRFinderResult:
    lrs: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    average, diverged = 0.0, False
    for i, lr in enumerate(rates, start=1):
        trial.set_lr(lr)
        loss = trial.gradients(accumulate)
        if loss is None:
            found = (i - 1) * accumulate + len(trial.current)
            own = found if len(trial.current) < accumulate else math.inf
            raise ValueError(_too_few(own, len(rates), accumulate))
        if not math.isfinite(loss):
            if not losses:
                raise ValueError(f"the loss is {loss} before the first step")
            diverged = True
            break
        average = smoothing * average + (1.0 - smoothing) * loss
        lrs.append(lr)
        losses.append(loss)
        smoothed.append(average / (1.0 - smoothing**i))
        least = min(smoothed)
        if divergence is not None and least > 0.0 and smoothed[-1] > divergence * least:
            diverged = True
            break
        trial.step()
    return LRFinderResult(lrs, losses, smoothed, diverged)
