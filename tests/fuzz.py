"""Random optimizers: what a fuzzer draws, and how a backend goes through it. `fuzz_contract.py` has the contract."""

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from surroundings import MARGIN, Surrounded
from targets import Target
from training import MOMENTS, Model

import trainops
from trainops.reference_codes import CODE_OF
from trainops.storage import codes_key, has_codes, values_of_codes

# The same cases in every run, or with `--thorough` ten thousand others in each. ``max_examples`` is in percent of the
# number that each test asks for: see ``examples`` in test_fuzz.py.
PROFILES: dict[str, dict[str, Any]] = {
    "default": {"derandomize": True, "max_examples": 100},
    "thorough": {"print_blob": True, "max_examples": 1400},
}


def choose(profile: str) -> None:
    """Make a profile that of the tests which are defined from now on."""
    settings.register_profile(
        profile,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        **PROFILES[profile],
    )
    settings.load_profile(profile)


FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (2,), (5,), (7, 3), (1, 4), (2, 0, 3), (2, 3, 4, 5), (33, 31), (1023,), (1025,)]
LAYOUTS = ["plain", "offset 1", "offset 3", "offset 8", "transposed", "channels last", "gaps"]
STEP_DTYPES = dict(zip(FLOATS, [torch.float32, torch.float64, torch.int64, torch.float32], strict=True))


class Guards:
    """The memory around and between the elements of the tensors of one backend, on its device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.every: list[Surrounded] = []

    def place(self, x: torch.Tensor, layout: str) -> torch.Tensor:
        """A copy of ``x`` in a layout, amid memory that must stay as it is."""
        x = x.to(self.device)
        name, _, offset = layout.partition(" ")
        if name == "lazy":  # conjugated, or the negative imaginary part of what is
            if x.is_complex():
                return self.place(x.conj().resolve_conj(), "offset 3").conj()
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            return torch.complex(x.to(wide), -x.to(wide)).conj().imag if x.dtype == wide else x.clone()
        if name == "expanded":
            return x[:1].clone().expand(x.shape) if x.ndim and x.numel() else x.clone()
        dense = x.clone(memory_format=torch.contiguous_format)
        if name == "transposed" and x.ndim >= 2:
            dense = dense.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif layout == "channels last" and x.ndim == 4:
            dense = dense.contiguous(memory_format=torch.channels_last)
        start = MARGIN + (int(offset) if name == "offset" else 0)
        self.every.append(Surrounded(dense, start, step=2 if name == "gaps" else 1))
        return self.every[-1].tensor

    def check(self) -> None:
        assert all(x.is_whole() for x in self.every), "memory beside a tensor was written"


# What is drawn


@dataclass
class Row:
    """A parameter, and how it, its gradient and its average lie in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    grad_layout: str
    group: int
    grad_dtype: torch.dtype | None  # where not that of the parameter


@dataclass
class Step:
    """A step, and what is done to the optimizer before it."""

    scale: float  # of the gradients
    missing: list[bool]  # by row, repeated as often as needed
    poison: float | None
    grad_scale: float | None
    found_inf: float | None
    before: str
    layout: str  # of what is replaced before it
    dtype: torch.dtype  # likewise


@dataclass
class Case:
    """An optimizer with its model and average, and what it goes through."""

    rows: list[Row]
    groups: list[dict[str, Any]]
    settings: dict[str, Any]
    ema: dict[str, Any] | None
    fused: bool
    steps: list[Step]
    seed: int = 0


def lists_of_rows(shapes: Any, dtypes: Any, most: int) -> Any:
    layout = st.sampled_from([*LAYOUTS[:1] * 3, *LAYOUTS])
    grad_layout = st.sampled_from([*LAYOUTS[:1] * 3, *LAYOUTS, "expanded", "lazy"])
    grad_dtype = st.sampled_from([None] * 6 + FLOATS) if hasattr(torch.Tensor, "grad_dtype") else st.none()
    row = st.builds(Row, shapes, dtypes, layout, grad_layout, st.integers(0, 2), grad_dtype)
    return st.lists(row, min_size=1, max_size=most)


def rates() -> Any:
    tensors = [torch.tensor(x, dtype=dtype) for x in (0.1, [1e-2]) for dtype in FLOATS[:3]]
    return st.sampled_from([1e-3, 0.0, 0.1, *tensors, torch.tensor(1)])


