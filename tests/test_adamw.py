"""AdamW and the fused step: numbers, state, skipping, and everything a caller may do with an optimizer."""

import numpy as np
import pytest
import torch
from conftest import assert_contract, exact

import trainops

OPTIONS = {
    "plain": {},
    "no_decay": {"weight_decay": 0.0},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "amsgrad_maximize": {"amsgrad": True, "maximize": True},
    "low_betas": {"betas": (0.3, 0.4), "eps": 1e-4, "weight_decay": 0.3},
    "zero_betas": {"betas": (0.0, 0.0), "eps": 1e-3},
}
STEPS = [1, 100]


class Model(torch.nn.Module):
    """Parameters and nothing else."""

    def __init__(self, tensors):
        super().__init__()
        self.params = torch.nn.ParameterList(torch.nn.Parameter(x) for x in tensors)


def make_model(shapes, dtype, device):
    return Model([torch.randn(shape, device=device).to(dtype) for shape in shapes])


def make_grads(shapes, dtype, device, steps):
    """Gradients that grow and shrink, so that clipping and AMSGrad have something to do."""
    scales = [1.0 + 0.9 * np.sin(i) for i in range(steps)]
    return [[(scale * torch.randn(shape, device=device)).to(dtype) for shape in shapes] for scale in scales]


def run(optimizer, params, grads, after=lambda: None):
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        after()


def exact_adamw(
    params,
    grads,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=1e-2,
    amsgrad=False,
    maximize=False,
    max_norm=None,
):
    """The paper's algorithm in extended precision: the parameters and the state after all steps."""
    beta1, beta2 = (np.longdouble(beta) for beta in betas)
    p = [exact(x) for x in params]
    m, v, v_max = ([np.zeros_like(x) for x in p] for _ in range(3))
    for t, step_grads in enumerate(grads, start=1):
        g = [exact(x) for x in step_grads]
        norm = np.sqrt(sum((x * x).sum() for x in g))
        coefficient = 1 if max_norm is None else min(1, max_norm / (norm + np.longdouble(1e-6)))
        for i in range(len(p)):
            gi = g[i] * coefficient * (-1 if maximize else 1)
            p[i] = p[i] * (1 - np.longdouble(lr) * np.longdouble(weight_decay))
            m[i] = beta1 * m[i] + (1 - beta1) * gi
            v[i] = beta2 * v[i] + (1 - beta2) * gi * gi
            v_max[i] = np.maximum(v_max[i], v[i])
            v_hat = (v_max[i] if amsgrad else v[i]) / (1 - beta2**t)
            p[i] = p[i] - lr * (m[i] / (1 - beta1**t)) / (np.sqrt(v_hat) + eps)
    states = {"exp_avg": m, "exp_avg_sq": v} | ({"max_exp_avg_sq": v_max} if amsgrad else {})
    return p, states


def assert_optimizers_agree(ours, torchs, our_params, torch_params, true_params, true_states):
    for i, (p, q) in enumerate(zip(our_params, torch_params, strict=True)):
        assert_contract(p, q, true_params[i], f"parameter {i}")
        assert ours.state[p]["step"] == torchs.state[q]["step"]
        for name, true in true_states.items():
            assert_contract(ours.state[p][name], torchs.state[q][name], true[i], f"{name} {i}")


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_matches_exact_for_all_options(target, dtype, options, steps):
    # Tensors large enough that PyTorch's largest error in 16 bits is no matter of luck.
    check_step(target, dtype, [(33, 31), (127,)], options, steps)


def test_matches_exact_for_all_shapes(target, dtype, shapes):
    check_step(target, dtype, shapes, {}, 1)


def check_step(target, dtype, shapes, options, steps):
    options = {"lr": 1e-2} | options
    ours = make_model(shapes, dtype, target.device)
    torchs = make_model(shapes, dtype, target.device)
    torchs.load_state_dict(ours.state_dict())
    grads = make_grads(shapes, dtype, target.device, steps)
    true_params, true_states = exact_adamw(ours.params, grads, **options)
    our_optimizer = trainops.AdamW(ours.parameters(), backend=target.backend, **options)
    torch_optimizer = torch.optim.AdamW(torchs.parameters(), foreach=False, **options)
    run(our_optimizer, ours.params, grads)
    run(torch_optimizer, torchs.params, grads)
    assert_optimizers_agree(our_optimizer, torch_optimizer, ours.params, torchs.params, true_params, true_states)
