"""DropPath in PyTorch and in extended precision, and the operands that its tests share."""

import math
from functools import partial

import numpy as np
import torch
from contract import Exact, exact, same_values

import trainops

NARROW = (torch.bfloat16, torch.float16)
SHAPE = (8, 5, 6, 7)
LAYER_SCALES = {
    "no_scale": None,
    "last_dim": (7,),
    "channels": (1, 5, 1, 1),
    "one": (1,),
    "scalar": (),
    "per_sample": (8, 1, 1, 1),
    "full": SHAPE,
}
SOME_LAYER_SCALES = {name: LAYER_SCALES[name] for name in ("no_scale", "last_dim", "channels")}
OPERANDS = ("residual", "branch", "layer_scale")

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "gaps": lambda x: torch.stack((x, x), -1)[..., 0],
    "unaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "expanded": lambda x: x[:, :, :1].expand(x.shape),
    "one_sample": lambda x: x[:1].expand(x.shape),
}


def timm_drop_path(x, drop_prob=0.0, training=False, scale_by_keep=True):
    """The body of timm/layers/drop.py."""
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
    if keep_prob > 0.0 and scale_by_keep:
        mask.div_(keep_prob)
    return x * mask


def timm_drop_path_add(residual, branch, drop_prob=0.0, training=False, scale_by_keep=True, layer_scale=None):
    branch = branch if layer_scale is None else branch * layer_scale
    return residual + timm_drop_path(branch, drop_prob, training, scale_by_keep)


def seeded(function, *args, **kwargs):
    torch.manual_seed(7)
    return function(*args, **kwargs)


def timm_mask(like, drop_prob, scale_by_keep=True):
    """What timm multiplies samples with, from the seed of ``seeded``."""
    ones = like.new_ones((len(like),) + (1,) * (like.ndim - 1))
    return seeded(timm_drop_path, ones, drop_prob, True, scale_by_keep)


def adding(target):
    return partial(trainops.drop_path_add, backend=target.backend)


def operands(dtype, device, scale_shape=None, shape=SHAPE):
    residual, branch = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return residual, branch, None if scale_shape is None else torch.randn(scale_shape, device=device).to(dtype)


def assert_equal(ours, expected, what=""):
    """Equal values. (Written as an ``assert``, pytest prints both tensors, which takes it longer than the test.)"""
    if not torch.equal(ours, expected):
        raise AssertionError(f"{what}: {(ours != expected).sum()} of {ours.numel()} elements differ")


def assert_same_bits(ours, expected, what=""):
    """The same bits; but every NaN is as good as any other: PyTorch's own depends on its vector width."""
    if not same_values(ours, expected):
        shapes = f"{ours.dtype} {tuple(ours.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        raise AssertionError(f"{what}: other bits: {shapes}")


def draws_of(dtype, shape):
    """How often to draw operands: a single 16-bit number may come out right by chance."""
    return 8 if shape in ((), (1,)) and dtype in NARROW else 1


def with_specials(x):
    """``x`` with zeros of both signs, infinities and NaN in it."""
    for i, value in enumerate((0.0, -0.0, math.inf, -math.inf, math.nan)):
        x.view(-1)[i::11] = value
    return x


def with_broken_dropped_samples(branch):
    """Which samples ``seeded`` drops at a rate of 0.5, and ``branch`` with NaN and infinity in those."""
    dropped = timm_mask(branch, 0.5).flatten() == 0
    assert 0 < dropped.sum() < len(dropped)
    broken = branch.clone()
    broken[dropped] = math.nan
    broken[dropped, 0] = math.inf
    return dropped, broken


def gradients(add, inputs, grad, drop_prob=0.5, scale_by_keep=True):
    """Of ``add`` by those inputs that there are."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    residual, branch, layer_scale = inputs
    out = seeded(add, residual, branch, drop_prob, True, scale_by_keep, layer_scale=layer_scale)
    return torch.autograd.grad(out, [x for x in inputs if x is not None], grad.to(out.dtype))


def as_stored(x, dtype):
    """An exact product of two numbers, as a 16-bit tensor has it. Roundings of wider ones are for the contract."""
    return exact(torch.from_numpy(x.astype(np.float64)).to(dtype)) if dtype in NARROW else x


def product(dtype, first, *factors):
    """A product, exact but for what PyTorch rounds on the way: each product but the last to its 16-bit type.

    That is part of what DropPath is in 16 bits, so that it has the bits of the formula that people write: it is no
    error, and the contract is for what comes after it.
    """
    for factor in factors[:-1]:
        first = as_stored(first * factor, dtype)
    return first * factors[-1] if factors else first


def sum_to(x, shape):
    """``x``, an array, summed over what was repeated to make it of an array of ``shape``."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(i for i, size in enumerate(shape) if size == 1), keepdims=True).reshape(shape)


def exact_sum(x, shape):
    """A sum whose terms are elements of ``x``."""
    return Exact(sum_to(x, shape), sum_to(np.abs(x), shape))


def exact_gradients(residual, branch, layer_scale, mask, grad):
    """Of ``residual + branch * layer_scale * mask``, by each operand that there is."""
    dtype = mask.dtype
    of_term, m = exact(grad.to(dtype) if dtype in NARROW else grad), exact(mask)
    factors = [m] if layer_scale is None else [exact(layer_scale), m]
    results = [exact_sum(exact(grad), residual.shape), exact_sum(product(dtype, of_term, *factors), branch.shape)]
    if layer_scale is not None:
        # Here no product is rounded: they are added up in float32 at least.
        results.append(exact_sum(of_term * m * exact(branch), layer_scale.shape))
    return results
