"""Steps with 8-bit state that take every path of the CUDA kernels."""

import torch
from targets import over
from torch import nn

import trainops

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = ((), (0,), (7,), (32,), (33, 31), (4096 + 45,), (2, 4096))  # in packs, one by one, and both

# Rule, dtype, dtype of the average, settings.
CASES = {
    "AdamW": (trainops.AdamW, FLOAT32, FLOAT32, {"amsgrad": True}),
    "AdamW split": (trainops.AdamW, BFLOAT16, FLOAT32, {"master": "split"}),
    "AdamW rounded": (trainops.AdamW, BFLOAT16, BFLOAT16, {"stochastic_rounding": True, "amsgrad": True}),
    "AdamW float16": (trainops.AdamW, FLOAT16, FLOAT16, {"master": "float32", "state_dtype": ("int8", BFLOAT16)}),
    "AdamW one by one": (trainops.AdamW, FLOAT32, FLOAT64, {"state_dtype": (BFLOAT16, "int8")}),
    "Adam": (trainops.Adam, BFLOAT16, BFLOAT16, {"weight_decay": 0.1}),
    "SGD": (trainops.SGD, FLOAT32, None, {"momentum": 0.9, "nesterov": True}),
    "SGD split": (trainops.SGD, BFLOAT16, FLOAT32, {"momentum": 0.9, "master": "split"}),
}
over_cases = over("case", CASES)


def gradients(shape, dtype, seed, are_finite):
    """Of very different size, with zeros and numbers below the smallest code, infinities and NaN."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    its = x.view(-1)
    its[1::5] = 0
    its[2::7] *= 1e-5
    its[96:128] = 0
    if len(its) > 300:
        its[260] = 1e-30
    if len(its) > 300 and seed % 2 and not are_finite:
        its[200], its[210], its[220] = torch.inf, torch.nan, -torch.inf  # in packs of their own
    return x.to(dtype)


def take_steps(backend, device, case, place=lambda x, role: x.clone(), steps=3, are_finite=False, shapes=SHAPES):
    """Every tensor that steps change: by role, those of each parameter. ``place`` puts them into memory."""
    cls, dtype, average, options = case
    options = {"lr": 0.1, "state_dtype": "int8", "seed": 7, "backend": backend, **options}
    model = nn.Module()
    seeds = range(len(shapes))
    tensors = [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)]
    model.params = nn.ParameterList(nn.Parameter(place(x.to(device, dtype), 0)) for x in tensors)
    ema = trainops.EMA(model, 0.9, dtype=average, backend=backend) if average is not None else None
    optimizer = cls(model.parameters(), ema=ema, **options)
    optimizer.init_state()
    for p in model.params:
        its = optimizer.state[p]
        its |= {name: place(x, role) for role, (name, x) in enumerate(its.items(), start=2) if name != "step"}
    averages = list(ema.module.params) if ema is not None else []
    for x in averages:
        x.data = place(x.data, 6)
    for step in range(steps):
        for p, seed in zip(model.params, seeds, strict=True):
            p.grad = place(gradients(p.shape, dtype, seed + step, are_finite).to(device), 1)
        before = [x.detach().clone() for p in model.params if p.numel() for x in optimizer.state[p].values()]
        optimizer.step()
        after = [x for p in model.params if p.numel() for x in optimizer.state[p].values()]
        assert not all(map(torch.equal, before, after))
    states = [x for p in model.params for x in optimizer.state[p].values()]
    return [x.detach() for x in (*model.params, *states, *averages)]


def every_step(device, dtype, place):
    """What the CUDA kernels make of finite gradients of a type."""
    cases = [case for case in CASES.values() if case[1] == dtype]
    few = ((7,), (33, 31), (4096 + 45,))
    steps = [take_steps("cuda", device, case, place, steps=2, are_finite=True, shapes=few) for case in cases]
    return [x for its in steps for x in its]
