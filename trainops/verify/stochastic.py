"""Steps whose results are rounded stochastically: 8-bit state, and parameters and averages in bfloat16.

Random bits depend on no backend. Where arithmetic does not either, results have the bits of the specification. So
products are exact here, those of powers of two, and squares of bfloat16: some compilers join them with a sum.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..adamw import AdamW
from ..ema import EMA
from ..sgd import SGD
from .compare import Compared, Place, tensors
from .step import Optimizer, Step, averages_of, grad_of, params_of

STEPS = 2


def trained(place: Place, generator: torch.Generator, cls: type[Optimizer], **options: Any) -> Iterator[Compared]:
    """What steps of an optimizer with an average leave, beside those of ``reference`` on the same numbers."""
    weights, grads = tensors(place, generator), tensors(place, generator)
    optimizers = []
    for backend, device in ((place.backend, place.device), ("reference", torch.device("cpu"))):
        model = nn.Module()
        model.weights = nn.ParameterList(x.to(device, copy=True) for x in weights.values())
        how = {"stochastic_rounding": True} if options.get("stochastic_rounding") else {"dtype": torch.float32}
        ema = EMA(model, 0.5, update_after_step=-2, backend=backend, **how)
        optimizers.append(cls(model.parameters(), seed=3, ema=ema, backend=backend, **options))
        for param, grad in zip(model.weights, grads.values(), strict=True):
            param.grad = grad.bfloat16().to(grad).to(device)
        for _ in range(STEPS):
            optimizers[-1].step()
    ours, theirs = optimizers
    rows = zip(weights, *(zip(params_of(x), averages_of(x), strict=True) for x in optimizers), strict=True)
    for name, (param, average), (exact, its) in rows:
        if cls is SGD:  # the divisions and roots of others may differ in the last bit
            yield Compared(f"parameter {name}", param, exact.detach(), None)
            yield Compared(f"average {name}", average, its.detach(), None)
        for key, codes in ours.state[param].items():
            if key.endswith("_codes"):
                yield Compared(f"{key} {name}", codes, theirs.state[exact][key], None)


def eight_bit_state(place: Place, generator: torch.Generator) -> Iterator[Compared]:
    """Moments as codes: within a code of the exact ones, and the very codes of the specification."""
    coded: dict[str, Any] = {"state_dtype": "int8", "eps": 1e-3}
    yield from Step(place, generator, weight_decay=0.1, amsgrad=True, **coded).taken()
    bad = Step(place, generator, skip_nonfinite=True, **coded)
    grad_of(params_of(bad.ours)[-1])[-1] = float("nan")
    yield from bad.skipped()
    yield from trained(place, generator, SGD, lr=2.0**-6, momentum=0.5, state_dtype="int8")
    yield from trained(place, generator, AdamW, betas=(0.9, 0.5), state_dtype=(torch.float32, "int8"))


def stochastic_rounding(place: Place, generator: torch.Generator) -> Iterator[Compared]:
    """Parameters and averages in bfloat16."""
    yield from trained(place, generator, SGD, lr=2.0**-6, stochastic_rounding=True)
    yield from trained(place, generator, SGD, lr=2.0**-6, momentum=0.5, state_dtype="int8", stochastic_rounding=True)
