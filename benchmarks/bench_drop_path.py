"""DropPath with its residual add, and stochastic depth around a whole branch, forward and backward.

timm's own function is what `timm` stands for where it is installed, else its formula (Apache License 2.0, Ross
Wightman): `x * x.new_empty((batch, 1, ...)).bernoulli_(keep_prob).div_(keep_prob)`.
"""

import copy
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import trainops

from .__main__ import main
from .peers import timm_module
from .runner import Case, NotHere, Options, Provider
from .saved import OURS
from .work import compilable, compiled_note

DROP_PROB, RATES = 0.1, (0.1, 0.2, 0.4)
SHAPES = {"ViT-B's": (64, 197, 768), "small": (64, 9, 64)}
BLOCK = (32, 64, 768)

# The error allowed, as a share of the largest value. Sums over all tokens lose most, where they are taken in one go.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
BLOCK_ROOM = 2.0  # times that, for matrix products in bfloat16


def timm_drop_path() -> tuple[str, Callable[..., Tensor]]:
    """The function, and what to call it."""

    def formula(x: Tensor, drop_prob: float, training: bool) -> Tensor:
        keep_prob = 1 - drop_prob
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob).div_(keep_prob)

    try:
        return "timm", timm_module("layers/drop.py").drop_path
    except NotHere:
        return "timm's formula", formula


def error(tensors: list[Tensor], truths: list[Tensor]) -> float:
    """The largest error, as a multiple of what is allowed."""
    errors = [
        (x.double() - true).abs().max() / (TOLERANCE[x.dtype] * true.abs().max())
        for x, true in zip(tensors, truths, strict=True)
    ]
    return float(torch.stack(errors).max())


class Seeds:
    """A new seed for each call, of which every provider has the same: they drop as many samples."""

    def __init__(self) -> None:
        self.last = 0

    def __call__(self) -> None:
        """Set the next one."""
        self.last += 1
        torch.manual_seed(self.last)


def kept_samples(out: Tensor, residual: Tensor) -> Tensor:
    """Which samples of a result are not their residual."""
    return (out != residual).flatten(1).any(1).double().view(-1, *(1,) * (out.ndim - 1))


def check_likely(kept: int, batch: int, rate: float) -> None:
    """Raise if a fair coin would hardly ever keep so many samples."""
    expected = batch * (1 - rate)
    if abs(kept - expected) > 6 * (expected * rate) ** 0.5:
        raise RuntimeError(f"{kept} of {batch} samples were kept at a rate of {rate}")


def drawn_mask(x: Tensor, rate: float) -> Tensor:
    """The mask that timm draws for a tensor from the first seed, in float64."""
    torch.manual_seed(0)
    return x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - rate).double() / (1 - rate)


class AddBench:
    """A residual and a branch, of which samples are dropped. All but compilers draw the same masks from one seed."""

    def __init__(self, shape: tuple[int, ...], layer_scale: bool, dtype: torch.dtype, options: Options) -> None:
        generator = torch.Generator().manual_seed(0)
        made = (torch.randn(shape, generator=generator).to(options.device, dtype) for _ in range(3))
        self.residual, self.branch, self.grad = made
        self.scale = torch.rand(shape[-1], generator=generator).to(options.device, dtype) if layer_scale else None
        self.inputs = [x.requires_grad_() for x in (self.residual, self.branch, self.scale) if x is not None]
        self.params, self.device, self.dtype, self.compiles = self.inputs, options.device, dtype, options.compiles
        self.timm, self.drop_path = timm_drop_path()

    def admit(self, name: str) -> tuple[Provider, float]:
        """The sum and the gradients of everything that goes into it, against float64."""
        add = {self.timm: self.add, OURS: self.ours}.get(name) or compilable(self)(self.add)
        out: list[Tensor] = []

        def step() -> None:
            result = add()
            out[:] = [result, *torch.autograd.grad(result, self.inputs, self.grad)]

        torch.manual_seed(0)
        step()
        mask = drawn_mask(self.branch, DROP_PROB) if name in (self.timm, OURS) else self.found_mask(out[0].detach())
        found = error([x.detach() for x in out], self.truth(mask))
        return Provider({"forward and backward": step}, before=Seeds(), note=compiled_note(name)), found

    def add(self) -> Tensor:
        """With timm's function, as its models have it."""
        scaled = self.branch if self.scale is None else self.branch * self.scale
        return self.residual + self.drop_path(scaled, DROP_PROB, True)

    def ours(self) -> Tensor:
        """In one pass."""
        return trainops.drop_path_add(self.residual, self.branch, DROP_PROB, True, layer_scale=self.scale)

    def found_mask(self, out: Tensor) -> Tensor:
        """Of somebody with random numbers of their own."""
        kept = kept_samples(out, self.residual)
        check_likely(int(kept.sum()), len(out), DROP_PROB)
        return kept / (1 - DROP_PROB)

    def truth(self, mask: Tensor) -> list[Tensor]:
        """In float64, with this mask."""
        inputs = [x.detach().double().requires_grad_() for x in self.inputs]
        scaled = inputs[1] if self.scale is None else inputs[1] * inputs[2]
        out = inputs[0] + scaled * mask
        return [out.detach(), *torch.autograd.grad(out, inputs, self.grad.double())]


