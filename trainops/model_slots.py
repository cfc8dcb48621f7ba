"""The places of a module that hold tensors, the averaged module's copy of them, and what is loaded into it."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .ema_policy import AveragePolicy, is_dense
from .ema_shards import check_not_flattened, fsdp_modules, layout, placed_as, reshard, shell_of
from .plain import all_plain


class Slot(NamedTuple):
    """A place of a module for a parameter or a buffer."""

    owner: nn.Module
    kind: str  # the owner's dictionary: "_parameters" or "_buffers"
    key: str

    @property
    def container(self) -> dict[str, Tensor | None]:
        """The dictionary that holds the tensor."""
        found: dict[str, Tensor | None] = self.owner.__dict__[self.kind]
        return found


Slots = dict[str, tuple[Slot, Tensor | None]]


def slots(module: nn.Module) -> Slots:
    """Every place of a module by name, with the tensor that is there now; those of tied tensors, too."""
    found: Slots = {}
    for prefix, owner in module.named_modules():
        for kind in ("_parameters", "_buffers"):
            for key, tensor in owner.__dict__[kind].items():
                found[f"{prefix}.{key}" if prefix else key] = Slot(owner, kind, key), tensor
    return found


def names_by_id(places: Slots) -> dict[int, list[str]]:
    """The names of each tensor by its ``id``, tied ones under one ``id``."""
    found: dict[int, list[str]] = {}
    for name, (_, tensor) in places.items():
        if tensor is not None:
            found.setdefault(id(tensor), []).append(name)
    return found


def averaged_module(model: nn.Module, policy: AveragePolicy) -> nn.Module:
    """A copy of a model for its average: in eval mode, without gradients. It shares what is left out.

    FSDP2 lets no module be copied: of such a model, it holds the tensors alone.

    Raises:
        ValueError: a parameter of the model has no shape yet, or FSDP1 has flattened it.
    """
    check_not_flattened(model)
    reshard(model)
    places = slots(model)
    shared: dict[int, Any] = {}
    memo: dict[int, Any] = {}
    for names in names_by_id(places).values():
        tensor: Any = places[names[0]][1]
        if is_lazy(tensor):
            raise ValueError(
                f"{names[0]} has no shape yet: run a batch through the model before you make its average"
            )
        if isinstance(tensor, nn.Parameter) and policy.is_shared(names, tensor):
            shared[id(tensor)] = tensor
            policy.shared.add(names[0])
        elif not _is_copied_as_it_lies(tensor):
            memo[id(tensor)] = policy.copy_of(tensor)
    for x in (x for owner in model.modules() for x in vars(owner).values() if isinstance(x, Tensor)):
        if not x.is_leaf:  # computed in a forward pass, as weights under the old weight_norm and pruning are
            memo[id(x)] = x.detach().clone()
    with torch.inference_mode(False):
        if fsdp_modules(model):
            kept = (x for _, x in places.values() if x is not None)
            module = shell_of(model, {id(x): shared[id(x)] if id(x) in shared else policy.copy_of(x) for x in kept})
        else:
            module = copy.deepcopy(model, memo | shared)
    with lifted(slot for slot, x in slots(module).values() if id(x) in shared):
        moved(module.eval().requires_grad_(False), policy)
    renew_views(module)
    return module


def _is_copied_as_it_lies(x: Tensor) -> bool:
    """Whether ``copy.deepcopy`` can copy a tensor, and the copy can be written in place."""
    if not all_plain([x]):
        return layout(x) is None  # of a DTensor that has a gradient, PyTorch fails to copy that
    return x.is_leaf and is_dense(x) and torch._debug_has_internal_overlap(x) != 1


def moved(module: nn.Module, policy: AveragePolicy) -> nn.Module:
    """The module with its tensors where the average lives. Tied tensors stay tied."""
    done: dict[int, tuple[Tensor, Tensor]] = {}

    def convert_once(x: Tensor) -> Tensor:
        if id(x) not in done:
            done[id(x)] = (x, policy.converted(x))
        return done[id(x)][1]

    return module._apply(convert_once)  # type: ignore[no-untyped-call, no-any-return]


def renew_views(module: nn.Module) -> None:
    """Let modules that list their parameters, as LSTM and GRU do, list those that they have now."""
    for owner in module.modules():
        if isinstance(owner, nn.RNNBase):
            owner._flat_weights = [getattr(owner, name, None) for name in owner._flat_weights_names]


@contextmanager
def lifted(places: Iterable[Slot]) -> Iterator[None]:
    """Within the ``with`` block, these places of a module are empty: what is done to the module spares them."""
    held = [(slot.container, slot.key, slot.container[slot.key]) for slot in places]
    for container, key, _ in held:
        container[key] = None
    try:
        yield
    finally:
        for container, key, tensor in held:
            container[key] = tensor


@torch.no_grad()
def write_into(target: Tensor, value: Tensor) -> None:
    """Copy a value into a tensor of a model, whose elements may share memory, as those of an expanded tensor do."""
    if torch._debug_has_internal_overlap(target) == 1:
        shared = [size > 1 and stride == 0 for size, stride in zip(target.shape, target.stride(), strict=True)]
        for dim, is_shared in enumerate(shared):
            if is_shared:
                target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    with torch.inference_mode() if target.is_inference() else nullcontext():
        target.copy_(value)


def load_weights(module: nn.Module, weights: dict[str, Any], shared: dict[str, Slot]) -> None:
    """Load a state dict, by the module's own hooks. Places that are ``shared`` with the model, by name, are spared.

    Raises:
        ValueError: it does not fit. Nothing has been changed.
    """
    own = {name: x for name, (_, x) in slots(module).items()}
    kept: OrderedDict[str, Any] = OrderedDict(
        (name, _as_in(own.get(name), x)) for name, x in weights.items() if name not in shared
    )
    kept._metadata = getattr(weights, "_metadata", None)  # type: ignore[attr-defined]  # versions of modules
    with lifted(shared.values()):
        _rehearse(module, kept, set(shared))
        _load(module, kept, set(shared))


def _as_in(own: Tensor | None, x: Any) -> Any:
    """What is loaded into a tensor: where that has a shard, of a whole tensor that of this rank."""
    return x if own is None or not isinstance(x, Tensor) else placed_as(x, own)


def _rehearse(module: nn.Module, weights: dict[str, Any], spared: set[str]) -> None:
    """Let a copy of the module load it first: one without memory, and where that fails, one with."""
    with suppress(Exception):  # hooks may need memory
        memo: dict[int, Any] = {id(x): _without_memory(x) for _, x in slots(module).values() if x is not None}
        _load(copy.deepcopy(module, memo), weights, spared, assign=True)
        return
    twin = _twin(module)
    try:
        if twin is not None:
            _load(twin, weights, spared)
    except ValueError:
        check_checkpoint(module.state_dict(), weights)  # says more shortly what is wrong
        raise
    if twin is None:
        check_checkpoint(module.state_dict(), weights)


def _twin(module: nn.Module) -> nn.Module | None:
    """A copy of the module, or None where there is no copy, as of a sharded module."""
    try:
        return copy.deepcopy(module)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


def _without_memory(x: Tensor) -> Tensor:
    empty = torch.empty_like(x, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(x, nn.Parameter) else empty


def _load(module: nn.Module, weights: dict[str, Any], spared: set[str], assign: bool = False) -> None:
    loaded: OrderedDict[str, Any] = OrderedDict(weights)
    # PyTorch writes into them whether tensors are assigned: the next load of the same weights would assign them, too.
    loaded._metadata = copy.deepcopy(getattr(weights, "_metadata", None))  # type: ignore[attr-defined]
    try:
        missing, unexpected = map(set, module.load_state_dict(loaded, strict=False, assign=assign))
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the model: {error}") from error
    absent, more = sorted(missing - spared), sorted(unexpected - spared)
    if absent or more:
        raise ValueError(
            f"the checkpoint does not fit the model: missing {listed(absent)}, unexpected {listed(more)}"
        )


def check_checkpoint(own: dict[str, Any], loaded: dict[str, Any]) -> None:
    """ValueError where weights that are to be loaded have other names or shapes than those that are there."""
    if own.keys() != loaded.keys():
        absent, unexpected = sorted(own.keys() - loaded.keys()), sorted(loaded.keys() - own.keys())
        raise ValueError(
            f"the checkpoint does not fit the model: missing {listed(absent)}, unexpected {listed(unexpected)}"
        )
    for name, value in loaded.items():
        if isinstance(own[name], Tensor) and not isinstance(value, Tensor):
            raise ValueError(f"{name} is no tensor but {value!r}")  # noqa: TRY004
        if isinstance(own[name], Tensor) and value.shape != own[name].shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}")


def listed(keys: Iterable[Any], most: int = 4) -> str:
    """Some keys, and how many there are beside them."""
    names = list(keys)
    rest = len(names) - most
    return f"[{', '.join(map(repr, names[:most]))}{f', and {rest} more' if rest > 0 else ''}]"