GROUPS = st.fixed_dictionaries(
    {},
    optional={
        "lr": rates(),
        "betas": st.tuples(*2 * [st.sampled_from([0.9, 0.0, 0.3, 0.5, 0.999, 1 - 1e-7])]),
        "eps": st.sampled_from([1e-8, 1e-3, 0.0]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.5, 3.0]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    },
)
OF_STEPS: dict[str, Any] = {
    "max_grad_norm": st.sampled_from([0.5, 0.0, 1e-3, 1e9, float("inf"), torch.tensor([0.25])]),
    "skip_nonfinite": st.booleans(),
    "state_dtype": st.sampled_from([torch.float32, torch.bfloat16, (torch.bfloat16, torch.float32)])
    | st.sampled_from(["int8", (torch.float32, "int8"), ("int8", torch.bfloat16)]),
    "stochastic_rounding": st.booleans(),
    "master": st.sampled_from(["split", "float32"]),
}
OF_AVERAGES: dict[str, Any] = {
    "dtype": st.sampled_from(FLOATS),
    "warmup": st.booleans(),
    "min_decay": st.sampled_from([0.0, 0.6]),
    "update_after_step": st.sampled_from([-2, 0, 1]),
    "update_every": st.sampled_from([1, 2]),
    "average_buffers": st.booleans(),
    "stochastic_rounding": st.booleans(),
}
SETTINGS = st.fixed_dictionaries({}, optional=OF_STEPS)
AVERAGES = st.fixed_dictionaries({"decay": st.sampled_from([0.9, 0.0, 0.3, 0.5, 0.9999, 1.0])}, optional=OF_AVERAGES)


