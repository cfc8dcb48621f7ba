"""The configurations of `bits.py`: optimizers, and calls of the functions of tensors."""

import itertools
import random
import zlib

import torch
from fuzz import FLOATS, LAYOUTS, SHAPES, Case, Row, Step

F32, F64, BF16, F16 = FLOATS
COMPLEX = [torch.complex64, torch.complex128]
NAN, INF = float("nan"), float("inf")
SIZES = [(), (0,), (1,), (127,), (1025,), (8193,)]
MIXED = [*SIZES, (33, 31), (2, 3, 4, 5), (70000,), (2, 0, 3), (7,)]
GRAD_LAYOUTS = [*LAYOUTS, "expanded", "lazy"]
GROUPS = {
    "plain": {},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.3},
    "maximize": {"maximize": True, "weight_decay": 0.0},
    "both": {"amsgrad": True, "maximize": True, "lr": 0.03},
    "low betas": {"betas": (0.3, 0.4), "eps": 1e-4, "lr": 0.1},
    "betas of 0": {"betas": (0.0, 0.0), "eps": 1e-3},
    "betas near 1": {"betas": (0.999, 1 - 1e-7), "eps": 0.0},
    "tensor lr": {"lr": torch.tensor(0.02), "weight_decay": 0.1},
    "float64 lr": {"lr": torch.tensor([0.02], dtype=F64), "amsgrad": True},
}
# Types of parameters, and their masters, that 8-bit state is for.
STORED = [(F32, None), (BF16, None), (BF16, "split"), (F16, "float32")]


# Optimizers


def rows(shapes, dtype=F32, groups=1, layout="plain", grad_layout="plain", grad_dtype=None):
    grad_dtype = None if grad_dtype == dtype else grad_dtype
    return [Row(s, dtype, layout, grad_layout, group, grad_dtype) for group in range(groups) for s in shapes]


def steps(count=5, changes=None, **always):
    """Steps whose gradients grow and shrink; ``changes``: what is special about some, by their number."""
    plain = {"missing": [False], "poison": None, "grad_scale": None, "found_inf": None}
    plain |= {"before": "nothing", "layout": "plain", "dtype": F32}
    scales = itertools.cycle([1.0, 30.0, 1e-3, 0.5, 3.0])
    return [Step(**{"scale": next(scales), **plain, **always, **(changes or {}).get(i, {})}) for i in range(count)]


