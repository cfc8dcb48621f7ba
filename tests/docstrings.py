"""The "Equivalent to" snippets of docstrings, and how each is compared with what it is about.

A snippet runs in a namespace in which the arguments stand under their own names. `CASES` has one for each.
"""

import copy
import inspect
import re
import textwrap

import torch
from documentation import surroundings
from drop_path_formulas import timm_drop_path
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import trainops


class FakeTimm:
    """timm's formula, which its tests hold to timm."""

    class layers:  # noqa: N801
        drop_path = staticmethod(timm_drop_path)


def snippets(about):
    """The literal blocks that a docstring says something is equivalent to."""
    text = inspect.getdoc(about) or ""
    found = re.findall(r"^(?:Equivalent to|or, in .* to)::\n\n((?:    .*\n|\n)+)", text + "\n", re.MULTILINE)
    return [textwrap.dedent(block).strip() for block in found]


def public():
    """Everything public that says what it is equivalent to, by name."""
    found = {name: getattr(trainops, name) for name in trainops.__all__}
    for name in list(found):
        if inspect.isclass(found[name]):
            found |= {f"{name}.{key}": x for key, x in inspect.getmembers(found[name], inspect.isfunction)}
    ours = {name: about for name, about in found.items() if about.__module__.startswith("trainops")}
    return {name: about for name, about in ours.items() if snippets(about)}


