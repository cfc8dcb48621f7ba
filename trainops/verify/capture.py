"""Ops in CUDA graphs: what a replay leaves must have the bits of the same calls without a graph."""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..clip_grad import clip_grad_norm_, clip_grad_value_
from ..ema import EMA
from ..seeds import OWN_STATE
from ..spike_guard import SpikeGuard
from ..statistics import tensor_stats
from .compare import Compared, Place, randn, tensors
from .step import DECAY, Step, grad_of, params_of

WARM_UPS, REPLAYS = 2, 3


class Work(NamedTuple):
    """Calls that a graph can hold: the tensors that they read, new ones each time, and those that they leave."""

    call: Callable[[], object]
    inputs: list[Tensor]
    results: Callable[[], dict[str, Tensor]]


Maker = Callable[[Place, torch.Generator], Work]


OF_PYTORCH = ("reference", "foreach")  # backends that are made of PyTorch's operations


def is_captured(place: Place) -> bool:
    """Whether graphs are promised to hold what the backend does: kernels of its own, on a GPU.

    Some of PyTorch's operations wait for the device. Without PyTorch's own allocator, as under compute-sanitizer, no
    graph can hold what is allocated in it.
    """
    allocates = not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")
    return place.device.type == "cuda" and allocates and place.backend not in OF_PYTORCH


def graph_of(call: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """The call in a graph, after the warm-up on another stream that PyTorch's documentation asks for."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        call()
    return graph


def check(make: Maker) -> Callable[[Place, torch.Generator], Iterator[Compared]]:
    """The check of one kind of work."""

    def captured(place: Place, generator: torch.Generator) -> Iterator[Compared]:
        seed = generator.get_state()
        graphed, plain = (make(place, torch.Generator().set_state(seed)) for _ in range(2))
        feed((graphed, plain), place, generator, 0)
        graph = graph_of(graphed.call, place.device)
        for _ in range(WARM_UPS):
            plain.call()
        for replay in range(1, REPLAYS + 1):
            feed((graphed, plain), place, generator, replay)
            graph.replay()
            plain.call()
            theirs = plain.results()
            for what, got in graphed.results().items():
                yield Compared(f"{what} after replay {replay}", got, theirs[what], None)

    return captured


def feed(works: tuple[Work, ...], place: Place, generator: torch.Generator, replay: int) -> None:
    """Write new inputs, the same ones for all. Those of the second replay are not finite: a step skips them."""
    for inputs in zip(*(work.inputs for work in works), strict=True):
        value = randn(place, generator, tuple(inputs[0].shape))
        if replay == 2 and value.ndim == 4:
            value[-1, -1] = float("nan")
        for x in inputs:
            x.copy_(value)


def step(place: Place, generator: torch.Generator) -> Work:
    """Clip, AdamW and an average, unless a gradient is not finite."""
    own = Step(place, generator, max_grad_norm=0.5, skip_nonfinite=True, capturable=True)

    def results() -> dict[str, Tensor]:
        left = {what: got for what, got, _ in own.results()} | {"skipped_steps": own.ours.skipped_steps}
        return left if own.ours.grad_norm is None else left | {"grad_norm": own.ours.grad_norm}

    return Work(own.ours.step, [grad_of(param) for param in params_of(own.ours)], results)


def guarded(place: Place, generator: torch.Generator) -> Work:
    """A step that a guard judges."""
    own = Step(place, generator, spike_guard=SpikeGuard(6.0, warmup=2), capturable=True)

    def results() -> dict[str, Tensor]:
        learned = own.ours.param_groups[0][OWN_STATE]["spike_guard"]
        return {what: got for what, got, _ in own.results()} | {"what the guard has learned": learned}

    return Work(own.ours.step, [grad_of(param) for param in params_of(own.ours)], results)


def eight_bit_state(place: Place, generator: torch.Generator) -> Work:
    """A step with 8-bit state; bfloat16 is rounded stochastically. Each replay has random bits of its own."""
    is_random = place.dtype == torch.bfloat16
    own = Step(place, generator, state_dtype="int8", stochastic_rounding=is_random, capturable=True)
    grads = [grad_of(param) for param in params_of(own.ours)]
    return Work(own.ours.step, grads, lambda: {what: got for what, got, _ in own.results()})


def statistics(place: Place, generator: torch.Generator) -> Work:
    """Statistics of tensors, with histograms."""
    inputs, found = list(tensors(place, generator).values()), {}

    def call() -> None:
        stats = tensor_stats(inputs, True, backend=place.backend)
        found["rows"] = stats.rows
        if stats.histogram is not None:
            found["histogram"] = stats.histogram

    return Work(call, inputs, lambda: dict(found))


def clip(place: Place, generator: torch.Generator) -> Work:
    """Clipping by the norm, and then by value."""
    params = [nn.Parameter(x) for x in tensors(place, generator).values()]
    for param in params:
        param.grad = torch.zeros_like(param)

    def call() -> None:
        clip_grad_norm_(params, 10.0, backend=place.backend)
        clip_grad_value_(params, 0.02, backend=place.backend)

    grads = [grad_of(param) for param in params]
    return Work(call, grads, lambda: {f"gradient {i}": grad for i, grad in enumerate(grads)})


def ema(place: Place, generator: torch.Generator) -> Work:
    """An average of its own."""
    model = nn.Module()
    model.weights = nn.ParameterList(tensors(place, generator).values())
    average = EMA(model, DECAY, update_after_step=-2, backend=place.backend)
    averages = list(average.module.parameters())
    return Work(average.update, list(model.weights), lambda: {f"average {i}": x for i, x in enumerate(averages)})


MAKERS = {"step": step, "guarded step": guarded, "8-bit state": eight_bit_state, "clip": clip, "EMA": ema}
MAKERS["statistics"] = statistics
CAPTURES = {f"{name} in a CUDA graph": check(make) for name, make in MAKERS.items()}
