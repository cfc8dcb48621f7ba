"""State dicts of averages: trainops' own, and those of the classes that people come from."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ema_shards import layout
from .model_slots import listed
from .tables import replicated
from .wrappers import innermost

FORMS = ("torch", "timm", "diffusers")
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # of torch.compile and checkpoint_wrapper, in names
_KNOWN = "torch's AveragedModel, timm's ModelEmaV3, diffusers' EMAModel, ema-pytorch's EMA, or a model"


class Loaded(NamedTuple):
    """What a state dict says of an average."""

    weights: dict[str, Any]
    step: int | None  # None: it does not say how many updates there were
    seed: int | None = None  # of stochastic rounding


def written(
    weights: dict[str, Any], module: nn.Module, step: int, seed: int | None, form: str | None
) -> dict[str, Any]:
    """The state of an average in trainops' form, or in that of another class."""
    if form is None:
        return {"module": weights, "step": step} | ({} if seed is None else {"seed": seed})
    if form not in FORMS:
        raise ValueError(f"form must be None or one of {', '.join(map(repr, FORMS))}, got {form!r}")
    if form == "diffusers":
        return {"optimization_step": step, "shadow_params": [p.detach() for p in module.parameters()]}
    state = _with_keys(weights, lambda key: f"module.{key}".rstrip("."))
    if form == "torch":
        state["n_averaged"] = torch.tensor(step, device="cpu")
    return state


def gathered(module: nn.Module) -> dict[str, Any]:
    """The state of a module on rank 0, in whole tensors on the host; nothing on other ranks, which take part."""
    module = innermost(module)
    is_spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    keeps = not is_spread or torch.distributed.get_rank() == 0
    found: dict[str, Any] = {}
    for key, x in module.state_dict().items():
        if isinstance(x, Tensor) and (placed := layout(x)) is not None:
            x = replicated(x.to(placed[0].device_type))  # shards on the host come from the mesh's devices
        if keeps:
            name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
            found[name] = x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x
    return found


def read(state_dict: Any, module: nn.Module) -> Loaded:
    """What a state dict says of the average ``module``, whoever wrote it, under the keys of that module.

    Raises:
        TypeError: it is no dictionary.
        ValueError: it is not the state of an average.
    """
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict must be a dictionary, got {type(state_dict).__name__}")
    own = module.state_dict(keep_vars=True)
    loaded = _read(state_dict, module, own)
    return loaded._replace(weights=_as_in(own, loaded.weights))


def _read(state_dict: dict[str, Any], module: nn.Module, own: dict[str, Any]) -> Loaded:
    keys = state_dict.keys()
    if isinstance(state_dict.get("module"), dict) and "step" in keys:
        seed = _count(state_dict, "seed") if "seed" in keys else None
        return Loaded(state_dict["module"], _count(state_dict, "step"), seed)
    if keys == own.keys():
        return Loaded(state_dict, None)
    if "shadow_params" in keys:
        params = state_dict["shadow_params"]
        return Loaded(_by_name(params, module, own), _count(state_dict, "optimization_step"))
    if "initted" in keys and "step" in keys:
        averaged = _with_keys(state_dict, lambda key: key.removeprefix("ema_model."), "ema_model")
        return Loaded(averaged, _count(state_dict, "step"))
    if "n_averaged" in keys and "n_averaged" not in own:
        averaged = _with_keys(state_dict, lambda key: key.removeprefix("module."), "module")
        return Loaded(averaged, _count(state_dict, "n_averaged"))
    if keys and all(isinstance(key, str) and _is_of_model(key, x) for key, x in state_dict.items()):
        return Loaded(state_dict, None)
    raise ValueError(_not_an_average(state_dict))


def _is_of_model(key: str, value: Any) -> bool:
    return isinstance(value, Tensor) or key.endswith("_extra_state")


def _not_an_average(state_dict: dict[str, Any]) -> str:
    missing = sorted({"module", "step"} - state_dict.keys())
    if not state_dict or len(missing) == 1:
        what = f"keys {missing[0]!r} and {missing[1]!r} are" if len(missing) > 1 else f"key {missing[0]!r} is"
        return f"this is not a state_dict of trainops.EMA: {what} missing"
    inner = [key for key, x in state_dict.items() if isinstance(x, dict) and any(map(torch.is_tensor, x.values()))]
    inner.sort(key=lambda key: "ema" not in str(key).lower())
    message = f"this is not a state_dict of trainops.EMA, nor of {_KNOWN}: it has {listed(state_dict)}"
    return f"{message}. Load what lies under one of them, such as state_dict[{inner[0]!r}]" if inner else message


def _count(state_dict: dict[str, Any], key: str) -> int:
    value = state_dict.get(key)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} must be a number of updates, got {value!r:.60}")
    return value


def _by_name(params: Any, module: nn.Module, own: dict[str, Any]) -> dict[str, Any]:
    """The weights of a list in the order of ``module.parameters()``; what is no parameter stays."""
    averages = list(module.parameters())
    if not isinstance(params, list | tuple) or len(params) != len(averages):
        count = len(params) if isinstance(params, list | tuple) else repr(params)[:60]
        raise ValueError(f"shadow_params has {count} tensors, the average {len(averages)}")
    loaded = {id(average): x for average, x in zip(averages, params, strict=True)}
    return {key: loaded.get(id(x), x.detach() if isinstance(x, Tensor) else x) for key, x in own.items()}


def _as_in(own: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
    """The weights under the average's own keys, where wrappers (DDP, ``torch.compile``) have changed them."""
    if own.keys() == weights.keys():
        return weights
    by_plain = {_plain(key): key for key in own}
    is_clear = len(by_plain) == len(own) and len(set(map(_plain, weights))) == len(weights)
    if not is_clear or by_plain.keys().isdisjoint(map(_plain, weights)):
        return weights
    is_plain = all(map(str.__eq__, by_plain, by_plain.values()))
    return _with_keys(weights, lambda key: by_plain.get(_plain(key), _plain(key) if is_plain else key))


def _plain(key: str) -> str:
    """A key without what wrappers put into it: their own names anywhere, ``module`` in front."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while parts and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _with_keys(weights: dict[str, Any], rename: Callable[[str], str], prefix: str = "") -> dict[str, Any]:
    """What lies under a prefix, under other keys, with the versions of the modules that saved it (``_metadata``)."""

    def renamed(entries: dict[str, Any]) -> "OrderedDict[str, Any]":
        inside = (
            (key, value) for key, value in entries.items() if f"{key}.".startswith(f"{prefix}." if prefix else "")
        )
        return OrderedDict(("" if key == prefix else rename(key), value) for key, value in inside)

    result: Any = renamed(weights)
    if (versions := getattr(weights, "_metadata", None)) is not None:
        result._metadata = renamed(versions)
    return result  # type: ignore[no-any-return]
