"""Norms: what they are exactly, how far a backend's may be off, and tensors to take them of."""

import torch
from contract import assert_contract, exact, ulp
from exact import STATISTICS, magnitudes, norm

from trainops.adapters import cuda, select

WIDE = (torch.float64, torch.complex128)

# How often a square, or a sum that it becomes part of, is rounded in float32 before the rest is float64. The first
# sum, with 0, is exact. Each rounding is off by 2^-24 at most.
ROUNDINGS = {
    "reference": lambda: 0,  # all in float64
    "cpu": lambda: 1 + 7,  # runs of 8
    # One element of each tile of 2048, then the 8 runs of a thread and the 32 threads of a warp in pairs.
    "cuda": lambda: 1 + (cuda._cuda.CHUNK_NUMEL // 2048 - 1) + 3 + 5,
    # PyTorch sums rows of 256, in 4 vectors of at least 8 numbers that are joined in pairs.
    "foreach": lambda: 1 + 7 + 2 + 3,
    "triton": lambda: 1 + 7 + 3,  # one element of each 1024 of a chunk of 8192, then 8 runs in pairs
}


def rounding_share(target, norm_type, in_float32=True):
    """The share of a norm by which it may be off before it is rounded."""
    if not in_float32 or target.backend == "reference" or norm_type not in (1.0, 2.0):
        return 2.0**-50
    # Roots halve relative errors. Sums of 2^-100 and more may lack 2^-34 of it, in squares below float32's range.
    roundings = ROUNDINGS[target.backend]() - (norm_type == 1.0)
    return ((1 + 2.0**-24) ** roundings - 1) / norm_type + 2.0**-35 + 2.0**-50


def exact_norm(tensors, norm_type=2.0):
    return norm(list(map(magnitudes, tensors)), norm_type)


def torch_norm(tensors, norm_type=2.0):
    """What ``torch.nn.utils.get_total_norm`` computes, of 16-bit tensors in float32: ours is of that dtype."""
    wide = [x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in tensors if x.numel()]
    if not wide:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(x, norm_type) for x in wide]
    return torch.linalg.vector_norm(torch.stack([x.to(norms[0].device) for x in norms]), norm_type)


def assert_norm(target, ours, tensors, norm_type=2.0, what=""):
    """A norm that we sum ourselves is the exact one, rounded once, but for what its sums may lose. Other norms are
    PyTorch's."""
    true = exact_norm(tensors, norm_type)
    if norm_type not in STATISTICS:
        assert_contract(ours, true, torch_norm(tensors, norm_type).to(ours), what)
        return
    share = rounding_share(target, norm_type, any(x.dtype not in WIDE for x in tensors))
    allowed = ulp(true, ours.dtype) / 2 + share * true
    assert abs(exact(ours) - true) <= allowed, f"{what}: {ours.item()} instead of {true}, {allowed} is allowed"


def reduced(target, tensors, norm_type=2.0):
    """The norm of all tensors and that of each. In float64: a float64 number, which adds nothing, lets them be so."""
    zero = torch.zeros(1, dtype=torch.float64, device=target.device)
    total, norms = select(target.backend, target.device).reduce(STATISTICS[norm_type], [*tensors, zero])
    assert total.dtype == norms.dtype == torch.float64
    return total, norms[:-1]


def in_every_type(numel):
    """Numbers that bfloat16 and float16 hold, so far from each other that float64 rounds the sum of their squares."""
    x = torch.randn(numel).bfloat16().float()
    return torch.where(x.abs() < 2.0**-6, 1.0, x) * 2.0 ** torch.randint(-8, 13, x.shape)


def gradients(dtype, sizes):
    """As those of a language model: each tensor has its own scale, and few elements are much larger than others."""
    scales = 10.0 ** torch.linspace(-7, -1, len(sizes), dtype=torch.float64)
    draws = (torch.randn(size, dtype=torch.float64) * torch.randn(size, dtype=torch.float64).exp() for size in sizes)
    return [(scale * x).to(dtype) for scale, x in zip(scales, draws, strict=True)]
