"""An average in a module that the user gives: it has the model's weights, and shares none."""

import pytest
import torch
from torch import nn

import trainops


def network():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def test_it_is_the_average():
    model = network()
    given = Doubled(*network())
    ema = trainops.EMA(model, 0.5, module=given, dtype=torch.float64)
    assert ema.module is given
    assert not given.training
    assert not any(p.requires_grad for p in given.parameters())
    expected = trainops.EMA(model, 0.5, dtype=torch.float64)
    for _ in range(3):
        for it in (ema, expected):
            assert all(map(torch.equal, it.module.state_dict().values(), expected.module.state_dict().values()))
            it.update()
        with torch.no_grad():
            model[0].weight.mul_(2.0)
    x = torch.ones(1, 4, dtype=torch.float64)
    assert torch.equal(ema(x), 2 * expected(x))


def test_the_first_update_copies():
    model = network()
    ema = trainops.EMA(model, 0.5, module=network())
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    ema.update()
    assert (ema.module[0].weight == 3.0).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"module": network}, TypeError, r"module must be a torch\.nn\.Module, got function"),
        ({"module": nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))}, ValueError, r"0\.weight has shape \(3, 4\)"),
        ({"module": nn.Sequential(nn.Linear(4, 3))}, ValueError, r"1\.weight is in the model alone"),
        ({"module": network(), "exclude": "0"}, ValueError, "`module` shares none"),
        ({"module": network(), "include": "0"}, ValueError, "`module` shares none"),
        ({"module": network(), "trainable_only": True}, ValueError, "`module` shares none"),
    ],
)
def test_what_does_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        trainops.EMA(network(), **options)
    if isinstance(options["module"], nn.Module):
        assert options["module"].training
        assert all(p.requires_grad for p in options["module"].parameters())


def test_it_is_not_the_model():
    model = network()
    with pytest.raises(ValueError, match="module has parameters of the model itself"):
        trainops.EMA(model, module=nn.Sequential(model[0], nn.BatchNorm1d(3)))
