"""DropPath of small tensors: PyTorch's own operations, whose calls cost less than those of an autograd function.

The kernels under an autograd function, which is Python, take some 40 microseconds more a call. They save passes over
memory; a tensor must have some size for that to pay. Here every microsecond counts, so all is in one function.
"""

from torch import Tensor

from . import core
from .adapters import cpu
from .plain import is_transformed
from .reference import drop_path_mask

# Up to this many elements, PyTorch's operations were no slower (forward and backward, float32 and
# bfloat16, one and two threads). Only CPUs were measured: the tensors of other devices always go to the kernels.
LARGEST = 1 << 17


def drop_path(x: Tensor, rate: float, scale_by_keep: bool, residual: Tensor | None = None) -> Tensor | None:
    """``residual + x * mask``, or None if the caller must take another path.

    A dropped sample has the residual's bits, as with the kernels.
    """
    if (
        type(rate) is not float
        or not 0.0 < rate <= 1.0
        or cpu.restore_dropped is None
        or is_transformed()
        or not core.are_small(x, residual, LARGEST)
        or not (shape := x.shape)
        or (residual is not None and (residual.shape != shape or residual.is_neg()))
    ):
        return None
    mask = drop_path_mask(x, rate, scale_by_keep)
    out = x * mask
    if residual is None:
        return out
    out.add_(residual)
    if samples := shape[0]:
        cpu.restore_dropped(
            core.reader, out=out, residual=residual, mask=mask, samples=samples, sample_numel=x.numel() // samples
        )
    return out
