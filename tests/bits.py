"""The bits of every result over the configurations of `bits_cases.py`, to be compared before and after a change.

    python tests/bits.py record FILE.json [BACKEND ...]    on each backend that is here, or on those
    python tests/bits.py compare BEFORE.json AFTER.json    lists what differs; 1 if anything does or is missing

Data depend on the name of a configuration alone. What one machine and one PyTorch give says nothing about others:
record both files there. Triton's interpreter, which is slow, has a sample, on fewer tensors and steps.
"""

import collections
import functools
import hashlib
import itertools
import json
import math
import os
import random
import sys
import time
import warnings
import zlib
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import interpreter
import targets
from bits_cases import functions, optimizers
from fuzz import Guards, World, randoms

import trainops

EVERY = 13  # the interpreter's sample: each so many-th configuration
FEW, SMALL = 4, 2049  # its tensors, and their elements


# Optimizers


class Run(World):
    """A case, which may also go on from a state of PyTorch's AdamW."""

    def prepare(self, step):
        super().prepare(step)
        if step.before == "torch":
            other = torch.optim.AdamW([{**group} for group in self.optimizer.param_groups])
            other.load_state_dict(self.optimizer.state_dict())
            other.step()
            self.optimizer.load_state_dict(other.state_dict())


def optimize(case, target):
    if target == targets.INTERPRETER:
        case.rows = [row for row in case.rows if math.prod(row.shape) <= SMALL][:FEW]
        case.steps = case.steps[:3]
    run, found = Run(case, target), {}
    for i, step in enumerate(case.steps):
        run.prepare(step)
        run.set_grads(step, case.seed + i)
        run.step(step)
        own = {name: getattr(run.optimizer, name) for name in ("grad_norm", "grad_norms", "skipped_steps")}
        found |= {f"{name} of step {i}": copied(x) for name, x in own.items()}
    grads = {f"grad {i}": p.grad for i, p in enumerate(run.model.params)}
    run.guards.check()
    return found | run.tensors() | grads | {"updates": run.ema and run.ema.step}


def copied(x):
    return x.clone() if isinstance(x, torch.Tensor) else x


# Functions of tensors


class Maker:
    """Makes the tensors of a configuration, amid memory that is watched."""

    def __init__(self, name, target):
        self.target, self.generator = target, torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.guards = Guards(target.device)
        # Some ask for their backend by the environment, as modules must.
        self.own = {"backend": target.backend} if zlib.crc32(name.encode()) % 3 else {}

    def one(self, shape, dtype, layout="plain", scale=1.0):
        return self.guards.place(randoms(shape, dtype, self.generator, scale), layout)

    def several(self, pairs, layout="plain", scale=1.0):
        if self.target == targets.INTERPRETER:
            pairs = [pair for pair in pairs if math.prod(pair[0]) <= SMALL][:FEW]
        return [self.one(shape, dtype, layout, scale) for shape, dtype in pairs]


