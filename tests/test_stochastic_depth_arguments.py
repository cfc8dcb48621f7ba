"""What stochastic depth does not take."""

import math

import pytest
import torch

import trainops

X = torch.ones(4, 3)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"drop_prob": -0.1}, ValueError, r"drop_prob.*-0\.1"),
        ({"drop_prob": 1.1}, ValueError, r"drop_prob.*1\.1"),
        ({"drop_prob": math.nan}, ValueError, r"drop_prob.*nan"),
        ({"drop_prob": "often"}, TypeError, "drop_prob.*'often'"),
        ({"drop_prob": torch.tensor(0.5)}, TypeError, r"drop_prob.*tensor\(0\.5"),
        ({"scale_by_keep": "row"}, TypeError, "scale_by_keep.*str"),
        ({"scale_by_keep": X}, TypeError, "scale_by_keep.*Tensor"),
        ({"mode": "row"}, ValueError, "mode.*'fixed', 'bernoulli'.*'row'"),
        ({"branch": X}, TypeError, "branch.*Tensor.*drop_path_add"),
        ({"branch": lambda x: x[:, :2]}, ValueError, r"branch.*\(\d, 2\).*\(\d, 3\)"),
        ({"branch": lambda x: x[:1, :1]}, ValueError, r"branch.*\(1, 1\).*\(\d, 3\)"),
        ({"branch": lambda x: (x, x)}, TypeError, "branch.*tuple"),
        ({"branch": lambda x: x.to("meta")}, ValueError, "meta.*cpu"),
        ({"layer_scale": torch.ones(4)}, ValueError, r"layer_scale.*\(4,\).*\(4, 3\)"),
        ({"layer_scale": torch.ones(4, 1)}, ValueError, r"layer_scale.*\(4, 1\).*\(4, 3\)"),
        ({"layer_scale": torch.ones(3, device="meta")}, ValueError, "cpu.*layer_scale.*meta"),
        ({"layer_scale": 0.1}, TypeError, "layer_scale must be a tensor, got float"),
        ({"residual": torch.tensor(1.0)}, ValueError, "residual.*at least one dimension"),
        ({"residual": [1.0]}, TypeError, "residual must be a tensor, got list"),
        ({"backend": "fpga"}, ValueError, "fpga"),
    ],
)
def test_bad_input(arguments, error, message, training):
    calls = {"residual": X, "branch": torch.tanh, "drop_prob": 0.5, "training": training} | arguments
    with pytest.raises(error, match=message):
        trainops.stochastic_depth(**calls)


@pytest.mark.parametrize("mode", ["fixed", "bernoulli"])
def test_integers_are_not_dropped(mode):
    with pytest.raises(TypeError, match=r"floating-point tensors.*got torch\.int64"):
        trainops.stochastic_depth(X.long(), torch.neg, 0.5, True, mode=mode)
    assert trainops.stochastic_depth(X.long(), torch.neg, 0.5, False, mode=mode).dtype == torch.int64


@pytest.mark.parametrize("arguments", [{"drop_prob": 2.0}, {"mode": "batch"}])
def test_bad_module(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        trainops.StochasticDepth(**arguments)
