"""What runs a model and its backward pass from a seed."""

from drop_path_formulas import seeded


def run_block(call, block, x):
    """The output and the gradients of a call of ``block`` or of what wraps it."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    out = seeded(call, x)
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in block.parameters())]
