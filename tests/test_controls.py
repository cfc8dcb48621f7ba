"""That ``must_fail`` can fail: where a check accepts the fault, and where it accepts nothing at all."""

from contextlib import nullcontext

import pytest
import torch
from controls import must_fail


def check(value, least):
    assert value >= least


def test_a_check_that_accepts_the_fault():
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        must_fail(nullcontext, check, 1, least=0)


def test_a_check_that_always_fails():
    with pytest.raises(AssertionError):
        must_fail(nullcontext, check, 0, least=1)
    with pytest.raises(AssertionError):  # what failed is not remembered as passed
        must_fail(nullcontext, check, 0, least=1)


def test_the_fault_gets_the_same_random_numbers():
    drawn = []
    with pytest.raises(pytest.fail.Exception):
        must_fail(nullcontext, lambda: drawn.append(torch.rand(3)))
    assert torch.equal(*drawn)
