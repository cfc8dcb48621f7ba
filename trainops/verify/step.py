"""A step of an optimizer, with clipping, skipping and an average."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..adamw import AdamW
from ..ema import EMA
from .compare import Compared, Place, double, rounded, tensors

DECAY = 0.9


def grad_of(param: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    if param.grad is None:
        raise RuntimeError("the gradient is gone")
    return param.grad


class Step:
    """An optimizer in the middle of training, and the specification's twin of it."""

    def __init__(self, place: Place, generator: torch.Generator, **options: Any) -> None:
        moments = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if options.get("amsgrad") else []))
        columns = {name: tensors(place, generator) for name in ("param", "grad", *moments)}
        for name in moments[1:]:
            for x in columns[name].values():
                x.abs_()
        self.place, self.names = place, list(columns["param"])
        ours = {name: list(column.values()) for name, column in columns.items()}
        exact = {name: list(map(double, column)) for name, column in ours.items()}
        self.before = list(map(double, ours["param"]))
        self.ours = self._optimizer(**ours, backend=place.backend, options=options)
        self.exact = self._optimizer(**exact, backend="reference", options=options)

    def _optimizer(
        self, param: list[Tensor], grad: list[Tensor], backend: str, options: dict[str, Any], **moments: list[Tensor]
    ) -> AdamW:
        model = nn.Module()
        model.weights = nn.ParameterList(param)
        ema = EMA(model, DECAY, update_after_step=-2, backend=backend)  # moves from the first step on
        for average in ema.module.parameters():
            average.mul_(0.5)
        optimizer = AdamW(model.parameters(), lr=0.01, ema=ema, backend=backend, **options)
        for i, weight in enumerate(model.weights):
            weight.grad = grad[i]
            own = {name: column[i] for name, column in moments.items()}
            optimizer.state[weight] = {"step": torch.tensor(3.0, device=weight.device), **own}
        return optimizer

    def scale(self, grad_scale: float, found_inf: float) -> None:
        """What a GradScaler sets."""
        for optimizer, device in ((self.ours, self.place.device), (self.exact, torch.device("cpu"))):
            vars(optimizer)["grad_scale"] = torch.tensor(grad_scale, device=device)
            vars(optimizer)["found_inf"] = torch.tensor(found_inf, device=device)

    def results(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every tensor of ours by name, and the specification's."""
        pairs = zip(self.names, params_of(self.ours), params_of(self.exact), averages_of(self.ours), strict=True)
        for (name, ours, exact, average), before in zip(pairs, self.before, strict=True):
            yield f"parameter {name}", ours, exact
            for key, value in self.ours.state[ours].items():
                yield f"{key} {name}", value, self.exact.state[exact][key].double()
            start = (before * 0.5).to(average.dtype).double()  # the average follows the weight as it is stored
            yield f"average {name}", average, start + (1 - DECAY) * (double(ours) - start)

    def taken(self) -> Iterator[Compared]:
        """After one step of both."""
        self.ours.step()
        self.exact.step()
        for what, got, exact in self.results():
            yield rounded(what, got, exact.detach())
        if self.ours.grad_norm is not None and self.exact.grad_norm is not None:
            yield rounded("grad_norm", self.ours.grad_norm, self.exact.grad_norm)

    def skipped(self) -> Iterator[Compared]:
        """After a step of ours that must change nothing."""
        before = [got.detach().clone() for _, got, _ in self.results()]
        self.ours.step()
        for (what, got, _), old in zip(self.results(), before, strict=True):
            yield Compared(f"{what} of a step that is skipped", got, old, None)
        yield Compared("skipped_steps", self.ours.skipped_steps, torch.tensor(1), None)


def params_of(optimizer: AdamW) -> list[Tensor]:
    """Those of all groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def averages_of(optimizer: AdamW) -> list[Tensor]:
    """What the optimizer's average holds."""
    if optimizer.ema is None:
        raise RuntimeError("the average is gone")
    return list(optimizer.ema.module.parameters())


def step(place: Place, generator: torch.Generator) -> Iterator[Compared]:
    """``AdamW.step`` with an average."""
    yield from Step(place, generator, weight_decay=0.1).taken()
    yield from Step(place, generator, amsgrad=True, maximize=True, betas=(0.5, 0.9), eps=1e-3).taken()


def clipped_step(place: Place, generator: torch.Generator) -> Iterator[Compared]:
    """The same with clipping, under a GradScaler, and skipped."""
    yield from Step(place, generator, max_grad_norm=10.0, eps=1e-3).taken()
    scaled = Step(place, generator, max_grad_norm=0.5)
    scaled.scale(8.0, 0.0)
    yield from scaled.taken()
    infinite = Step(place, generator, max_grad_norm=0.5)
    infinite.scale(8.0, 1.0)
    yield from infinite.skipped()
    bad = Step(place, generator, skip_nonfinite=True)
    grad_of(params_of(bad.ours)[-1])[-1] = float("nan")
    yield from bad.skipped()