NOTHING = ["nothing"] * 4
STEPS = st.builds(
    Step,
    scale=st.sampled_from([1.0, 1e-3, 30.0]),
    missing=st.lists(st.booleans(), max_size=3).map(lambda x: x if len(x) > 1 else [False]),
    poison=st.sampled_from([None] * 5 + [float("nan"), float("inf"), -float("inf")]),
    grad_scale=st.sampled_from([None, None, 1.0, 3.0, 65536.0]),
    found_inf=st.sampled_from([None, None, 0.0, 0.0, 1.0]),
    before=st.sampled_from([*NOTHING, "reload", "pickle", "replace", "restate", "cast", "late"]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(FLOATS),
)


def cases(shapes: Any, most_rows: int = 6, most_steps: int = 4) -> Any:
    """Cases over parameters of some shapes: of one dtype, of several, or complex ones among them."""
    dtypes = [
        *(st.just(dtype) for dtype in FLOATS),
        st.sampled_from(FLOATS),
        st.sampled_from([torch.complex64, torch.complex128, torch.float32]),
    ]
    return st.builds(
        Case,
        rows=st.sampled_from(dtypes).flatmap(lambda dtype: lists_of_rows(shapes, dtype, most_rows)),
        groups=st.lists(GROUPS, min_size=1, max_size=3),
        settings=SETTINGS,
        ema=st.none() | AVERAGES,
        fused=st.booleans(),
        steps=st.lists(STEPS, min_size=1, max_size=most_steps),
        seed=st.integers(0, 7),
    )


# How a backend goes through it


@dataclass
class World:
    """A case's model, optimizer and average on one target."""

    case: Case
    target: Target
    skipped: int = 0  # steps, as they should be counted

    def __post_init__(self) -> None:
        self.guards = Guards(self.target.device)
        case, generator = self.case, torch.Generator().manual_seed(self.case.seed)
        tensors = [self.guards.place(randoms(row.shape, row.dtype, generator), row.layout) for row in case.rows]
        self.model = Model(tensors)
        self.model.register_buffer("buffer", torch.randn(3, generator=generator).to(self.target.device))
        self.model.register_buffer("count", torch.zeros((), dtype=torch.int64, device=self.target.device))
        self.ema = None if case.ema is None else self.make_average(case.ema)
        if self.ema is not None:
            for average, row in zip(self.ema.module.params, case.rows, strict=True):
                layout = "gaps" if row.grad_layout in ("expanded", "lazy") else row.grad_layout
                average.data = self.guards.place(average.data, layout)
            self.ema.reset()
        self.optimizer = self.make_optimizer()

    def make_average(self, options: dict[str, Any]) -> trainops.EMA:
        dtypes = {row.dtype for row in self.case.rows}
        if (chosen := options.get("dtype")) is not None:
            dtypes = {dtype if dtype.is_complex else chosen for dtype in dtypes}
        own = dict(options) if may_be_stochastic(dtypes) else options | {"stochastic_rounding": False}
        return trainops.EMA(self.model, **own, backend=self.target.backend)

    def make_optimizer(self) -> trainops.AdamW:
        groups = [{**copy.deepcopy(group), "params": []} for group in self.case.groups]
        for param, row in zip(self.model.params, self.case.rows, strict=True):
            groups[row.group % len(groups)]["params"].append(param)
        own = {**copy.deepcopy(self.case.settings), "ema": self.ema if self.case.fused else None}
        dtypes = {row.dtype for row in self.case.rows}
        now = dtypes | {p.dtype for p in self.model.params}
        if any(dtype.is_complex for dtype in dtypes) or (torch.float64 in now and has_codes(own.get("state_dtype"))):
            own.pop("state_dtype", None)  # is for real parameters; 8 bits for arithmetic in float32
        takes = (torch.float16 not in dtypes, torch.bfloat16 in dtypes)
        if not (all(takes) if own.get("master") == "split" else any(takes[1:]) or not takes[0]):
            own.pop("master", None)
        if "master" in own or not may_be_stochastic(now):
            own.pop("stochastic_rounding", None)
        return trainops.AdamW(groups, **own, backend=self.target.backend)

    def prepare(self, step: Step) -> None:
        """What frameworks do between steps."""
        optimizer = self.optimizer
        if step.before == "reload":
            self.optimizer = self.make_optimizer()
            self.optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.ema = None
            self.skipped = 0  # no checkpoint has the count
        elif step.before == "pickle":
            whole = pickle.loads(pickle.dumps((self.model, self.ema, optimizer)))
            self.model, self.ema, self.optimizer = whole
        elif step.before in ("replace", "cast"):
            for param in self.model.params:
                casts = step.before == "cast" and not param.is_complex() and optimizer.master is None
                casts &= step.dtype != torch.float64 or not has_codes(optimizer.state_dtype)
                param.grad = None
                param.data = self.guards.place(param.data.to(step.dtype) if casts else param.data, step.layout)
        elif step.before == "restate":
            for state in optimizer.state.values():
                for name in state.keys() - {"step", "master", *map(codes_key, CODE_OF)}:
                    x = state[name]
                    state[name] = self.guards.place(x if x.is_complex() else x.to(step.dtype), step.layout)
        elif step.before == "late":
            count = torch.tensor(10_000.0 if step.layout == "plain" else [10_000.0], device=self.target.device)
            for state in optimizer.state.values():
                state["step"] = count.to(STEP_DTYPES[step.dtype], copy=True)
        with torch.no_grad():
            self.model.buffer.add_(0.5)
            self.model.count.add_(1)

    def set_grads(self, step: Step, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        missing = (step.missing * len(self.case.rows))[: len(self.case.rows)]
        scale = step.scale * (step.grad_scale or 1.0)
        for row, param, is_missing in zip(self.case.rows, self.model.params, missing, strict=True):
            dtype = param.dtype if row.grad_dtype is None or param.is_complex() else row.grad_dtype
            param.grad = None
            if getattr(param, "grad_dtype", dtype) != dtype:
                param.grad_dtype = dtype
            grad = randoms(param.shape, dtype, generator, scale)
            if step.poison is not None and grad.numel():
                grad.view(-1)[int(torch.randint(grad.numel(), (), generator=generator))] = step.poison
            param.grad = None if is_missing else self.guards.place(grad, row.grad_layout)

    def step(self, step: Step) -> None:
        for name in ("grad_scale", "found_inf"):
            if (value := getattr(step, name)) is not None:
                setattr(self.optimizer, name, torch.tensor(value, device=self.target.device))
        try:
            self.optimizer.step()
            if self.ema is not None and not self.case.fused:
                self.ema.update()
        finally:
            for name in ("grad_scale", "found_inf"):
                vars(self.optimizer).pop(name, None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a step may write, by name."""
        found = {f"param {i}": p.detach() for i, p in enumerate(self.model.params)}
        for i, param in enumerate(self.model.params):
            found |= {f"{name} {i}": x for name, x in self.optimizer.state.get(param, {}).items()}
            for name in MOMENTS:
                if (codes := found.get(f"{codes_key(name)} {i}")) is not None:
                    found[f"{name} {i}"] = values_of_codes(param, name, codes, torch.float32)
            if f"master {i}" in found:
                found[f"weight {i}"] = self.optimizer.float32_weight(param)
        if self.ema is not None:
            found |= {f"average {i}": x.detach() for i, x in enumerate(self.ema.module.params)}
            found |= {"average of buffer": self.ema.module.buffer, "average of count": self.ema.module.count}
        return found

    def follow(self, other: "World") -> None:
        """Take over the numbers of another backend, bit for bit."""
        theirs = other.tensors()
        for name, x in self.tensors().items():
            x.copy_(theirs[name])
        if self.ema is not None:
            self.ema._remember_weights()  # these are no weights that somebody has loaded


def may_be_stochastic(dtypes: set[torch.dtype]) -> bool:
    """Whether tensors of these dtypes may be rounded stochastically."""
    return torch.bfloat16 in dtypes and torch.float16 not in dtypes


def randoms(shape: Any, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers with some zeros among them."""
    x = torch.randn(shape, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64)
    return (scale * x * (torch.rand(shape, generator=generator) > 0.05)).to(dtype)
