"""Parameters, gradients and averages for providers to work on, and what must come out.

Values repeat with a prime period, the tile. As everything but a norm is done element by element, the truth in float64
needs to be computed for the tile alone, and still every element of every provider is compared with it.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from .models import BY_SIZE, BY_TENSORS, MODELS, Shapes, numel
from .runner import Case, NotHere, Options, Provider

PERIOD = 1_000_003
COMPILED_TENSORS = 200  # more take the compiler minutes
STEPS = 3  # taken before results are compared

# Large and quick enough for whatever is left out to show in bfloat16, too. No step takes longer or shorter for it.
LR, BETAS, EPS, WEIGHT_DECAY, MOMENTUM = 1e-2, (0.9, 0.999), 1e-8, 2.0, 0.9
DECAY = 0.6

# Where gradient and penalty cancel to almost nothing, Adam's step jumps between lr and -lr, and the last place of a
# norm decides which: then nobody could be verified. With a larger epsilon the step is continuous.
ADAM_EPS = 0.1

# What the gradients of the first steps are multiplied by, and the norm to clip them to over that of the first ones:
# the second ones are left alone. AdamW itself would not notice a factor that all have in common.
GRADS, CLIPPED = (1.0, 0.5, 4.0), 0.7

# The error allowed, as a share of the largest movement that there is. PyTorch sums norms in float32, and is off by
# 9e-4 at 39 million elements; bfloat16 has three digits of the values, and fewer of what moves them.
TOLERANCE = {torch.float64: 2e-3, torch.float32: 2e-3, torch.bfloat16: 0.08}

CPU_MODELS = ["1,000 small tensors", "ViT-Ti", "ViT-S", "ResNet-50", "DDPM UNet", "ViT-B", "GPT-2"]
QUICK_MODELS = ["1,000 small tensors", "ViT-Ti", "ResNet-50"]


class Model(nn.Module):
    """Parameters, and nothing that is done with them."""

    def __init__(self, shapes: Shapes, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(s, device=device, dtype=dtype)) for s in shapes)


class Expected(NamedTuple):
    """What must come out for a role: a tile or a number, in float64, and how far its largest element has moved."""

    value: Tensor
    moved: float


def expect(value: Tensor, before: Tensor | float = 0.0) -> Expected:
    """A value, and what it was."""
    return Expected(value, float((value - before).abs().max()))


class Work:
    """A model with gradients. Providers are verified one after the other, and then share all of their tensors.

    A subclass says who takes part (``makers``), what is put into the tensors before a step (``prepare``) and what
    must have come out after ``STEPS`` of them (``truth``, by role).
    """

    makers: ClassVar[dict[str, Callable[[Any], Provider]]]
    clips: ClassVar[bool] = False  # some rewrite the gradients that all share: there are new ones before each call

    def __init__(self, shapes: Shapes, options: Options, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.compiles = options.device, dtype, options.compiles
        self.model = Model(shapes, self.device, dtype)
        self.params = list(self.model.weights)
        self.shared: dict[tuple[str, torch.dtype], list[Tensor]] = {}
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(PERIOD, generator=generator).to(self.device)
        self.start = (0.02 * values).to(dtype)
        self.tiles = [(factor * values.roll(1000 * (i + 1))).to(dtype) for i, factor in enumerate(GRADS)]
        self.expected: dict[str, Expected] | None = None

    @cached_property
    def max_norm(self) -> float:
        """Between the norms of the steps' gradients."""
        repeats, rest = divmod(sum(param.numel() for param in self.params), PERIOD)
        squares = self.tiles[0].double().square()
        return CLIPPED * float((repeats * squares.sum() + squares[:rest].sum()).sqrt())

    def prepare(self, step: int) -> None:
        """Gradients as a backward pass would leave them, other ones at every step."""
        self.set_grads(self.tiles[step])

    def set_grads(self, tile: Tensor) -> None:
        """Fill the gradients, which are made where there are none yet."""
        for param in self.params:
            if param.grad is None:
                param.grad = torch.empty_like(param)
        spread(tile, [param.grad for param in self.params])

    def grads(self) -> list[Tensor]:
        """The gradients that there are."""
        return [param.grad for param in self.params if param.grad is not None]

    def truth(self) -> dict[str, Expected]:
        """What must have come out."""
        raise NotImplementedError

    def admit(self, name: str) -> tuple[Provider, float]:
        """Make a provider and verify it from the common start; then let it share the tensors of the others."""
        if self.expected is None:
            self.expected = self.truth()
        spread(self.start, self.params)
        provider = self.makers[name](self)
        for step in range(STEPS):
            self.prepare(step)
            provider.step()
        if self.clips:
            provider.before = partial(self.prepare, 0)
        provider.note = compiled_note(name)
        allowed = 1 + provider.inexact / TOLERANCE[self.dtype]
        error = max(worst(result, self.expected[role]) for role, result in provider.results().items()) / allowed
        for kind, tensors in provider.owned().items():
            for own, shared in zip(tensors, self.shared.setdefault((kind, tensors[0].dtype), tensors), strict=True):
                own.data = shared.data
        return provider, error


