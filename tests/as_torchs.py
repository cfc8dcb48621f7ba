"""Cases that are run with something of ours and with its twin of PyTorch, which must give or raise the same."""

import re
import warnings

import torch
from torch import nn

import trainops

INPUT = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=torch.float64)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).double()


def train(cls, steps=3, named=False, model=None, **options):
    model = model or make_model()
    params = model.named_parameters() if named else model.parameters()
    optimizer = cls(params, **options)
    go_on(model, optimizer, steps)
    return model, optimizer


def go_on(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(INPUT).sum().backward()
        optimizer.step()
    return [list(model.parameters()), optimizer.state_dict()]


def one_param(cls, grad=1.0, **options):
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.full((2,), grad)
    return param, cls([param], **options)


def outcome(case, module):
    """What a case returns and warns of, or what it raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = case(module)
        except Exception as error:
            return type(error), str(error)
    return result, [(warning.category, str(warning.message)) for warning in caught]


def check(case, ours=trainops.AdamW, torchs=torch.optim.AdamW):
    """Hold what a case does with one of ours to what it does with its twin of PyTorch."""
    ours, torchs = outcome(case, ours), outcome(case, torchs)
    if isinstance(torchs[0], type):
        assert ours == torchs
    else:
        check_equal(ours, torchs)


def check_equal(ours, torchs):
    """Equal things in equal containers; tensors as close as two orders of summation are, of the same kind."""
    assert type(ours) is type(torchs)
    if isinstance(torchs, torch.Tensor):
        torch.testing.assert_close(ours, torchs, equal_nan=True)
        assert ours.requires_grad == torchs.requires_grad
    elif isinstance(torchs, dict):
        assert ours.keys() == torchs.keys()
        for key in torchs:
            check_equal(ours[key], torchs[key])
    elif isinstance(torchs, (list, tuple)):
        assert len(ours) == len(torchs)
        for pair in zip(ours, torchs, strict=True):
            check_equal(*pair)
    elif isinstance(torchs, str):  # PyTorch makes that of a generator from text that it loads
        assert re.sub("0x[0-9a-f]+", "", ours) == re.sub("0x[0-9a-f]+", "", torchs)
    else:
        assert ours == torchs