def optimizers():
    """Pairs of a name and a case."""

    def named(*words, rows, groups=({},), settings=None, ema=None, fused=True, steps=()):
        name = " ".join(str(x).removeprefix("torch.") for x in words)
        return name, Case(rows, list(groups), settings or {}, ema, fused, list(steps), zlib.crc32(name.encode()))

    clipped = {"max_grad_norm": 0.5, "skip_nonfinite": True}
    two = [GROUPS["plain"], GROUPS["both"]]
    for types in [*itertools.product(FLOATS, repeat=4), *((x, x, x, None) for x in COMPLEX)]:
        dtype, grad_dtype, state_dtype, average_dtype = types
        restated = steps(changes={1: {"before": "restate", "dtype": state_dtype}})
        own = {"groups": two, "settings": clipped, "ema": {"decay": 0.9, "dtype": average_dtype}, "steps": restated}
        yield named("dtypes", *types, rows=rows([(127,), (1,), (2049,)], dtype, 2, grad_dtype=grad_dtype), **own)
    poisoned = steps(6, {2: {"poison": NAN}, 4: {"poison": -INF}})
    for mixed, option, norm, skips, averages in itertools.product(
        (False, True), GROUPS, (None, 0.5, 0.0, INF), (False, True), (False, True)
    ):
        dtype, state_dtype = (BF16, F32) if mixed else (F32, F32)
        own = {"settings": {"max_grad_norm": norm, "skip_nonfinite": skips}, "groups": [GROUPS[option]]}
        own |= {"ema": {"decay": 0.99, "dtype": F32, "update_after_step": -2} if averages else None}
        how = poisoned if skips else steps(changes={1: {"before": "restate", "dtype": state_dtype}})
        yield named("options", dtype, option, norm, skips, averages, rows=rows(SIZES, dtype), steps=how, **own)
    for norm, skips, poison in itertools.product((None, 0.5, 0.0), (False, True), (NAN, INF, -INF)):
        how = steps(changes={4: {"poison": poison}})
        own = {"settings": {"max_grad_norm": norm, "skip_nonfinite": skips}, "ema": {"decay": 0.9}}
        yield named("poison", norm, skips, poison, rows=rows(SIZES), steps=how, **own)
    for scale, found, norm, skips, averages in itertools.product(
        (None, 1.0, 3.0, 65536.0), (None, 0.0, 1.0), (None, 0.5), (False, True), (False, True)
    ):
        dtype = F16 if averages else F32
        how = steps(changes={2: {"found_inf": found}, 3: {"poison": INF if skips else None}}, grad_scale=scale)
        own = {"settings": {"max_grad_norm": norm, "skip_nonfinite": skips}, "steps": how, "groups": two}
        own |= {"ema": {"decay": 0.9, "dtype": F32} if averages else None}
        yield named("scaler", scale, found, norm, skips, averages, rows=rows(SIZES, dtype, 2), **own)
    averages = [{}, {"min_decay": 0.6}, {"update_after_step": 2}, {"update_after_step": -2}, {"update_every": 2}]
    averages += [{"average_buffers": False}, {"update_every": 3, "update_after_step": 1}]
    for more, warmup, decay, dtype, fused in itertools.product(
        averages, (False, True), (0.9999, 0.5), ((F32, None), (BF16, F32), (F32, F64)), (False, True)
    ):
        own = {"ema": {"decay": decay, "warmup": warmup, "dtype": dtype[1], **more}, "fused": fused}
        words = ("average", *dtype, more, warmup, decay, fused)
        yield named(*words, rows=rows([(), (127,), (1025,)], dtype[0]), steps=steps(8), **own)
    for decay, warmup in itertools.product((0.0, 0.3, 1.0), (False, True)):
        yield named("decay", decay, warmup, rows=rows(SIZES), ema={"decay": decay, "warmup": warmup}, steps=steps())
    places = list(enumerate(itertools.product((F32, BF16, COMPLEX[0]), LAYOUTS, GRAD_LAYOUTS)))
    for i, (dtype, layout, grad_layout) in places:
        state = {"before": "restate", "layout": LAYOUTS[i % len(LAYOUTS)], "dtype": (F32, dtype)[i % 2]}
        own = {"steps": steps(changes={1: state}), "settings": clipped, "ema": {"decay": 0.9}, "groups": two}
        shapes = [(33, 31), (2, 3, 4, 5), (1025,), (1,)]
        yield named("layout", dtype, layout, grad_layout, rows=rows(shapes, dtype, 2, layout, grad_layout), **own)
    for dtype, before in itertools.product((*FLOATS, COMPLEX[0]), ("torch", "reload", "pickle", "replace", "late")):
        how = steps(10, {i: {"before": before, "layout": LAYOUTS[i % len(LAYOUTS)]} for i in (2, 5, 6)})
        own = {"steps": how, "settings": clipped, "ema": {"decay": 0.9}, "groups": two}
        yield named("between steps", before, dtype, rows=rows([(), (127,), (33, 31)], dtype, 2), **own)
    pairs = ("int8", ("int8", BF16), (F32, "int8"), None)
    for (dtype, master), state_dtype, averages in itertools.product(STORED, pairs, (False, True)):
        is_random = dtype == BF16 and master is None
        own = {"settings": clipped | {"state_dtype": state_dtype, "master": master, "stochastic_rounding": is_random}}
        own |= {"ema": {"decay": 0.9, "dtype": dtype, "stochastic_rounding": is_random} if averages else None}
        how = steps(8, {2: {"poison": NAN}, 4: {"before": "reload"}, 6: {"before": "late"}})
        yield named("stored", dtype, master, state_dtype, averages, rows=rows(MIXED, dtype, 2), steps=how, **own)
    lists = {dtype: rows(MIXED, dtype, 2) for dtype in FLOATS}
    lists |= {"all dtypes": [row for dtype in [*FLOATS, *COMPLEX] for row in rows(MIXED[:8], dtype, 2)]}
    lists |= {
        "300 of 5": rows([(5,)] * 300, F32),
        "100 groups": rows([(3,), (9,)], BF16, 50),
        "nothing": rows([(0,)]),
    }
    for (which, tensors), missing in itertools.product(lists.items(), ([False], [False, True, False], [True])):
        groups = [
            GROUPS[name] for name in itertools.islice(itertools.cycle(GROUPS), 50 if len(tensors) == 100 else 4)
        ]
        own = {"steps": steps(changes={i: {"missing": missing} for i in (0, 3)}), "groups": groups}
        yield named("list", which, missing, rows=tensors, settings=clipped, ema={"decay": 0.9}, **own)
    for i in range(300):
        yield named("random", i, **drawn(random.Random(f"bits {i}")))
    for i in range(100):
        yield named("random storage", i, **with_storage(random.Random(f"storage {i}")))