class BlockBench:
    """A transformer's MLP block under stochastic depth: what is dropped need not be computed."""

    def __init__(self, shape: tuple[int, ...], rate: float, mode: str, dtype: torch.dtype, options: Options) -> None:
        torch.manual_seed(0)
        dim = shape[-1]
        layers = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.branch = nn.Sequential(*layers).to(options.device, dtype)
        self.x = torch.randn(shape).to(options.device, dtype).requires_grad_()
        self.grad = torch.randn(shape).to(options.device, dtype)
        self.rate, self.mode = rate, mode
        self.drop_path = timm_drop_path()[1]

    def admit(self, name: str) -> tuple[Provider, float]:
        """The sum, and the gradients of the input and of all weights."""
        forward = self.ours if name == OURS else self.add
        inputs = [self.x, *self.branch.parameters()]
        out: list[Tensor] = []

        def step() -> None:
            result = forward()
            out[:] = [result, *torch.autograd.grad(result, inputs, self.grad)]

        torch.manual_seed(0)
        step()
        kept = self.kept(out[0].detach(), name)
        found = error([x.detach() for x in out], self.truth(kept)) / BLOCK_ROOM
        return Provider({"forward and backward": step}, before=Seeds()), found

    def add(self) -> Tensor:
        """The branch of all samples, some of which are then multiplied by zero."""
        return self.x + self.drop_path(self.branch(self.x), self.rate, True)

    def ours(self) -> Tensor:
        """The branch of those that are kept."""
        return trainops.stochastic_depth(self.x, self.branch, self.rate, True, mode=self.mode)

    def kept(self, out: Tensor, name: str) -> Tensor:
        """The factor of each sample's branch: as timm draws it, or for a fixed number of kept samples, as found."""
        batch = len(out)
        if name == OURS and self.mode == "fixed":
            kept = kept_samples(out, self.x)
            if kept.sum() != round(batch * (1 - self.rate)):
                raise RuntimeError(f"{int(kept.sum())} of {batch} samples were kept at a rate of {self.rate}")
            return kept * batch / kept.sum()
        return drawn_mask(out, self.rate)

    def truth(self, factors: Tensor) -> list[Tensor]:
        """In float64, with these factors."""
        branch, x = copy.deepcopy(self.branch).double(), self.x.detach().double().requires_grad_()
        out = x + factors * branch(x)
        return [out.detach(), *torch.autograd.grad(out, [x, *branch.parameters()], self.grad.double())]


def add_cases(options: Options) -> Iterator[Case]:
    """The residual add: a large tensor and a small one, with and without layer scale."""
    timm = timm_drop_path()[0]
    for label, shape in SHAPES.items():
        for dtype in options.dtypes or ["float32", "bfloat16"]:
            for layer_scale in (False, True):
                torch_dtype, numel = getattr(torch, dtype), torch.Size(shape).numel()
                name = f"add, {label} {'x'.join(map(str, shape))}" + ", layer scale" * layer_scale
                # Residual and result, the gradient of the branch; of kept samples the branch and its gradient, and
                # for the gradient of layer scale the branch again.
                accesses = 3 + (1 - DROP_PROB) * (3 if layer_scale else 2)
                yield Case(
                    "drop_path",
                    name,
                    [timm, f"{timm}, compiled", OURS],
                    lambda shape=shape, scaled=layer_scale, dtype=torch_dtype: AddBench(
                        shape, scaled, dtype, options
                    ),
                    group="add",
                    dtype=dtype,
                    tensors=1,
                    numel=numel,
                    bytes=round(accesses * torch_dtype.itemsize * numel) if numel > 2**20 else None,
                    need=20 * torch_dtype.itemsize * numel + 8 * 10 * numel,
                    cold=False,
                    calls=1 if numel > 2**20 else 10,
                )


def depth_cases(options: Options) -> Iterator[Case]:
    """The whole branch at several rates, with as many samples kept as expected and with a coin for each."""
    for dtype in options.dtypes or ["float32", "bfloat16"]:
        for rate in RATES[1:2] if options.quick else RATES:
            for mode in ("fixed",) if options.quick else ("fixed", "bernoulli"):
                torch_dtype = getattr(torch, dtype)
                yield Case(
                    "drop_path",
                    f"MLP block, rate {rate}, {mode}",
                    [timm_drop_path()[0], OURS],
                    lambda rate=rate, mode=mode, dtype=torch_dtype: BlockBench(BLOCK, rate, mode, dtype, options),
                    group="depth",
                    dtype=dtype,
                    numel=torch.Size(BLOCK).numel(),
                    need=2**30,
                    cold=False,
                )


def cases(options: Options) -> Iterator[Case]:
    """Both, unless models were asked for."""
    if options.models is None:
        yield from add_cases(options)
        yield from depth_cases(options)


def test_drop_path(measured) -> None:
    """Under pytest-benchmark."""


if __name__ == "__main__":
    sys.exit(main(["--ops", "drop_path", *sys.argv[1:]]))
