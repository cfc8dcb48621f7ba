"""Averages of sharded models: each rank holds and moves the averages of its own shards, and sends nothing.

A DTensor's average is a DTensor that is placed alike. FSDP2's modules hold their shards or, for a forward pass, what
was gathered of them. Averages pair with the shards. To find these, what was gathered is freed (``reshard()``), as
``model.state_dict()`` does, so that the next forward pass gathers what the shards hold then.
"""

import importlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .plain import PLAIN

_NO_FORWARD = (
    "this average holds the shards of its rank, and nothing gathers them for a forward pass: evaluate the model in "
    "`with ema.swap():`, or let the average have a module that is sharded as the model is: EMA(model, module=...)"
)


def layout(x: Tensor) -> tuple[Any, Any] | None:
    """The mesh and the placements of a DTensor; None for other tensors."""
    spec = None if type(x) in PLAIN else getattr(x, "_spec", None)
    return None if spec is None else (spec.mesh, spec.placements)


def described_layout(x: Tensor) -> str:
    """How a tensor is placed, for messages."""
    found = layout(x)
    return "not sharded" if found is None else f"placed as {found[1]} on {found[0]}"


def fsdp_modules(*models: nn.Module) -> list[Any]:
    """What FSDP2's ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", ())
    return [module for model in models for module in model.modules() if isinstance(module, kind)] if kind else []


def fsdp1_modules(model: nn.Module) -> list[Any]:
    """What FSDP1 has wrapped."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    return [module for module in model.modules() if isinstance(module, kind)] if kind else []


def check_not_flattened(model: nn.Module) -> None:
    """ValueError where FSDP1 has put the parameters of a model into flat ones, which it gathers and frees at will."""
    if fsdp1_modules(model):
        raise ValueError(
            "there is no average of what FullyShardedDataParallel (FSDP1) has flattened: shard the model with "
            "torch.distributed.fsdp.fully_shard"
        )


def reshard(*models: nn.Module) -> None:
    """Let FSDP2's modules hold their shards, and free what was gathered of them for a forward pass.

    Raises:
        ValueError: a forward or backward pass is under way, and needs it. Nothing has been changed.
    """
    modules = fsdp_modules(*models)
    states = [module._get_fsdp_state() for module in modules]  # PyTorch has no public words for what is under way
    if any(getattr(getattr(state, "_training_state", None), "name", "IDLE") != "IDLE" for state in states):
        raise ValueError("FSDP is inside a forward or backward pass of this model: it cannot put its shards back")
    for module, state in zip(modules, states, strict=True):
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        if any(getattr(group, "_all_gather_result", None) is not None for group in groups):
            module.unshard()  # waits: what unshard(async_op=True) has begun to gather would be used later
        module.reshard()


def listed(parameters: Iterable[Tensor], model: nn.Module) -> list[Tensor]:
    """Parameters that the caller names, some of which may be those of a model.

    Raises:
        RuntimeError: they are copies that FSDP2 had gathered of its shards.
    """
    known = {id(p): p for p in model.parameters()}
    reshard(model)
    given = list(parameters)  # of a generator: the shards
    if known.keys() & set(map(id, given)) - set(map(id, model.parameters())):
        raise RuntimeError("these are copies that FSDP has gathered of its shards: give the model instead")
    return given


def check_reachable(model: nn.Module) -> None:
    """RuntimeError where values written into the parameters of a model might not reach its forward pass."""
    if isinstance(model, nn.ParameterList) and "torch.distributed.fsdp" in sys.modules and _has_shards(model):
        raise RuntimeError(
            "of a list of shards, FSDP may hold gathered copies that nobody finds: make the average of the model, "
            "EMA(model)"
        )


def _has_shards(model: nn.Module) -> bool:
    return any(layout(p) is not None for p in model.parameters())


def placed_as(x: Tensor, source: Tensor) -> Tensor:
    """``x`` itself; but where only ``source`` is a DTensor, this rank's shard of ``x``, which is whole."""
    target = layout(source)
    if target is None or layout(x) is not None or x.shape != source.shape:
        return x
    tensors = importlib.import_module("torch.distributed.tensor")
    mesh, placements = target
    with torch.no_grad(), torch.inference_mode(False):
        whole = tensors.DTensor.from_local(x.detach(), mesh, [tensors.Replicate()] * mesh.ndim, run_check=False)
        shard: Tensor = whole.redistribute(placements=placements).to(x.device)
    return nn.Parameter(shard, requires_grad=False) if isinstance(x, nn.Parameter) else shard


class Shell(nn.Module):
    """The tensors of a module by name, without a forward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """There is none."""
        raise RuntimeError(_NO_FORWARD)


def shell_of(model: nn.Module, tensors: Mapping[int, Tensor], memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """A module with the names of ``model`` that holds, in place of each of its tensors, that of the same ``id``."""
    memo = {} if memo is None else memo
    if id(model) not in memo:
        memo[id(model)] = shell = Shell()
        for kind in ("_parameters", "_buffers"):
            held = getattr(model, kind).items()
            getattr(shell, kind).update((key, None if x is None else tensors[id(x)]) for key, x in held)
        shell._non_persistent_buffers_set = set(model._non_persistent_buffers_set)
        for key, child in model._modules.items():
            shell._modules[key] = None if child is None else shell_of(child, tensors, memo)
    return memo[id(model)]


def refuse_forward(module: nn.Module) -> None:
    """Let a call of a module raise, whose tensors have become shards."""
    if refuse not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(refuse)


def refuse(module: nn.Module, args: Any) -> NoReturn:
    """A hook of what nothing gathers."""
    raise RuntimeError(_NO_FORWARD)