def norms(make, pairs, layout, norm_type, poison):
    grads, found = make.several(pairs, layout, 3.0), {}
    if poison is not None and grads and grads[-1].numel():
        grads[-1][(0,) * grads[-1].ndim] = poison
    params, starts = [torch.nn.Parameter(torch.zeros_like(x)) for x in grads], [x.clone() for x in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    for max_norm in (0.5, 0.0, 1e9, math.inf):
        for grad, start in zip(grads, starts, strict=True):
            grad.copy_(start)
        found[f"{max_norm}: total"] = trainops.get_total_norm(grads, norm_type, **make.own)
        found[f"{max_norm}: returned"] = norm = trainops.clip_grad_norm_(params, max_norm, norm_type, **make.own)
        trainops.clip_grads_with_norm_(params, max_norm, norm * 0.7, **make.own)
        found |= {f"{max_norm}: grad {i}": x.clone() for i, x in enumerate(grads)}
    for grad, start in zip(grads, starts, strict=True):
        grad.copy_(start)
    if not any(x.is_complex() for x in grads):  # PyTorch has none of these
        trainops.clip_grad_value_(params, 0.7, **make.own)
    return found | {f"clamped {i}": x for i, x in enumerate(grads)}


def averages(make, pairs, layout, other):
    sources = make.several(pairs)
    theirs = [(shape, dtype if other is None or dtype.is_complex else other) for shape, dtype in pairs]
    moved, found = make.several(theirs, layout), {}
    for decay in (0.9, 0.3, 0.9999, 1.0, 0.0):
        trainops.ema_update_(moved, sources, decay, **make.own)
        found |= {f"{decay}: {i}": x.clone() for i, x in enumerate(moved)}
        sources = [-2 * x for x in sources]
    trainops.get_ema_multi_avg_fn(0.9)(moved, sources, 3)
    return found | {f"multi: {i}": x for i, x in enumerate(moved)}


def drop(make, shape, dtype, rate, layout):
    own, last, each = make.own, shape[-1:] if len(shape) > 1 else (), (1, *shape[1:])

    def add(x, residual, scale=None):
        return trainops.drop_path_add(residual, x, rate, True, layer_scale=scale, **own)

    def depth(mode, scale_by_keep, x, scale):
        options = {"mode": mode, "scale_by_keep": scale_by_keep, "layer_scale": scale, **own}
        return trainops.stochastic_depth(x, lambda kept: kept * kept, rate, True, **options)

    calls = {
        "scaled": (lambda x: trainops.drop_path(x, rate, True, **own), shape),
        "unscaled": (lambda x: trainops.drop_path(x, rate, True, False, **own), shape),
        "evaluation": (lambda x: trainops.drop_path(x, rate, False, **own), shape),
        "module": (trainops.DropPath(rate), shape),
        "add": (add, shape, shape),
        "layer scale": (add, shape, shape, last),
        "whole scale": (add, shape, shape, each),
        "broadcast": (add, shape, each, last),
        "scalars": (add, shape, (), ()),
        "wide residual": (lambda x, r: add(x, r.float()), shape, shape),
        "wide scale": (lambda x, r, s: add(x, r, s.float()), shape, shape, last),
        "add module": (lambda x, r, s: trainops.DropPathAdd(rate)(r, x, s), shape, shape, last),
        "depth module": (lambda x: trainops.StochasticDepth(rate)(x, torch.sin), shape),
    }
    for mode, scaled in itertools.product(("fixed", "bernoulli"), (True, False)):
        calls[f"depth {mode} {scaled}"] = functools.partial(depth, mode, scaled), shape, last
    found = {}
    for name, (call, *shapes) in calls.items():
        leaves = [make.one(each, dtype, layout).requires_grad_() for each in shapes]
        out = call(*leaves)
        (out * make.one(out.shape, out.dtype)).sum().backward()
        found |= {f"{name}: gradient {i}": x.grad for i, x in enumerate(leaves)} | {f"{name}: out": out}
    return found


def choice(make, dtype):
    """Whom the argument, the environment and the device choose, by what they do; and what is no backend."""
    found, names = {}, (None, "reference", make.target.backend, "nonsense")
    for argument, environment in itertools.product(names, names):
        os.environ.pop("TRAINOPS_BACKEND", None)
        if environment is not None:
            os.environ["TRAINOPS_BACKEND"] = environment
        param = torch.nn.Parameter(make.one((1025,), dtype))
        param.grad = make.one((1025,), dtype)
        try:
            optimizer = trainops.AdamW([param], max_grad_norm=0.5, backend=argument)
            optimizer.step()
            result = {"param": param, "norm": optimizer.grad_norm}
        except (ValueError, RuntimeError) as error:
            result = {"error": type(error).__name__}
        found |= {f"{argument}, {environment}: {name}": x for name, x in result.items()}
    return found


# Record and compare


def digest(x):
    """What a tensor is, and a hash of its bits; before it one without what its NaNs carry, where it has some."""
    if not isinstance(x, torch.Tensor):
        return repr(x)
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]
    kind = f"{x.dtype} {list(x.shape)} {strides}"
    x = x.detach().resolve_conj().resolve_neg().cpu().clone(memory_format=torch.contiguous_format)
    x = torch.view_as_real(x) if x.is_complex() else x
    every = [torch.where(x.isnan(), torch.nan, x), x] if x.is_floating_point() and x.isnan().any() else [x]
    return " ".join([kind, *(hashlib.sha256(y.reshape(-1).view(torch.uint8).numpy()).hexdigest() for y in every)])


