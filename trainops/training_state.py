"""What training changes, remembered and put back bit for bit.

It is put back into the tensors that are there: whoever else holds them, a CUDA graph, a scheduler or a wrapper
of the model, sees what was before.
"""

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

PutBack = Callable[[], Any]


def remembered(value: Any) -> PutBack:
    """Remember what tensors, dictionaries and lists hold, all the way down. What is returned puts it back.

    Parameters and other objects are only put back in their places.
    """
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return _elements(value)
    if isinstance(value, dict):
        held = {key: remembered(x) for key, x in value.items()}

        def fill() -> dict[Any, Any]:
            own = {key: put_back() for key, put_back in held.items()}
            value.clear()
            value.update(own)
            return value

        return fill
    if isinstance(value, list):
        items = [remembered(x) for x in value]

        def fill_list() -> list[Any]:
            value[:] = [put_back() for put_back in items]
            return value

        return fill_list
    if isinstance(value, tuple):
        parts = [remembered(x) for x in value]

        def fill_tuple() -> tuple[Any, ...]:
            for put_back in parts:
                put_back()
            return value

        return fill_tuple
    return _attributes(value) if isinstance(value, torch.optim.Optimizer) else lambda: value


def _elements(tensor: Tensor) -> PutBack:
    value = tensor.detach().clone()

    def put_back() -> Tensor:
        with torch.no_grad():
            tensor.detach().copy_(value)
        return tensor

    return put_back


@contextmanager
def restored(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any = None, batches: Any = None
) -> Iterator[None]:
    """Within it, anybody may train; afterwards, and after any error, everything is as it was.

    That is: parameters, buffers, extra state, gradients and modes of the model; state, groups and attributes of the
    optimizer, whose averages do not move meanwhile; the scaler; the state of the loader, where it has one, and of its
    generators; the random numbers of Python, NumPy and PyTorch.
    """
    with ExitStack() as stack:
        for put_back in _everything(model, optimizer, scaler, batches):
            stack.callback(put_back)
        yield


def _everything(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, batches: Any) -> Iterator[PutBack]:
    """What puts everything back; the last comes first."""
    yield _random_numbers(model)
    yield from (_generator(x) for x in _generators_of(batches))
    if hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict"):
        state = copy.deepcopy(batches.state_dict())
        yield lambda: batches.load_state_dict(state)
    if scaler is not None:
        yield _attributes(scaler)
    yield from _averages_stand_still(optimizer)
    yield _attributes(optimizer)
    params = dict.fromkeys(chain(model.parameters(), *(group["params"] for group in optimizer.param_groups)))
    yield from map(_weight, params)
    yield from map(_module, model.modules())


def _weight(param: Tensor) -> PutBack:
    value, requires_grad, grad = _elements(param), param.requires_grad, remembered(param.grad)

    def put_back() -> None:
        value()
        param.requires_grad_(requires_grad)
        param.grad = grad()

    return put_back


def _module(module: nn.Module) -> PutBack:
    training, held = module.training, [remembered(module._parameters), remembered(module._buffers)]
    has_extra_state = type(module).get_extra_state is not nn.Module.get_extra_state
    extra_state = copy.deepcopy(module.get_extra_state()) if has_extra_state else None

    def put_back() -> None:
        module.training = training
        for fill in held:
            fill()
        if has_extra_state:
            module.set_extra_state(extra_state)

    return put_back


def _attributes(x: Any) -> PutBack:
    """All attributes: of an optimizer, its state and its groups, too, and an optimizer inside of it."""
    held = remembered(vars(x))

    def put_back() -> Any:
        held()
        return x

    return put_back


def _averages_stand_still(optimizer: Any) -> Iterator[PutBack]:
    """Averages of a trainops optimizer do not move, and do not see that the weights have changed meanwhile."""
    averages = getattr(optimizer, "_averages", ())
    if not averages:
        return
    yield from [ema.overlook_writes() for ema in averages]
    optimizer._averages = ()
    yield lambda: setattr(optimizer, "_averages", averages)


def _random_numbers(model: nn.Module) -> PutBack:
    devices = {x.device for x in chain(model.parameters(), model.buffers())}
    cuda = {x.index for x in devices if x.type == "cuda"}
    states = {index: torch.cuda.get_rng_state(index) for index in cuda}
    mps = torch.mps.get_rng_state() if any(x.type == "mps" for x in devices) else None
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()

    def put_back() -> None:
        random.setstate(python)
        torch.set_rng_state(cpu)
        for index, state in states.items():
            torch.cuda.set_rng_state(state, index)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        if numpy is not None:
            numpy.random.set_state(of_numpy)

    return put_back


def _generators_of(batches: Any) -> Iterable[torch.Generator]:
    """Those of a DataLoader and its samplers."""
    samplers = [getattr(batches, name, None) for name in ("sampler", "batch_sampler")]
    samplers.append(getattr(samplers[1], "sampler", None))
    found = [getattr(x, "generator", None) for x in (batches, *samplers)]
    return dict.fromkeys(x for x in found if isinstance(x, torch.Generator))


def _generator(generator: torch.Generator) -> PutBack:
    state = generator.get_state()
    return lambda: generator.set_state(state)