def tensors():
    """Arguments of functions of tensors, under the names that they have there."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), ())]
    for p in parameters:
        p.grad = torch.randn_like(p)
    lists = {name: [torch.randn(p.shape) for p in parameters] for name in ("tensors", "ema_tensors")}
    return {
        "torch": torch,
        "timm": FakeTimm,
        "trainops": trainops,
        "parameters": parameters,
        **lists,
        "max_norm": 0.5,
        "norm_type": 2.0,
        "error_if_nonfinite": False,
        "total_norm": torch.tensor(3.0),
        "clip_value": 0.1,
        "decay": 0.75,
        "x": torch.randn(6, 2, 3),
        "residual": torch.randn(6, 2, 3),
        "branch": torch.randn(6, 2, 3),
        "layer_scale": torch.rand(3),
        "drop_prob": 0.5,
        "training": True,
        "scale_by_keep": True,
    }


def numbers(x):
    """All tensors that a result or an argument holds."""
    if isinstance(x, torch.Tensor):
        return [x.detach(), *([] if x.grad is None else [x.grad])]
    if isinstance(x, torch.nn.Module):
        return [p.detach() for p in x.state_dict().values()]
    if isinstance(x, dict):
        return [tensor for key in x if key != "timm" for tensor in numbers(x[key])]
    return [tensor for part in x for tensor in numbers(part)] if isinstance(x, (list, tuple)) else []


def assert_same(ours, theirs):
    """Two namespaces, or two results."""
    ours, theirs = numbers(ours), numbers(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def evaluated(code, namespace, seed=1):
    """The value of a snippet."""
    torch.manual_seed(seed)
    return eval(code, namespace)


def call(name, code, make=tensors):
    """A function and a snippet that is a call: the same result, and the same in the arguments."""
    about = getattr(trainops, name)
    theirs, own = make(), make()
    result = evaluated(code, theirs)
    torch.manual_seed(1)
    arguments = [own[key] for key in inspect.signature(about).parameters if key in own]
    ours = about(*arguments)
    result = None if ours is None else result  # PyTorch's lists of tensors that changed in place
    assert_same([ours, own], [result, {key: theirs[key] for key in own}])


def stochastic_depth(name, code):
    """The first snippet is mode "fixed", the second one "bernoulli"."""
    theirs, own = tensors(), tensors()
    for namespace in (theirs, own):
        namespace |= {"branch": torch.sin, "batch": 6}
    mode = "fixed" if "kept" in code else "bernoulli"
    torch.manual_seed(1)
    if mode == "fixed":
        exec(code, theirs)
        result = theirs["out"]
    else:
        result = eval(code, theirs)
    torch.manual_seed(1)
    keys = ("residual", "branch", "drop_prob", "training", "scale_by_keep", "layer_scale")
    assert_same(trainops.stochastic_depth(*(own[key] for key in keys), mode=mode), result)


def multi_avg_fn(name, code):
    """Both functions, on the same averages."""
    theirs, own = tensors(), tensors()
    eval(code, theirs)(theirs["ema_tensors"], theirs["tensors"], 1)
    trainops.get_ema_multi_avg_fn(own["decay"])(own["ema_tensors"], own["tensors"], 1)
    assert_same(own["ema_tensors"], theirs["ema_tensors"])


def tensor_stats(name, code):
    """A tuple for each tensor, in the order of the first statistics."""
    given = tensors()
    found = trainops.tensor_stats(given["tensors"])
    names = ("min", "max", "mean", "std", "l1_norm", "l2_norm", "amax")
    ours = [[getattr(found, name)[i].float() for name in names] for i in range(len(given["tensors"]))]
    assert_same(ours, [[x.float() for x in row] for row in eval(code, given)])


def optimizer(name, code):
    """Three steps, of which the gradients of one are bad."""
    theirs, own = surroundings(), surroundings()
    decay, lr = 0.9, 0.01
    theirs["ema"] = trainops.EMA(theirs["model"], decay)
    theirs |= {"max_grad_norm": 0.5, "params": list(theirs["model"].parameters())}
    theirs["optimizer"] = torch.optim.AdamW(theirs["params"], lr)
    ema = trainops.EMA(own["model"], decay)
    ours = trainops.AdamW(own["model"].parameters(), lr, max_grad_norm=0.5, skip_nonfinite=True, ema=ema)
    for step in range(3):
        for namespace in (theirs, own):
            namespace["model"].zero_grad()
            namespace["loss_of"](namespace["model"]).backward()
            if step == 1:
                namespace["model"][0].bias.grad[0] = float("nan")
        exec(code, theirs)
        ours.step()
        assert_same([own["model"], ema.module], [theirs["model"], theirs["ema"].module])
    assert int(ours.skipped_steps) == 1


def average(name, code, of="torch"):
    """Three updates of one of the classes; the comments have their calls."""
    statements = re.findall(r"^ema = (\w+)\.((?:.|\n)*?)# (ema\..*?\))", code, re.MULTILINE)
    assert [root for root, _, _ in statements] == ["timm", "torch", "diffusers"]
    root, made, update = next(found for found in statements if found[0] == of)
    theirs = surroundings() | {"decay": 0.9, "get_ema_multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn}
    theirs[root] = __import__(f"{root}.training_utils" if root == "diffusers" else root)
    theirs["parameters"] = list(theirs["model"].parameters())
    theirs["ema"] = eval(f"{root}.{made}", theirs)
    model = copy.deepcopy(theirs["model"])
    ema = trainops.EMA(model, trainops.DiffusersDecay() if root == "diffusers" else 0.9)
    for step in range(1, 4):
        for weights in zip(model.parameters(), theirs["model"].parameters(), strict=True):
            for p in weights:
                p.data.mul_(1 + 0.1 * step)
        exec(update, theirs | {"step": step})
        ema.update()
    its = theirs["ema"]
    shadows = its.shadow_params if root == "diffusers" else list(its.module.parameters())
    assert_same(list(ema.module.parameters()), list(shadows))


def full_state_dict(name, code):
    """Of a model that nobody has sharded."""
    ema = surroundings()["ema"]
    *first, last = code.splitlines()
    names = {"StateDictOptions": StateDictOptions, "get_model_state_dict": get_model_state_dict}
    namespace = names | {"averaged_model": ema.module}
    exec("\n".join(first), namespace)
    assert_same(ema.full_state_dict(), eval(last, namespace))


CASES = {
    "AdamW": optimizer,
    "EMA": average,
    "EMA.full_state_dict": full_state_dict,
    "get_ema_multi_avg_fn": multi_avg_fn,
    "stochastic_depth": stochastic_depth,
    "tensor_stats": tensor_stats,
}