def pieces(tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Flat parts of tensors, and where in the tile each begins, as if all were one run of memory."""
    position = 0
    for tensor in tensors:
        for part in tensor.detach().view(-1).split(PERIOD):
            yield part, position
            position = (position + part.numel()) % PERIOD


def spread(tile: Tensor, tensors: Iterable[Tensor]) -> None:
    """Fill tensors with the tile, over and over."""
    twice = torch.cat([tile, tile])
    for part, position in pieces(tensors):
        part.copy_(twice[position : position + part.numel()])


def worst(result: Any, expected: Expected) -> float:
    """The largest error of tensors or of a number, as a multiple of what is allowed."""
    truth = expected.value
    if isinstance(result, Tensor):
        result, parts = [result], [(result.detach().view(-1), 0)]
    else:
        parts = list(pieces(result))
    twice = torch.cat([truth.view(-1), truth.view(-1)])
    errors = [(part.double() - twice[position : position + part.numel()]).abs().max() for part, position in parts]
    return float(torch.stack(errors).max()) / (TOLERANCE[result[0].dtype] * expected.moved)


def clip_coefficient(grads: Iterable[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """The norm of gradients in float64, and what they are to be multiplied by."""
    norm = torch.stack([part.double().square().sum() for part, _ in pieces(grads)]).sum().sqrt()
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)


class Moments(NamedTuple):
    """AdamW's, in float64."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


def adamw_truth(param: Tensor, grad: Tensor, moments: Moments, step: int, eps: float = EPS) -> None:
    """AdamW (arXiv:1711.05101) in place, from step 1."""
    param.mul_(1 - LR * WEIGHT_DECAY)
    moments.exp_avg.lerp_(grad, 1 - BETAS[0])
    moments.exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
    corrected = (moments.exp_avg_sq / (1 - BETAS[1] ** step)).sqrt() + eps
    param.addcdiv_(moments.exp_avg / (1 - BETAS[0] ** step), corrected, value=-LR)


def adam_truth(param: Tensor, grad: Tensor, moments: Moments, step: int) -> None:
    """Adam (arXiv:1412.6980) in place, from step 1."""
    penalized = grad + WEIGHT_DECAY * param
    param.div_(1 - LR * WEIGHT_DECAY)  # which AdamW takes back
    adamw_truth(param, penalized, moments, step, ADAM_EPS)


def sgd_truth(param: Tensor, grad: Tensor, moments: Moments, step: int) -> None:
    """SGD with momentum, in place, from step 1. The buffer is the first moment."""
    buffer = moments.exp_avg.mul_(MOMENTUM).add_(grad + WEIGHT_DECAY * param)
    param.sub_(LR * buffer)


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """Every kind of state tensor that an optimizer keeps of its parameters, in the optimizer's order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kinds = [k for k, v in optimizer.state[params[0]].items() if k != "step" and isinstance(v, Tensor)]
    kinds = [k for k in kinds if all(optimizer.state[p][k].shape == p.shape for p in params)]
    return {kind: [optimizer.state[p][kind] for p in params] for kind in kinds}


# Compiling


def compilable(work: Any) -> Callable[..., Any]:
    """`torch.compile`; NotHere where it would take too long: on one core it takes a minute for 150 tensors."""
    if not work.compiles:
        raise NotHere("nothing is compiled in quick runs, in sweeps and with --no-compile")
    if work.device == "cpu" and work.dtype != torch.float32:
        raise NotHere("compiled for float32 alone on the CPU, as that takes a minute each")
    if len(work.params) > COMPILED_TENSORS:
        raise NotHere(f"not compiled for more than {COMPILED_TENSORS} tensors: that takes minutes")
    torch.compiler.reset()
    counters.clear()
    return torch.compile


def compiled_note(name: str) -> str:
    """What became of a provider that says in its name that it is compiled; the compiler gives up in silence.

    Raises:
        RuntimeError: nothing was compiled.
    """
    if not name.endswith("compiled"):
        return ""
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    if not graphs:
        raise RuntimeError(f"nothing was compiled; the compiler gave up because of {list(counters['graph_break'])}")
    return f"{graphs} graph{'s' * (graphs > 1)}, {breaks} break{'s' * (breaks != 1)}"


def model_cases(op: str, work: type[Work], elements: int, tensors: int, options: Options) -> Iterator[Case]:
    """A case for every model and dtype.

    ``elements`` are those that the best possible implementation reads and writes for each one of the model's, and
    ``tensors`` of the model's size are kept or made, averages, moments and what verification takes included.
    """
    defaults = QUICK_MODELS if options.quick else CPU_MODELS if options.device == "cpu" else list(MODELS)
    for name in options.models or defaults:
        for dtype in options.dtypes or ["float32", "bfloat16"]:
            yield shapes_case(op, name, MODELS[name], work, elements, tensors, options, dtype)


def sweep_cases(op: str, work: type[Work], elements: int, tensors: int, options: Options) -> Iterator[Case]:
    """As many elements in ever more tensors, and as many tensors of ever more elements. Nothing is compiled."""
    options = options._replace(compiles=False)
    sweeps = ("count", BY_TENSORS), ("size", BY_SIZE)
    for group, lists in sweeps:
        for i, shapes in enumerate(lists.values()):
            if options.quick and i % 2 == 1:
                continue
            name = f"{len(shapes):,} x {numel(shapes[:1]):,} elements"
            yield shapes_case(op, name, shapes, work, elements, tensors, options, "float32", group)


def shapes_case(
    op: str,
    name: str,
    shapes: Shapes,
    work: type[Work],
    elements: int,
    tensors: int,
    options: Options,
    dtype: str,
    group: str = "models",
) -> Case:
    """One case on such a list of tensors."""
    count, torch_dtype = numel(shapes), getattr(torch, dtype)
    return Case(
        op,
        name,
        list(work.makers),
        lambda: work(shapes, options, torch_dtype),
        group=group,
        dtype=dtype,
        tensors=len(shapes),
        numel=count,
        bytes=elements * torch_dtype.itemsize * count,
        need=tensors * torch_dtype.itemsize * count + 40 * 8 * PERIOD,
    )
