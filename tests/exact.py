"""The papers' formulas in extended precision (80 bits on x86), with the terms that each result is made of."""

import numpy as np
from contract import Exact, exact

ONE = np.longdouble(1)

# What kernels call the norms that they have, by order.
STATISTICS = {1.0: "l1_norm", 2.0: "l2_norm", np.inf: "inf_norm"}


def norm(arrays, order=2.0):
    """The norm of all arrays as one vector."""
    every = np.concatenate([np.abs(x).ravel() for x in arrays]) if arrays else np.zeros(1, np.longdouble)
    if order == np.inf:
        return every.max(initial=np.longdouble(0))
    if order == 0:
        return np.longdouble(np.count_nonzero(every))
    return (every ** np.longdouble(order)).sum() ** (ONE / np.longdouble(order))


def magnitudes(x):
    """Of a tensor's elements."""
    true = exact(x)
    return np.hypot(true[..., 0], true[..., 1]) if x.is_complex() else np.abs(true)


def clip_coefficient(total_norm, max_norm):
    """What clipping multiplies gradients with; NaN where the norm is NaN."""
    if max_norm is None:
        return ONE
    return np.minimum(ONE, np.longdouble(float(max_norm)) / (total_norm + np.longdouble(1e-6)))


def lerp(start, end, weight):
    """From one to the other; of infinities it makes what ``torch.lerp`` makes of them."""
    return start + weight * (end - start) if weight < 0.5 else end - (1 - weight) * (end - start)


def bias_correction(beta, step):
    """``1 - beta**step`` without the cancellation."""
    return -np.expm1(step * np.log1p(beta - 1)) if beta > 0 else ONE


def adamw_step(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    step,
    *,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=1e-2,
    amsgrad=False,
    maximize=False,
    coefficient=ONE,
    penalty=0.0,
):
    """Step number ``step`` (from 1) of arXiv:1711.05101, algorithm 2: what each tensor is afterwards, by name."""
    beta1, beta2, lr, eps = (np.longdouble(float(x)) for x in (*betas, lr, eps))
    g, g_terms = penalized(param, grad, coefficient, maximize, penalty)
    m, m_terms = lerp(exp_avg, g, 1 - beta1), beta1 * np.abs(exp_avg) + (1 - beta1) * g_terms
    v, v_terms = (beta2 * exp_avg_sq + (1 - beta2) * x * x for x in (g, g_terms))
    v_max = np.maximum(max_exp_avg_sq, v) if amsgrad else v
    step_size = lr / bias_correction(beta1, step) / (np.sqrt(v_max / bias_correction(beta2, step)) + eps)
    decayed = param * (1 - lr * np.longdouble(weight_decay))
    results = {
        "param": Exact(decayed - step_size * m, np.abs(decayed) + step_size * m_terms),
        "exp_avg": Exact(m, m_terms),
        "exp_avg_sq": Exact(v, v_terms),
    }
    return results | ({"max_exp_avg_sq": Exact(v_max, np.maximum(v_max, v_terms))} if amsgrad else {})


def penalized(param, grad, coefficient, maximize, penalty):
    """The gradient of a loss with an L2 penalty, and the magnitudes of its terms."""
    g = Exact(grad * (-coefficient if maximize else coefficient), np.abs(grad * coefficient))
    if penalty == 0:
        return g
    added = np.longdouble(penalty) * param
    return Exact(g.value + added, g.terms + np.abs(added))


def adam_step(*tensors, weight_decay=0.0, **options):
    """Step number ``step`` of arXiv:1412.6980, algorithm 1: AdamW, but for the penalty in place of its decay."""
    return adamw_step(*tensors, weight_decay=0.0, penalty=weight_decay, **options)


def sgd_step(
    param,
    grad,
    momentum_buffer,
    step,
    *,
    lr=1e-3,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
    coefficient=ONE,
):
    """Step number ``step`` (from 1) of SGD, as torch.optim.SGD documents it."""
    lr, momentum, dampening = (np.longdouble(float(x)) for x in (lr, momentum, dampening))
    g = direction = penalized(param, grad, coefficient, maximize, weight_decay)
    results = {}
    if momentum != 0:
        b = direction = g
        if step > 1:
            b = direction = Exact(
                momentum * momentum_buffer + (1 - dampening) * g.value,
                momentum * np.abs(momentum_buffer) + (1 - dampening) * g.terms,
            )
        if nesterov:
            direction = Exact(g.value + momentum * b.value, g.terms + momentum * b.terms)
        results["momentum_buffer"] = b
    return results | {"param": Exact(param - lr * direction.value, np.abs(param) + lr * direction.terms)}


def trained(step, names, params, grads, max_norm=None, **options):
    """All steps, one after the other, for lists of tensors: a dictionary as of ``adamw_step`` for each parameter.

    ``step``: a function like ``adamw_step``. ``names``: of the state that it takes.
    """
    rows = [(exact(p), *(np.zeros(p.shape, np.longdouble) for _ in names)) for p in params]
    for t, step_grads in enumerate(grads, start=1):
        arrays = [exact(x) for x in step_grads]
        coefficient = clip_coefficient(norm(arrays), max_norm)
        results = [
            step(p, g, *state, t, coefficient=coefficient, **options)
            for (p, *state), g in zip(rows, arrays, strict=True)
        ]
        rows = [
            (new["param"].value, *(new[name].value if name in new else x for name, x in zip(names, old, strict=True)))
            for new, (_, *old) in zip(results, rows, strict=True)
        ]
    return results


def ema(average, tensor, decay):
    """One update of an average: decay 0 copies, decay 1 keeps, and equal values stay, infinities included."""
    if decay in (0, 1):
        moved = average if decay else tensor
        return Exact(moved, np.zeros_like(moved))  # no arithmetic, which could lose something
    decay = np.longdouble(decay)
    moved = np.where(average == tensor, average, lerp(average, tensor, 1 - decay))
    return Exact(moved, decay * np.abs(average) + (1 - decay) * np.abs(tensor))


def ema_of(average, tensors, decay):
    """The average after it has followed all tensors, one after the other."""
    average = exact(average)
    for x in tensors:
        average = ema(average, exact(x), decay).value
    return average