def drawn(rng):
    """A random optimizer: what fuzz.py draws, without its engine, whose choices follow the source of the package."""

    def some(**choices):
        return {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.5}

    dtypes = rng.choice([[F32], [F64], [BF16], [F16], FLOATS, [*COMPLEX, F32]])
    rates = [
        0.0,
        0.1,
        *(torch.tensor(x, dtype=dtype) for x in (0.1, [1e-2]) for dtype in FLOATS[:3]),
        torch.tensor(1),
    ]
    betas = list(itertools.product([0.9, 0.0, 0.3, 0.5, 0.999, 1 - 1e-7], repeat=2))
    flags, decays = [False, True], [0.9, 0.0, 0.3, 0.5, 0.9999, 1.0]
    own = {"eps": [1e-3, 0.0], "weight_decay": [0.0, 0.5, 3.0], "amsgrad": flags, "maximize": flags}
    average = {"dtype": FLOATS, "warmup": flags, "min_decay": [0.0, 0.6], "update_after_step": [-2, 0, 1]}
    average |= {"update_every": [1, 2], "average_buffers": flags}

    def row():
        layouts = rng.choice(["plain", *LAYOUTS]), rng.choice(["plain", *GRAD_LAYOUTS])
        grad_dtype = rng.choice([None] * 6 + FLOATS)
        return Row(rng.choice([*SHAPES, (2049,)]), rng.choice(dtypes), *layouts, rng.randrange(3), grad_dtype)

    def step():
        missing = rng.choice([[False], [False], [True, False], [False, False, True]])
        poison = rng.choice([None] * 7 + [NAN, INF, -INF])
        scaler = rng.choice([None, None, 1.0, 3.0, 65536.0]), rng.choice([None, 0.0, 0.0, 1.0])
        before = rng.choice(["nothing"] * 6 + ["reload", "pickle", "replace", "restate", "cast", "late"])
        scale = rng.choice([1.0, 1e-3, 30.0])
        return Step(scale, missing, poison, *scaler, before, rng.choice(LAYOUTS), rng.choice(FLOATS))

    return {
        "rows": [row() for _ in range(rng.randint(1, 7))],
        "groups": [some(lr=rates, betas=betas, **own) for _ in range(rng.randint(1, 3))],
        "settings": some(max_grad_norm=[0.5, 0.0, 1e-3, 1e9, INF, torch.tensor([0.25])], skip_nonfinite=flags),
        "ema": {"decay": rng.choice(decays), **some(**average)} if rng.random() < 0.7 else None,
        "fused": rng.random() < 0.8,
        "steps": [step() for _ in range(rng.randint(3, 7))],
    }


def with_storage(rng):
    """The same, with what says how state and weights are stored, as far as the parameters' dtypes allow it."""
    case = drawn(rng)
    state_dtypes = ["int8", ("int8", BF16), (F32, "int8"), (BF16, "int8"), BF16, None]
    own = {"state_dtype": rng.choice(state_dtypes), "stochastic_rounding": rng.random() < 0.5}
    case["settings"] |= own | {"master": rng.choice([None, None, "split", "float32"])}
    if case["ema"] is not None:
        case["ema"]["stochastic_rounding"] = rng.random() < 0.5
    return case


# Functions of tensors


def functions():
    """Pairs of a name and what to call: norms, averages, drop or choice, and its arguments."""

    def named(function, *args, words):
        return " ".join(str(x).removeprefix("torch.") for x in (function, *words)), (function, *args)

    lists = {dtype: [(shape, dtype) for shape in MIXED] for dtype in [*FLOATS, *COMPLEX]}
    lists |= {
        "mixed": [(shape, dtype) for dtype in FLOATS for shape in MIXED],
        "none": [],
        "many": [((5,), F32)] * 300,
    }
    types = (1.0, 2, INF, 3.0)
    how = [("plain", norm_type, None) for norm_type in types] + [("offset 1", 2, INF), ("plain", 2, NAN)]
    how += [("plain", 1.0, NAN), ("plain", INF, INF), *((x, types[i % 3], None) for i, x in enumerate(LAYOUTS[1:]))]
    for (which, pairs), (layout, norm_type, poison) in itertools.product(lists.items(), how):
        yield named("norms", pairs, layout, norm_type, poison, words=(which, layout, norm_type, poison))
    for (which, pairs), layout, other in itertools.product(lists.items(), LAYOUTS, (None, *FLOATS)):
        if layout == "plain" or (other is None and 0 < len(pairs) <= len(MIXED)):
            yield named("averages", pairs, layout, other, words=(which, layout, other))
    shapes = [(1, 5), (6,), (6, 127), (6, 4, 64), (3, 8, 5, 7), (4, 8200), (9, 1025), (0, 3)]
    for dtype, shape, rate in itertools.product(FLOATS, shapes, (0.0, 0.1, 0.6, 1.0)):
        for layout in LAYOUTS if rate == 0.6 and (len(shape) > 2 or 127 in shape) else ("plain",):
            yield named("drop", shape, dtype, rate, layout, words=(dtype, shape, rate, layout))
    for dtype in FLOATS:
        yield named("choice", dtype, words=(dtype,))
