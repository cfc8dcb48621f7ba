"""The checks: each runs an op on awkward tensors, and yields its results beside what they should be."""

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from .. import reference
from ..clip_grad import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from ..ema import EMA
from ..reference_statistics import M2, MEAN, rows_of
from ..sgd import SGD
from ..statistics import tensor_stats
from .compare import Compared, Place, double, layouts, randn, rounded, tensors
from .step import DECAY, MASTERS, clipped_step, grad_of, guarded_step, other_rules, step, step_with_masters
from .stochastic import eight_bit_state, stochastic_rounding

SAMPLES: tuple[tuple[int, ...], ...] = ((4, 1), (5, 7), (3, 33, 31), (2, 3, 5, 7), (6, 257, 64))  # for DropPath

Check = Callable[[Place, torch.Generator], Iterator[Compared]]


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
        yield rounded(f"clipped by norm, {name}", grad_of(param), double(x) * (0.5 / (2.0 + 1e-6)))
    clip_grad_value_(params, 0.1, backend=place.backend)
    for (name, x), param in zip(grads.items(), params, strict=True):
        clipped = (x * (0.5 / (2.0 + 1e-6))).clamp(-0.1, 0.1)
        yield rounded(f"clipped by value, {name}", grad_of(param), double(clipped), terms=double(x))


def statistics(place: Place, generator: torch.Generator) -> Iterator[Compared]:
    """``tensor_stats`` with histograms, also where an element is not finite."""
    found = tensors(place, generator)
    infinite = randn(place, generator, (5000,))
    infinite[7], infinite[4500] = float("inf"), float("nan")
    found["not finite"] = infinite
    stats = tensor_stats(list(found.values()), True, backend=place.backend)
    for i, (name, x) in enumerate(found.items()):
        exact = double(x)
        row, finite = rows_of([exact], True), exact[exact.isfinite()]
        allowed = row[0][0].abs() * 2.0**-19  # counts, extremes and sums; below: what means and squares are made of
        magnitude = finite.abs().mean() if finite.numel() else torch.zeros(())
        allowed[MEAN] = magnitude * 2.0**-19
        allowed[M2] = (finite.square().sum() + row[0][0, M2]) * 2.0**-19
        yield Compared(f"statistics of {name}", stats.rows[i], row[0][0], allowed)
        if stats.histogram is not None and row[1] is not None:
            yield Compared(f"histogram of {name}", stats.histogram[i], row[1][0], None)


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


def several_averages(place: Place, generator: torch.Generator) -> Iterator[Compared]:
    """Two averages in the step of an optimizer, with buffers that are averaged and buffers that are copied."""
    found = {kind: tensors(place, generator) for kind in ("weight", "buffer", "grad")}
    model = nn.Module()
    model.weights = nn.ParameterList(found["weight"].values())
    for i, x in enumerate(found["buffer"].values()):
        model.register_buffer(f"mean{i}", x)
        model.register_buffer(f"count{i}", torch.arange(x.numel(), device=place.device).view(x.shape))
    dtypes = (place.dtype, torch.promote_types(place.dtype, torch.float32))
    averages = [
        EMA(model, decay, dtype=dtype, update_after_step=-2, backend=place.backend)  # move from the first step on
        for decay, dtype in zip((DECAY, 0.5), dtypes, strict=True)
    ]
    for average in averages:
        for x in average.module.state_dict().values():
            x.mul_(0.5) if x.is_floating_point() else x.neg_()
    before = [{name: double(x) for name, x in average.module.state_dict().items()} for average in averages]
    optimizer = SGD(model.weights, lr=0.01, ema=averages, backend=place.backend)
    optimizer.init_state()
    for param, grad in zip(model.weights, found["grad"].values(), strict=True):
        param.grad = grad
    optimizer.step()
    for average, decay, starts in zip(averages, (DECAY, 0.5), before, strict=True):
        for name, x in average.module.state_dict().items():
            new, old = double(model.state_dict()[name]), starts[name]
            if x.is_floating_point():
                yield rounded(f"average {decay} of {name}", x, old + (1 - decay) * (new - old), terms=new)
            else:
                yield Compared(f"copy of {name} in average {decay}", x, new, None)


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
    "statistics": statistics,
    "AdamW and average": step,
    "clipping and skipping in the step": clipped_step,
    "a guard against spikes": guarded_step,
    "Adam and SGD": other_rules,
    "a step with masters": step_with_masters,
    "8-bit state": eight_bit_state,
    "stochastic rounding": stochastic_rounding,
    "EMA.update": ema,
    "several averages and buffers": several_averages,
    "DropPath": drop_path,
}


# The types of numbers for which an op is there, if not all.
OF_TYPES: dict[str, Collection[torch.dtype]] = {
    "a step with masters": MASTERS,
    "8-bit state": (torch.float32, torch.bfloat16, torch.float16),
    "8-bit state in a CUDA graph": (torch.float32, torch.bfloat16, torch.float16),
    "stochastic rounding": (torch.bfloat16,),
}


def serves(op: str, place: Place) -> bool:
    """Whether an op is there for numbers of that type."""
    return place.dtype in OF_TYPES.get(op, (place.dtype,))
