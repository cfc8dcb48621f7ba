"""How an average starts: as its model, or with weights that others have written into it."""

from typing import Any

from torch import Tensor, nn

from .ema_module import HasModule

# A weight as the average itself left it, its version counter, and its form. (A weak reference to a weight would keep
# modules from moving it, where PyTorch swaps tensors.)
_Seen = tuple[Tensor, int, tuple[Any, ...]]


class KnowsStart(HasModule):
    """An average that knows whether it has moved yet.

    Until its first update, an average is its model, whatever is loaded into that. But weights that are loaded into
    ``module`` are an average already: the first update continues from them, where else it would be a copy.
    """

    _has_moved = False
    _continues = False  # from weights that others have written, whose updates nobody has counted
    _seen: list[_Seen] | None = None

    def _remember_weights(self) -> None:
        """What ``module`` holds now is the average's own doing."""
        self._seen = None if self._has_moved else _weights_of(self.module, self.model)

    def _was_written(self) -> bool:
        """Whether others have written or replaced a weight of ``module`` before it has moved."""
        if self._has_moved or self._seen is None:
            return self._continues
        for (before, version, form), (now, new_version, new_form) in zip(
            self._seen, _weights_of(self.module, self.model), strict=False
        ):
            # Another one of this form was assigned; sharding and moves leave another form.
            self._continues |= form == new_form and (before is not now or version != new_version)
        return self._continues

    def _decay_of_start(self, step: int, decay: float) -> float:
        """The decay of an update that would copy, where the average has other weights to continue from."""
        if not self._was_written():
            return decay
        if callable(self.decay) or self.warmup:
            raise RuntimeError(
                f"weights were loaded into ema.module, and update {step} would copy the model's over them: set "
                "ema.step to the number of updates that they have had, or call ema.reset() to begin anew"
            )
        return self.decay


def _weights_of(module: nn.Module, model: nn.Module) -> list[_Seen]:
    """The parameters of an average that are not its model's own; inference tensors have no version."""
    shared = set(map(id, model.parameters()))
    return [
        (p, 0 if p.is_inference() else p._version, (type(p), p.shape, p.dtype, p.device))
        for p in module.parameters()
        if id(p) not in shared
    ]