def configurations(target):
    """Names, and what gives the results of each."""
    for name, case in optimizers():
        yield name, repr(case), functools.partial(optimize, case, target)
    for name, (function, *args) in functions():
        call = functools.partial(globals()[function], Maker(name, target), *args)
        yield name, repr(args), call


def outcome(name, target, call):
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    torch.set_num_threads(2 if target.backend == "cpu" and seed % 8 == 0 else 1)
    os.environ["TRAINOPS_BACKEND"] = target.backend
    try:
        return {key: digest(x) for key, x in call().items()}
    except Exception as error:
        return {"raised": type(error).__name__}


def record(file, *backends):
    warnings.simplefilter("ignore")
    results = {}
    about = {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability()}
    for target in targets.TARGETS:
        if backends and target.backend not in backends:
            continue
        is_interpreted = target == targets.INTERPRETER
        if is_interpreted:
            interpreter.mend()
        start, found = time.perf_counter(), {}
        for name, what, call in itertools.islice(configurations(target), 0, None, EVERY if is_interpreted else 1):
            assert name not in found, name
            found[name] = {"configuration": hashlib.sha256(what.encode()).hexdigest()} | outcome(name, target, call)
        raised = collections.Counter(x["raised"] for x in found.values() if "raised" in x)
        results["-".join(target)] = found
        Path(file).write_text(json.dumps({"about": about, "results": results}, indent=0))
        seconds = time.perf_counter() - start
        print(f"{'-'.join(target)}: {counted(found)}, {seconds:.0f} s, raised: {dict(raised)}", flush=True)
    return 0


def counted(found):
    return f"{len(found)} configurations, {sum(map(len, found.values())) - len(found)} results"


def compare(before, after):
    files = [json.loads(Path(file).read_text()) for file in (before, after)]
    if files[0]["about"] != files[1]["about"]:
        print(f"not recorded alike: {files[0]['about']} and {files[1]['about']}")
    results, count = [file["results"] for file in files], 0
    for target in dict.fromkeys(itertools.chain(*results)):
        if any(target not in each for each in results):
            print(f"{target}: only in {before if target in results[0] else after}")
            count += 1
            continue
        ours, theirs = (each[target] for each in results)
        differing = {name: differences(ours.get(name, {}), theirs.get(name, {})) for name in {**ours, **theirs}}
        for name, found in differing.items():
            if found:
                print(f"{target}: {name}: {'; '.join(found)}")
        total = sum(map(len, differing.values()))
        print(f"{target}: {counted(ours)}, {total} differ, in {sum(map(bool, differing.values()))} configurations")
        count += total
    return int(count > 0)


def differences(old, new):
    """What differs in one configuration, in words."""
    if not old or not new:
        return ["only before" if old else "only after"]
    if old["configuration"] != new["configuration"]:
        return ["is another configuration"]
    found = []
    for name in {**old, **new}:
        a, b = old.get(name, "absent").rsplit(" ", 1), new.get(name, "absent").rsplit(" ", 1)
        if a != b:
            is_alike = a[0] == b[0] and len(a[0].split("]")[-1].split()) > 0
            found.append(f"{name} (only in what a NaN carries)" if is_alike else name)
    return found


if __name__ == "__main__":
    commands = {"record": record, "compare": compare}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    sys.exit(commands[sys.argv[1]](*sys.argv[2:]))
