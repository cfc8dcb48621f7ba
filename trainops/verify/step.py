"""A step of an optimizer, with clipping, skipping and an average."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..adam import Adam
from ..adamw import AdamW
from ..ema import EMA
from ..reference_codes import CODE_OF, encoded
from ..reference_storage import write_weight
from ..seeds import OWN_STATE
from ..sgd import SGD
from ..spike_guard import SpikeGuard
from ..storage import MASTER, codes_key, values_of_codes
from .compare import Compared, Place, coded, double, rounded, tensors

DECAY = 0.9
MASTERS = {torch.bfloat16: "split", torch.float16: "float32"}  # which kind serves which type

STORED = ("master", "state_dtype", "stochastic_rounding")  # options that say how tensors are stored: ours alone

Optimizer = AdamW | Adam | SGD


def grad_of(param: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    if param.grad is None:
        raise RuntimeError("the gradient is gone")
    return param.grad


class Step:
    """An optimizer in the middle of training, and the specification's twin of it."""

    def __init__(
        self, place: Place, generator: torch.Generator, cls: type[Optimizer] = AdamW, **options: Any
    ) -> None:
        stored = {name: options.pop(name) for name in STORED if name in options}
        made = cls([torch.empty(1)], lr=0.01, **options)
        moments = made.state_names(made.param_groups[0])
        columns = {name: tensors(place, generator) for name in ("param", "grad", *moments)}
        for name in moments[1:]:
            for x in columns[name].values():
                x.abs_()
        self.place, self.names, self.cls = place, list(columns["param"]), cls
        ours = {name: list(column.values()) for name, column in columns.items()}
        exact = {name: list(map(double, column)) for name, column in ours.items()}
        self.ours = self._optimizer(**ours, backend=place.backend, options={**options, **stored})
        if "master" in stored:
            exact["param"] = [double(self._refined(param)) for param in params_of(self.ours)]
        if stored.get("state_dtype") == "int8":
            for name in moments:
                exact[name] = [double(self._moment(param, name)) for param in params_of(self.ours)]
        self.before = list(map(double, averages_of(self.ours)))
        self.exact = self._optimizer(**exact, backend="reference", options=options)

    def _optimizer(
        self, param: list[Tensor], grad: list[Tensor], backend: str, options: dict[str, Any], **moments: list[Tensor]
    ) -> Optimizer:
        model = nn.Module()
        model.weights = nn.ParameterList(param)
        dtype = torch.float32 if options.get("master") else None
        ema = EMA(model, DECAY, dtype=dtype, update_after_step=-2, backend=backend)  # moves from the first step on
        for average in ema.module.parameters():
            average.mul_(0.5)
        optimizer = self.cls(model.parameters(), lr=0.01, ema=ema, backend=backend, **options)
        if options.get("master"):
            optimizer.init_state()
        for i, weight in enumerate(model.weights):
            weight.grad = grad[i]
            own = {name: column[i] for name, column in moments.items()}
            if options.get("state_dtype") == "int8":
                own = {codes_key(name): encoded(x, CODE_OF[name], weight) for name, x in own.items()}
            optimizer.state[weight] |= {"step": torch.tensor(3.0, device=weight.device), **own}
        return optimizer

    def _refined(self, param: Tensor) -> Tensor:
        """The float32 weight of a parameter from now on: a quarter of its last place further from 0, at most."""
        weight = param.detach().float() * (1 + torch.finfo(param.dtype).eps / 8)
        write_weight(param, self.ours.state[param][MASTER], weight)
        return weight

    def _moment(self, param: Tensor, name: str) -> Tensor:
        """A moment of ours as numbers."""
        own = self.ours.state[param]
        codes = own.get(codes_key(name))
        return own[name] if codes is None else values_of_codes(param, name, codes, torch.float32)

    def scale(self, grad_scale: float, found_inf: float) -> None:
        """What a GradScaler sets."""
        for optimizer, device in ((self.ours, self.place.device), (self.exact, torch.device("cpu"))):
            vars(optimizer)["grad_scale"] = torch.tensor(grad_scale, device=device)
            vars(optimizer)["found_inf"] = torch.tensor(found_inf, device=device)

    def results(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every tensor of ours by name, and the specification's."""
        pairs = zip(self.names, params_of(self.ours), params_of(self.exact), averages_of(self.ours), strict=True)
        for (name, ours, exact, average), before in zip(pairs, self.before, strict=True):
            weight = self.ours.float32_weight(ours)
            yield f"weight {name}", weight, exact
            if weight is not ours:
                yield f"parameter {name}", ours, double(weight)
            for key, value in self.exact.state[exact].items():
                yield f"{key} {name}", self._moment(ours, key), value.double()
            # The average follows the weight as it is stored.
            yield f"average {name}", average, before + (1 - DECAY) * (double(weight) - before)

    def taken(self) -> Iterator[Compared]:
        """After one step of both."""
        self.ours.step()
        self.exact.step()
        for what, got, exact in self.results():
            key, _, name = what.partition(" ")
            is_coded = codes_key(key) in self.ours.state[params_of(self.ours)[self.names.index(name)]]
            yield (coded if is_coded else rounded)(what, got, exact.detach())
        if self.ours.grad_norm is not None and self.exact.grad_norm is not None:
            yield rounded("grad_norm", self.ours.grad_norm, self.exact.grad_norm)

    def skipped(self) -> Iterator[Compared]:
        """After a step of ours that must change nothing."""
        before = [got.detach().clone() for _, got, _ in self.results()]
        self.ours.step()
        for (what, got, _), old in zip(self.results(), before, strict=True):
            yield Compared(f"{what} of a step that is skipped", got, old, None)
        yield Compared("skipped_steps", self.ours.skipped_steps, torch.tensor(1), None)


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """Those of all groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def averages_of(optimizer: Optimizer) -> list[Tensor]:
    """What the optimizer's average holds."""
    if optimizer.ema is None:
        raise RuntimeError("the average is gone")
    return list(optimizer.ema.module.parameters())


def step(place: Place, generator: torch.Generator) -> Iterator[Compared]:
    """``AdamW.step`` with an average."""
    yield from Step(place, generator, weight_decay=0.1).taken()
    yield from Step(place, generator, amsgrad=True, maximize=True, betas=(0.5, 0.9), eps=1e-3).taken()


def other_rules(place: Place, generator: torch.Generator) -> Iterator[Compared]:
    """``Adam.step`` with an L2 penalty, and ``SGD.step`` with and without momentum."""
    yield from Step(place, generator, Adam, weight_decay=0.1, amsgrad=True, eps=1e-3).taken()
    yield from Step(place, generator, SGD, weight_decay=0.1, maximize=True).taken()
    yield from Step(place, generator, SGD, weight_decay=0.1, momentum=0.9, nesterov=True).taken()


def step_with_masters(place: Place, generator: torch.Generator) -> Iterator[Compared]:
    """Steps of 16-bit parameters whose weights are float32."""
    master = MASTERS[place.dtype]
    yield from Step(place, generator, weight_decay=0.1, max_grad_norm=10.0, eps=1e-3, master=master).taken()
    yield from Step(place, generator, SGD, momentum=0.9, dampening=0.5, master=master).taken()
    bad = Step(place, generator, skip_nonfinite=True, master=master)
    grad_of(params_of(bad.ours)[-1])[-1] = float("nan")
    yield from bad.skipped()


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


def guarded_step(place: Place, generator: torch.Generator) -> Iterator[Compared]:
    """A step that a guard takes, and learns from, and one that is a spike."""
    guarded = Step(place, generator, spike_guard=SpikeGuard(None, max_norm=1e6), eps=1e-3)
    yield from guarded.taken()
    learned, exact = (x.param_groups[0][OWN_STATE]["spike_guard"] for x in (guarded.ours, guarded.exact))
    # The logarithm of a norm, whose sums are partly float32.
    allowed = torch.full((4,), 1e-6, dtype=torch.float64)
    yield Compared("what the guard has learned", learned[:4], exact[:4].double(), allowed)
    grad_of(params_of(guarded.ours)[-1]).mul_(1e4)
    grad_of(params_of(guarded.ours)[-1])[-1] = 3e4
    guarded.ours.spike_guard = SpikeGuard(None, max_norm=1e4)
    yield from guarded.skipped()
