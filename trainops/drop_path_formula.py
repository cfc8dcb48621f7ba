"""DropPath as PyTorch's own operations, for tracers, compilers and tensor subclasses."""

from torch import Tensor

from . import reference
from .plain import PLAIN, is_transformed


def formula(
    branch: Tensor,
    drop_prob: float,
    scale_by_keep: bool,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """Draw the mask as timm draws it, and drop. TorchScript compiles this function, and torch.fx traces it."""
    scaled = branch if layer_scale is None else branch * layer_scale  # its dtype and shape are the mask's
    mask = reference.drop_path_mask(scaled, drop_prob, scale_by_keep)
    return scaled * mask if residual is None else reference.drop_path(branch, mask, residual, layer_scale)


def wants_formula(x: Tensor, drop_prob: float) -> bool:
    """Whether the input is a proxy or subclass, the rate is a tensor, or :func:`is_transformed`."""
    is_plain = type(x) in PLAIN or not hasattr(x, "__torch_function__")
    return not is_plain or isinstance(drop_prob, Tensor) or is_transformed()
