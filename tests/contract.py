"""The contract that every result is held to, and the one table of its tolerances.

Against an evaluation in extended precision (``exact.py``):

- float32 and float64: the largest error of a tensor is at most twice that of PyTorch's own implementation in the same
  dtype, plus one unit in the last place of the tensor's largest element.
- 16 bits: every element is the exact result of one step, rounded to nearest. It is off by at most half a unit in its
  own last place, plus what float32 arithmetic may lose before the rounding: a share of the terms that it is made of.
  The exact step starts from what was stored before it, so that 100 steps are 100 checks.

No bound is infinite. ``controls.py`` has the wrong steps that must not meet them.
"""

from typing import NamedTuple

import numpy as np
import torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Tolerance(NamedTuple):
    """How far a result may be off."""

    # The largest error of a tensor, where PyTorch's own is a measure: so many times that, and so many units in the
    # last place of the tensor's largest element.
    times_torch: float | None
    ulps_of_largest: float
    # The error of each element of one step's results: so many units in its last place, and such a share of its terms.
    ulps: float
    terms: float


TOLERANCES = {
    torch.float32: Tolerance(times_torch=2, ulps_of_largest=1, ulps=0.5, terms=8 * 2.0**-24),
    torch.float64: Tolerance(times_torch=2, ulps_of_largest=1, ulps=0.5, terms=8 * 2.0**-53),
    torch.bfloat16: Tolerance(times_torch=None, ulps_of_largest=0, ulps=0.5, terms=8 * 2.0**-24),
    torch.float16: Tolerance(times_torch=None, ulps_of_largest=0, ulps=0.5, terms=8 * 2.0**-24),
}


class Exact(NamedTuple):
    """A result in extended precision, and the sum of the magnitudes of the terms that it is made of."""

    value: np.ndarray
    terms: np.ndarray


def real(x):
    """The numbers of a tensor that may be lazily conjugated or negated; complex ones as pairs of real ones."""
    x = x.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(x) if x.is_complex() else x


def exact(x):
    """A tensor in extended precision; complex numbers as pairs of real ones."""
    return real(x).double().cpu().numpy().astype(np.longdouble)


def ulp(values, dtype):
    """The unit in the last place of each value, as ``dtype`` has it."""
    info = torch.finfo(dtype)
    _, exponent = np.frexp(np.maximum(np.abs(values), np.longdouble(info.smallest_normal)))
    return np.ldexp(np.longdouble(info.eps), exponent - 1)


def assert_contract(ours, true, torchs=None, what=""):
    """Hold a tensor to the contract of its dtype.

    Args:
        ours: the tensor.
        true: the exact result: an ``Exact``, or an array whose terms are its own magnitudes.
        torchs: PyTorch's tensor for the same. None: every element is held to be the result of one step.
        what: what an error message calls it.
    """
    true = true if isinstance(true, Exact) else Exact(true, np.abs(true))
    tolerance = TOLERANCES[ours.dtype]
    assert ours.shape == true.value.shape, what
    if torchs is not None:
        assert ours.dtype == torchs.dtype, what
        assert ours.shape == torchs.shape, what
    if ours.numel() == 0:
        return
    got, value = exact(ours), true.value
    finite = np.isfinite(value)
    assert np.array_equal(got[~finite], value[~finite], equal_nan=True), f"{what}: infinities or NaN differ"
    got, value, terms = within(got[finite], ours.dtype), within(value[finite], ours.dtype), true.terms[finite]
    if value.size == 0:
        return
    assert not np.isnan(got).any(), f"{what}: NaN where the result is finite"
    if torchs is None or tolerance.times_torch is None:
        allowed = tolerance.ulps * ulp(value, ours.dtype) + tolerance.terms * terms
    else:
        torchs_error = np.abs(exact(torchs)[finite] - value).max()
        largest = ulp(np.abs(value).max(), ours.dtype)
        allowed = np.full_like(value, tolerance.times_torch * torchs_error + tolerance.ulps_of_largest * largest)
    assert np.isfinite(allowed).all(), f"{what}: an infinite bound allows anything"
    error = np.abs(got - value)
    if (error > allowed).any():
        i = (error - allowed).argmax()
        raise AssertionError(
            f"{what}: {(error > allowed).sum()} of {error.size} elements are off, the worst by {error[i]:.3e} where "
            f"{allowed[i]:.3e} is allowed (exact {value[i]:.9e}, got {got[i]:.9e})"
        )


def within(values, dtype):
    """Clamp to the first number beyond the dtype's range, so that infinities compare like any other rounding."""
    largest = np.longdouble(torch.finfo(dtype).max)
    beyond = largest + ulp(largest, dtype)
    return np.clip(values, -beyond, beyond)


def same_bits(a, b):
    """Whether two tensors agree bit for bit, signs of zero and NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    dense = [real(x).cpu().clone(memory_format=torch.contiguous_format) for x in (a, b)]
    return torch.equal(*(x.reshape(-1).view(torch.uint8) for x in dense))


def same_values(a, b):
    """Same bits, but for what a NaN carries."""
    return same_bits(*(torch.where(x.isnan(), torch.nan, x) for x in (a, b)))
