"""``python -m trainops verify``: every op of every backend of this machine, held to the specification.

An op runs on tensors of awkward sizes and layouts, and once more by ``reference`` on the same numbers in float64. A
result may differ by its own rounding, and by what arithmetic in float32 (float64 for float64) loses. What is skipped,
and what DropPath rounds as PyTorch does, must be the same bits.
"""

import platform
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import __version__, reference
from .adamw import AdamW
from .adapters import NAMES, Kernels, _triton, backends, check, select
from .clip_grad import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .ema import EMA

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A chunk of kernels has 8192 elements. The interpreter, which is slow, goes without the last shape.
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (127,), (33, 31), (2, 3, 5, 7), (8193,), (70_001,))
SAMPLES: tuple[tuple[int, ...], ...] = ((4, 1), (5, 7), (3, 33, 31), (2, 3, 5, 7), (6, 257, 64))  # for DropPath
DECAY = 0.9


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


class Finding(NamedTuple):
    """How an op did: its largest error in units of what is allowed, and what was wrong, if anything was."""

    op: str
    place: Place
    worst: float
    problem: str = ""


Check = Callable[[Place, torch.Generator], Iterator[Compared]]


def randn(place: Place, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Random numbers that every machine draws alike."""
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(place.device, place.dtype)


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
    return x.detach().to("cpu", torch.float64, copy=True).contiguous()


def rounded(what: str, got: Tensor, exact: Tensor, terms: Tensor | None = None) -> Compared:
    """A result that is rounded to its type; ``terms``: the magnitudes that it is summed from."""
    largest = (exact if terms is None else terms).abs().nan_to_num(posinf=0.0).max() if exact.numel() else 0.0
    arithmetic = 2.0**-53 if got.dtype == torch.float64 else 2.0**-24
    info = torch.finfo(got.dtype)
    allowed = exact.abs() * info.eps / 2 + info.smallest_normal * info.eps + 8 * arithmetic * largest
    return Compared(what, got, exact, allowed)


# The checks


def norms(place: Place, generator: torch.Generator) -> Iterator[Compared]:
    """``get_total_norm`` and what clips by it."""
    grads = tensors(place, generator)
    for norm_type in (2.0, 1.0, float("inf")):
        norm = get_total_norm(list(grads.values()), norm_type, backend=place.backend)
        exact = get_total_norm([double(x) for x in grads.values() if x.numel()], norm_type, backend="reference")
        yield rounded(f"norm of order {norm_type}", norm, exact)
    norm, params = torch.tensor(2.0, device=place.device), []
    for x in grads.values():
        params.append(nn.Parameter(torch.empty_like(x)))
        params[-1].grad = x.clone()
    clip_grads_with_norm_(params, 0.5, norm, backend=place.backend)
    for (name, x), param in zip(grads.items(), params, strict=True):
        yield rounded(f"clipped by norm, {name}", _grad(param), double(x) * (0.5 / (2.0 + 1e-6)))
    clip_grad_value_(params, 0.1, backend=place.backend)
    for (name, x), param in zip(grads.items(), params, strict=True):
        clipped = (x * (0.5 / (2.0 + 1e-6))).clamp(-0.1, 0.1)
        yield rounded(f"clipped by value, {name}", _grad(param), double(clipped), terms=double(x))


def _grad(param: Tensor) -> Tensor:
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
        pairs = zip(self.names, _params(self.ours), _params(self.exact), _averages(self.ours), strict=True)
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


def _params(optimizer: AdamW) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _averages(optimizer: AdamW) -> list[Tensor]:
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
    _grad(_params(bad.ours)[-1])[-1] = float("nan")
    yield from bad.skipped()


def ema(place: Place, generator: torch.Generator) -> Iterator[Compared]:
    """``EMA.update``, of an average in the model's type, and in float32."""
    for dtype in dict.fromkeys((place.dtype, torch.promote_types(place.dtype, torch.float32))):
        found = tensors(place, generator)
        model = nn.Module()
        model.weights = nn.ParameterList(found.values())
        average = EMA(model, DECAY, dtype=dtype, update_after_step=-2, backend=place.backend)
        for x in average.module.parameters():
            x.mul_(0.5)
        before = list(map(double, average.module.parameters()))
        average.update()
        for name, x, old, param in zip(found, average.module.parameters(), before, model.weights, strict=True):
            yield rounded(f"average {name}", x, old + (1 - DECAY) * (double(param) - old), terms=double(param))


def drop_path(place: Place, generator: torch.Generator) -> Iterator[Compared]:
    """DropPath with a residual and layer scale, and its derivative."""
    for shape in place.of(SAMPLES):
        for layout, branch in layouts(randn(place, generator, shape)):
            residual = torch.empty_like(branch).copy_(randn(place, generator, shape))
            mask = (torch.arange(shape[0], device=place.device) % 3 != 1).to(place.dtype).div(0.75)
            mask = mask.view(-1, *[1] * (len(shape) - 1))
            channels = (shape[1], 1, 1) if layout == "channels_last" else shape[-1:]
            scale, name = randn(place, generator, channels), f"{shape} {layout}"
            cpu = [x.cpu() for x in (branch, mask, residual, scale)]
            for count in (2, 3, 4):
                operands = branch, mask, residual, scale
                got = place.kernels.drop_path(*operands[:count])
                yield Compared(f"drop_path {name}", got, reference.drop_path(*cpu[:count]), None)
            of_branch, of_scale = place.kernels.drop_path_backward(residual, branch, mask, scale)
            on_cpu = reference.drop_path_backward(cpu[2], cpu[0], cpu[1], cpu[3])
            yield Compared(f"gradient of the branch {name}", of_branch, on_cpu[0], None)
            exact, terms = (
                reference.drop_path_backward(f(cpu[2]), f(cpu[0]), cpu[1].double(), cpu[3].double())[1]
                for f in (Tensor.double, lambda x: x.double().abs())
            )
            if of_scale is not None and exact is not None:
                yield rounded(f"gradient of layer scale {name}", of_scale, exact, terms)


CHECKS: dict[str, Check] = {
    "norms and clipping": norms,
    "AdamW and average": step,
    "clipping and skipping in the step": clipped_step,
    "EMA.update": ema,
    "DropPath": drop_path,
}


# What they find


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


def run(op: str, place: Place) -> Finding:
    """One op in one place."""
    worst = 0.0
    try:
        with torch.no_grad():
            for compared in CHECKS[op](place, torch.Generator().manual_seed(0)):
                its, problem = problem_with(compared)
                if problem:
                    return Finding(op, place, its, problem)
                worst = max(worst, its)
    except Exception as error:
        return Finding(op, place, float("inf"), f"{type(error).__name__}: {error}")
    return Finding(op, place, worst)


def places(device: str | None = None, backend: str | None = None) -> Iterator[Place]:
    """Every backend that is available, on every device that it serves."""
    devices = [str(torch.device(device))] if device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name, found in backends().items():
        if not found.available or name == "reference" or (backend and name != backend):
            continue
        for at in map(torch.device, devices):
            try:
                select(name, at)
            except RuntimeError:  # serves other devices
                continue
            for dtype in DTYPES:
                yield Place(name, at, dtype)


def environment() -> str:
    """What a bug report needs to say."""
    lines = [f"trainops {__version__}, torch {torch.__version__}, Python {platform.python_version()}"]
    lines += [f"{platform.system()} {platform.machine()}"]
    if torch.cuda.is_available():
        lines[-1] += f", {torch.cuda.get_device_name()}"
    found = backends()
    return "\n".join([*lines, *(f"{name}: {found[name].details or found[name].reason}" for name in NAMES)])


def verify(device: str | None = None, backend: str | None = None, show: Callable[[str], None] = print) -> bool:
    """Run every check, show a table and a verdict; whether all is well.

    Args:
        device: such as ``"cuda"`` or ``"cuda:1"``; by default the CPU, and the current GPU if there is one.
        backend: one alone; by default all that are available.
        show: what lines are given to.

    Raises:
        ValueError: there is no such backend, or none that serves the device.
        RuntimeError: the backend is not available, or there is no such type of device.
    """
    check(backend)
    chosen = list(places(device, backend))
    if not chosen:
        asked = " and ".join(f"{x!r}" for x in (backend, device) if x) or "any"
        raise ValueError(f"there is no backend to verify ({asked}); python -m trainops says which are available")
    titles = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    show("errors in units of what is allowed; 0: the same bits\n")
    show(f"{'':44} {' '.join(f'{title:>9}' for title in titles)}")
    findings: list[Finding] = []
    for name, at in dict.fromkeys((place.backend, place.device) for place in chosen):
        for op in CHECKS:
            row = [run(op, Place(name, at, dtype)) for dtype in DTYPES]
            findings += row
            cells = " ".join(f"{'WRONG' if x.problem else f'{x.worst:.2f}':>9}" for x in row)
            show(f"{f'{name} on {at.type}: {op}':44} {cells}")
    wrong = [x for x in findings if x.problem]
    if not wrong:
        show("\nall as specified")
        return True
    show(f"\n{len(wrong)} of {len(findings)} are WRONG. For a bug report:\n\n{environment()}\n")
    for x in wrong:
        show(f"{x.place.backend} on {x.place.device}, {x.place.dtype}, {x.op}: {x.problem}")
    return False
