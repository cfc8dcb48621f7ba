"""The whole step in low precision: clip, AdamW and a float32 average, of a model that computes in bfloat16.

What each provider keeps, in bytes per parameter, stands in its note: weights (masters included), gradients, state,
average. The peak of a step is the sum and the extra memory that the report shows beside it. Autocast keeps
gradients in float32. Its bfloat16 copies of weights, which live from forward to backward, are not counted.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import trainops

from .__main__ import main
from .bench_ema import lerp_foreach
from .bench_step import StepWork
from .peers import SETTINGS, Optimizer, on, optimi, peer
from .runner import Case, NotHere, Options, Provider, Step
from .saved import OURS
from .work import DECAY, STEPS, Model, Work, model_cases, moments_of, spread

# bfloat16 elements that the best possible implementation reads and writes: the gradient for the norm and for AdamW,
# weight and remainder and two moments both ways, and the average, which is two of them, both ways.
ELEMENTS = 1 + 1 + 4 + 4 + 4


# A moment in 8 bits is off by less than an eighth of itself, the root of a second one by a sixteenth: a step by less
# than a quarter. Nothing is stored before the first of the steps, which is exact.
OFF_BY_8_BITS = (STEPS - 1) / STEPS * ((1 + 1 / 8) / (1 - 1 / 16) - 1)


class LowPrecisionWork(StepWork):
    """Parameters in bfloat16, and the same in float32 for those who keep them so."""

    @cached_property
    def wide(self) -> Model:
        """A float32 model. Providers who work on it begin with the common start, too."""
        return Model([p.shape for p in self.params], self.device, torch.float32)

    def prepare(self, step: int) -> None:
        """Gradients in the type of the parameters."""
        super().prepare(step)
        if "wide" in self.__dict__:
            for param in self.wide.weights:
                param.grad = torch.empty_like(param) if param.grad is None else param.grad
            spread(self.tiles[step].float(), (p.grad for p in self.wide.weights if p.grad is not None))


def size(tensors: Iterable[Any]) -> int:
    """Bytes of all tensors, those that subclasses consist of among them."""
    total = 0
    for x in tensors:
        if hasattr(x, "__tensor_flatten__"):
            total += size(getattr(x, name) for name in x.__tensor_flatten__()[0])
        elif isinstance(x, Tensor):
            total += x.numel() * x.element_size()
    return total


def described(model: list[nn.Parameter], optimizer: Optimizer, averages: list[Tensor]) -> str:
    """What is kept after a step, in bytes per parameter."""
    weights = {id(p): p for p in [*model, *(p for group in optimizer.param_groups for p in group["params"])]}
    state = [(name, x) for of_param in optimizer.state.values() for name, x in of_param.items()]
    kept = {
        "weights": [*weights.values(), *(x for name, x in state if name == "master")],
        "gradients": [p.grad for p in weights.values()],
        "state": [x for name, x in state if name != "master"],
        "average": averages,
    }
    each = {name: size(tensors) / sum(p.numel() for p in model) for name, tensors in kept.items()}
    return " + ".join(f"{name} {x:.3g}" for name, x in each.items()) + f" = {sum(each.values()):.3g} B"


def provider(
    model: list[nn.Parameter], optimizer: Optimizer, averages: list[Tensor], step: Step, eight_bits: bool = False
) -> Provider:
    """A step of the model's parameters, and what is kept for it.

    ``eight_bits``: its state, whose tensors must not be exchanged.
    """

    def results() -> dict[str, list[Tensor]]:
        return {"params": [p.bfloat16() for p in model], "averages": [a.bfloat16() for a in averages]}

    def owned() -> dict[str, list[Tensor]]:
        made.note = described(model, optimizer, averages)
        return {"averages": averages, **({} if eight_bits else moments_of(optimizer))}

    made = Provider({"step": step}, results, owned, inexact=OFF_BY_8_BITS if eight_bits else 0.0)
    return made


@torch.no_grad()
def lerp_wide(averages: list[Tensor], params: list[Tensor]) -> None:
    """As `lerp_foreach`, of float32 averages of bfloat16 parameters, which that takes one by one."""
    torch._foreach_mul_(averages, DECAY)
    torch._foreach_add_(averages, params, alpha=1 - DECAY)


def composed(make: Callable[[Work], Optimizer], eight_bits: bool = False) -> Callable[[LowPrecisionWork], Provider]:
    """Another bfloat16 optimizer between PyTorch's clip and an average in float32."""

    def composition(work: LowPrecisionWork) -> Provider:
        optimizer, averages = make(work), [p.detach().float() for p in work.params]

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(work.params, work.max_norm, foreach=True)
            optimizer.step()
            lerp_wide(averages, work.params)

        return provider(work.params, optimizer, averages, step, eight_bits)

    return composition


