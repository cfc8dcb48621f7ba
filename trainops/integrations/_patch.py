"""Puts trainops in the place of PyTorch's and timm's names, for code that cannot be edited."""

import dataclasses
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

import trainops

TORCH_CLIP = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm")
TIMM_DROP = ("DropPath", "drop_path")


class Patch:
    """What :func:`patch` has replaced. Leaving the ``with`` block, or :meth:`undo`, puts it back."""

    def __init__(self) -> None:
        self._open = True
        _open.append(self)

    def undo(self) -> None:
        """Put everything back, unless another patch is still open. A second call does nothing."""
        if not self._open:
            return
        self._open = False
        _open.remove(self)
        if not _open:
            _restore()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        owners: dict[str, list[str]] = {}
        for where in _replaced:
            owners.setdefault(where.rpartition(".")[2], []).append(where)
        names = [where[0] if len(where) == 1 else f"{name} in {len(where)} modules" for name, where in owners.items()]
        return f"<trainops in the place of {', '.join(names) or 'nothing'}>"


def patch() -> Patch:
    """Replace PyTorch's clip functions and ``AdamW``, and timm's DropPath, by those of trainops.

    As a context manager, or until :meth:`Patch.undo`::

        import timm, trainops.integrations
        with trainops.integrations.patch():
            model = timm.create_model("vit_small_patch16_224", drop_path_rate=0.1)
            optimizer = torch.optim.AdamW(model.parameters())  # trainops.AdamW
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # trainops.clip_grad_norm_

    Replaced are ``torch.optim.AdamW``, the four functions of ``torch.nn.utils`` (which Accelerate, HF Trainer,
    Lightning and timm look up there at each call), and, if timm has been imported already, ``DropPath`` and
    ``drop_path`` in every module that has imported them from timm, and timm's "adamw". Models and optimizers that are
    there already stay what they are. So does what another module has imported from PyTorch by name; and a module of
    your own that imports DropPath from timm inside the block keeps ours.

    Patches may be nested, and undone in any order: the last one puts everything back.

    Returns:
        A :class:`Patch`.
    """
    handle = Patch()
    try:
        _replace_torch()
        _replace_timm()
    except BaseException:
        handle.undo()
        raise
    return handle


_open: list[Patch] = []
_replaced: dict[str, Callable[[], None]] = {}  # what puts each of them back


def _replace(owner: Any, name: str, ours: Any) -> None:
    theirs = getattr(owner, name)
    where = f"{owner.__name__}.{name}"
    if theirs is not ours and where not in _replaced:
        _replaced[where] = lambda: setattr(owner, name, theirs)
        setattr(owner, name, ours)


def _replace_torch() -> None:
    _replace(torch.optim, "AdamW", trainops.AdamW)
    for name in TORCH_CLIP:
        _replace(torch.nn.utils, name, getattr(trainops, name))


def _replace_timm() -> None:
    home = sys.modules.get("timm.layers.drop")
    if home is None:
        return
    for name in TIMM_DROP:
        theirs, ours = getattr(home, name), getattr(trainops, name)
        for module in _modules_but(home):
            for key in [key for key, value in list(vars(module).items()) if value is theirs]:
                _replace(module, key, ours)
    factory: Any = sys.modules.get("timm.optim._optim_factory")
    if factory is None:
        return
    registry = factory.default_registry
    info = registry._optimizers["adamw"]
    if info.opt_class is not trainops.AdamW:
        _replaced["timm's adamw"] = lambda: registry._optimizers.update(adamw=info)
        registry._optimizers["adamw"] = dataclasses.replace(info, opt_class=trainops.AdamW)


def _restore() -> None:
    while _replaced:
        _replaced.popitem()[1]()
    home = sys.modules.get("timm.layers.drop")
    if home is None:
        return
    for name in TIMM_DROP:  # modules of timm that were imported meanwhile
        for module in _modules_but(home):
            if module.__name__.split(".")[0] == "timm" and vars(module).get(name) is getattr(trainops, name):
                setattr(module, name, getattr(home, name))


def _modules_but(home: Any) -> list[Any]:
    """Every module but the one in which timm's classes are defined, where pickle looks for them."""
    modules = (module for module in list(sys.modules.values()) if isinstance(module, type(sys)))
    return [module for module in modules if module is not home]
