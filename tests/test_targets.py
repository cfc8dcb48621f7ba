"""The backends and devices that the other tests run over are there; each that is missing is skipped here, once."""

import pytest
import torch
from targets import EVERY, absence

import trainops


@pytest.mark.parametrize("target", EVERY, ids="-".join)
def test_a_target_is_there(target):
    if reason := absence(target):
        pytest.skip(reason)
    assert trainops.get_total_norm([torch.full((4,), 2.0, device=target.device)], backend=target.backend) == 4.0
