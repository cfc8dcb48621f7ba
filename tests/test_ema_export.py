"""`EMA.full_state_dict` on one process: for the model without wrappers. Over ranks: `test_sharded_averages.py`."""

import pytest
import torch
from contract import same_bits
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import trainops


class Counts(nn.Linear):
    """It saves more than tensors."""

    def get_extra_state(self):
        return {"count": 3}

    def set_extra_state(self, state):
        assert state == {"count": 3}


def network(wrap=lambda x: x):
    torch.manual_seed(0)
    return nn.Sequential(wrap(Counts(3, 4)), nn.BatchNorm1d(4))


WRAPPED = {
    "plain": network,
    "compiled": lambda: torch.compile(network(), backend="eager"),
    "a compiled block": lambda: network(lambda x: torch.compile(x, backend="eager")),
    "checkpointed": lambda: network(checkpoint_wrapper),
    "data parallel": lambda: nn.DataParallel(network()),
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_a_plain_model_loads_it(wrapped):
    model = wrapped()
    ema = trainops.EMA(model, 0.5)
    for _ in range(2):
        ema.update()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
    found = ema.full_state_dict()
    plain = network()
    assert found.keys() == plain.state_dict().keys()
    plain.load_state_dict(found)
    assert all(map(same_bits, plain.parameters(), ema.module.parameters()))
    assert not any(map(same_bits, plain.parameters(), model.parameters()))


def test_it_is_a_copy_and_has_what_is_shared():
    ema = trainops.EMA(network(), 0.5, exclude="0.weight")
    found = ema.full_state_dict()
    assert found["0.weight"].data_ptr() != ema.model[0].weight.data_ptr()
    assert same_bits(found["0.weight"], ema.model[0].weight)
    assert found["0.bias"].data_ptr() != ema.module[0].bias.data_ptr()
    assert not any(x.requires_grad for x in found.values() if isinstance(x, torch.Tensor))