def wide_params(work: LowPrecisionWork) -> list[nn.Parameter]:
    """Float32 parameters at the common start."""
    params = list(work.wide.weights)
    spread(work.start.float(), params)
    return params


def autocast(work: LowPrecisionWork) -> Provider:
    """What most people do: everything that is kept is float32."""
    params = wide_params(work)
    optimizer = torch.optim.AdamW(params, **SETTINGS, fused=True)
    averages = [p.detach().clone() for p in params]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, work.max_norm, foreach=True)
        optimizer.step()
        lerp_foreach(averages, params)

    return provider(params, optimizer, averages, step)


def masters(work: LowPrecisionWork) -> Provider:
    """The same with a bfloat16 model: gradients are copied to float32 masters, and these back to the model."""
    params = wide_params(work)
    optimizer = torch.optim.AdamW(params, **SETTINGS, fused=True)
    averages = [p.detach().clone() for p in params]
    for param in params:
        param.grad = torch.empty_like(param)

    @torch.no_grad()
    def step() -> None:
        torch._foreach_copy_([p.grad for p in params], [p.grad for p in work.params])
        torch.nn.utils.clip_grad_norm_(params, work.max_norm, foreach=True)
        optimizer.step()
        lerp_foreach(averages, params)
        torch._foreach_copy_(work.params, params)

    return provider(work.params, optimizer, averages, step)


def torchao(name: str, **settings: Any) -> Callable[[Work], Optimizer]:
    """torchao's, which rounds weights stochastically and compiles its step for each shape."""

    def make(work: Work) -> Optimizer:
        if not work.compiles:
            raise NotHere("is compiled, which quick runs and --no-compile leave out")
        return getattr(peer("torchao.optim"), name)(work.params, **SETTINGS, bf16_stochastic_round=True, **settings)

    return make


def flash(work: Work) -> Optimizer:
    """FlashOptim's: an 8-bit correction of the weights and 8-bit moments."""
    on(work, "cuda")
    return peer("flashoptim").FlashAdamW(work.params, **SETTINGS)


def ours(wide: bool = False, **settings: Any) -> Callable[[LowPrecisionWork], Provider]:
    """All in one call. The negative `update_after_step` leaves out the copy with which an EMA begins."""

    def make(work: LowPrecisionWork) -> Provider:
        params, model = (wide_params(work), work.wide) if wide else (work.params, work.model)
        ema = trainops.EMA(model, DECAY, update_after_step=-2, dtype=torch.float32)
        try:
            optimizer = trainops.AdamW(params, **SETTINGS, max_grad_norm=work.max_norm, ema=ema, **settings)
        except (TypeError, ValueError) as reason:
            raise NotHere(f"not in this build: {reason}") from reason
        eight_bits = settings.get("state_dtype") == "int8"
        return provider(params, optimizer, list(ema.module.parameters()), optimizer.step, eight_bits)

    return make


LowPrecisionWork.makers = {
    "torch float32, autocast": autocast,
    "torch, float32 masters": masters,
    "torchao AdamW, stochastic": composed(torchao("_AdamW")),
    "torchao AdamW8bit, stochastic": composed(torchao("AdamW8bit"), eight_bits=True),
    "optimi, Kahan": composed(optimi),
    "FlashOptim": composed(flash, eight_bits=True),
    "trainops float32": ours(wide=True),
    "trainops bfloat16": ours(),
    "trainops stochastic": ours(stochastic_rounding=True),
    "trainops split, 8-bit moments": ours(master="split", state_dtype="int8"),
    OURS: ours(master="split", state_dtype=torch.bfloat16),
}


def cases(options: Options) -> Iterator[Case]:
    """Transformers, whose parameters are bfloat16."""
    if options.dtypes and "bfloat16" not in options.dtypes:
        return
    models = options.models or (["ViT-Ti"] if options.quick else ["ViT-B", "GPT-2"])
    yield from model_cases(
        "low_precision", LowPrecisionWork, ELEMENTS, 40, options._replace(models=models, dtypes=["bfloat16"])
    )


def test_low_precision(measured) -> None:
    """Under pytest-benchmark."""


if __name__ == "__main__":
    sys.exit(main(["--ops", "low_precision", *sys.argv[1:]]))
