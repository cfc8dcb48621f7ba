"""The whole tail of a step: clip by the norm, AdamW, average."""

import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

import trainops

from .__main__ import main
from .bench_ema import lerp_foreach, lerp_loop
from .peers import ADAMW, SETTINGS, Optimizer, compiled_adamw, on, peer, torch_adamw
from .runner import Case, NotHere, Options, Provider, Step
from .saved import OURS
from .work import (
    BETAS,
    DECAY,
    EPS,
    LR,
    STEPS,
    WEIGHT_DECAY,
    Expected,
    Moments,
    Work,
    adamw_truth,
    clip_coefficient,
    compilable,
    expect,
    model_cases,
    moments_of,
    sweep_cases,
)

# Norm: read the gradient. AdamW: read the gradient, read and write the parameter and two moments. Average: read and
# write it; the parameter is in registers.
ELEMENTS = 1 + 7 + 2


def provider(work: Work, optimizer: Optimizer, averages: list[Tensor], step: Step) -> Provider:
    """One step, and what it moves."""
    return Provider(
        {"step": step},
        lambda: {"params": work.params, "averages": averages},
        lambda: {**moments_of(optimizer), "averages": averages},
    )


def composed(make: Callable[[Work], Optimizer], loop: bool = False) -> Callable[[Work], Provider]:
    """An optimizer between PyTorch's multi-tensor clip and lerp, or between its loops."""
    lerp = lerp_loop if loop else lerp_foreach

    def composition(work: Work) -> Provider:
        optimizer, averages = make(work), [p.detach().clone() for p in work.params]

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(work.params, work.max_norm, foreach=not loop)
            optimizer.step()
            lerp(averages, work.params)

        return provider(work, optimizer, averages, step)

    return composition


def grad_scaled(make: Callable[[Work], Optimizer]) -> Callable[[Work], Provider]:
    """PyTorch's best, undocumented: its fused steps divide by the loss scale of a GradScaler, which clips here."""

    def composition(work: Work) -> Provider:
        optimizer: Any = make(work)
        averages = [p.detach().clone() for p in work.params]
        optimizer.found_inf = torch.zeros((), device=work.device)

        def step() -> None:
            norm = torch.nn.utils.get_total_norm(work.grads(), foreach=True)
            optimizer.grad_scale = ((norm + 1e-6) / work.max_norm).clamp(min=1.0).float()
            optimizer.step()
            lerp_foreach(averages, work.params)

        return provider(work, optimizer, averages, step)

    return composition


def compiled(work: Work) -> Provider:
    """The multi-tensor composition in one function, which the compiler takes apart at the optimizer's step."""
    compile_ = compilable(work)
    composition = composed(compiled_adamw)(work)
    return Provider({"step": compile_(composition.steps["step"])}, composition.results, composition.owned)


def apex_swa(work: Work) -> Provider:
    """Apex's AdamW with an average, made for OpenFold: it also writes a copy of the parameters to compute with.

    It keeps addresses: its tensors are not shared.
    """
    on(work, "cuda")
    if work.dtype != torch.float32:
        raise NotHere("keeps parameters and moments in float32")
    module = peer("apex.contrib.openfold_triton.fused_adam_swa")
    averages = [torch.nn.Parameter(p.detach().clone(), requires_grad=False) for p in work.params]
    optimizer = module.FusedAdamSWA(
        work.params,
        work.params,
        averages,
        DECAY,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        adam_math_mode=module.AdamMathType.ApexAdamW,
        set_grad_none=False,
    )
    optimizer.swa_param_groups[0]["n_averaged"] = 1  # the first average would be a copy

    def step() -> None:
        norm = torch.nn.utils.get_total_norm(work.grads(), foreach=True)
        optimizer.step(grad_clip_scale=(work.max_norm / (norm + 1e-6)).clamp(max=1.0))

    return Provider({"step": step}, lambda: {"params": work.params, "averages": averages})


def fused(make: Callable[..., Optimizer], **settings: Any) -> Callable[[Work], Provider]:
    """All in one call. The negative `update_after_step` leaves out the copy with which an EMA begins."""

    def ours(work: Work) -> Provider:
        ema = trainops.EMA(work.model, DECAY, update_after_step=-2)
        optimizer = make(work.params, **settings, max_grad_norm=work.max_norm, ema=ema)
        return provider(work, optimizer, list(ema.module.parameters()), optimizer.step)

    return ours


def of_torch(cls: Callable[..., Optimizer], **settings: Any) -> dict[str, Callable[[Work], Provider]]:
    """PyTorch's ways to take the step of a class, with clipping and an average."""
    ways: dict[str, dict[str, bool]] = {
        "torch loop": {"foreach": False},
        "torch foreach": {"foreach": True},
        "torch fused": {"fused": True},
    }

    def making(flags: dict[str, bool]) -> Callable[[Work], Optimizer]:
        return lambda work: cls(work.params, **settings, **flags)

    found = {name: composed(making(flags), loop=name == "torch loop") for name, flags in ways.items()}
    return found | {"torch fused, grad_scale": grad_scaled(making(ways["torch fused"]))}


class StepWork(Work):
    """New gradients before each step."""

    makers: ClassVar = {
        **{name: composed(make, loop=name == "torch loop") for name, make in ADAMW.items()},
        "torch fused, grad_scale": grad_scaled(lambda work: torch_adamw(work, fused=True)),
        "torch compiled": compiled,
        "Apex FusedAdamSWA": apex_swa,
        OURS: fused(trainops.AdamW, **SETTINGS),
    }

    clips = True
    formula = staticmethod(adamw_truth)

    def truth(self) -> dict[str, Expected]:
        """The norm of each step's gradients, and the formulas on the tile."""
        start = self.start.double()
        param = start.clone()
        average, moments = param.clone(), Moments(torch.zeros_like(param), torch.zeros_like(param))
        for step in range(STEPS):
            self.prepare(step)
            coefficient = clip_coefficient(self.grads(), self.max_norm)[1]
            self.formula(param, coefficient * self.tiles[step].double(), moments, step + 1)
            average.lerp_(param, 1 - DECAY)
        return {"params": expect(param, start), "averages": expect(average, start)}


def cases(options: Options) -> Iterator[Case]:
    """Models in both dtypes, and lists of tensors to sweep over."""
    yield from model_cases("step", StepWork, ELEMENTS, 22, options)
    if options.models is None and (options.dtypes is None or "float32" in options.dtypes):
        yield from sweep_cases("step", StepWork, ELEMENTS, 22, options)


def test_step(measured) -> None:
    """Under pytest-benchmark."""


if __name__ == "__main__":
    sys.exit(main(["--ops", "step", *sys.argv[1:]]))
