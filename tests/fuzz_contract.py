"""What the results of a fuzzed step are held to: one step in extended precision, from what was stored before it."""

from dataclasses import astuple, dataclass
from typing import Any

import codes
import numpy as np
import torch
from contract import TOLERANCES, exact, real, same_bits
from exact import adamw_step, clip_coefficient, ema, magnitudes, norm
from fuzz import Step, World
from norms import rounding_share
from targets import Target

from trainops import reference_codes, reference_storage
from trainops.storage import codes_key

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
DOUBLES = (torch.float64, torch.complex128)


def arithmetic(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype in DOUBLES for x in tensors) else torch.float32


def as_stored(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Extended precision, rounded to a dtype on the way that tensors take."""
    wide = torch.from_numpy(np.asarray(x, np.float64))
    if not dtype.is_floating_point:
        return wide.numpy()
    return (wide if dtype == torch.float64 else wide.float()).to(dtype).double().numpy()


@dataclass
class Expected:
    """What a tensor should hold: up to ``slack`` from ``exact``, and rounded once."""

    exact: np.ndarray
    slack: np.ndarray

    @np.errstate(all="ignore")
    def check(self, what: str, got: torch.Tensor, dtype: torch.dtype) -> None:
        """Hold ``got`` to it, and to a dtype. Infinities and NaN must be where they are in the exact result."""
        ours = real(got).double().cpu().numpy()
        assert ours.shape == self.exact.shape, what
        assert got.dtype == dtype, what
        low, high = (as_stored(x, real(got).dtype) for x in (self.exact - self.slack, self.exact + self.slack))
        near = np.isfinite(self.slack) & (low <= ours) & (ours <= high)
        same = (ours == self.exact) | (np.isnan(ours) & np.isnan(self.exact))
        good = np.where(np.isfinite(self.exact), near, same)
        if not good.all():
            at = tuple(np.argwhere(~good)[0].tolist())
            wanted = f"{self.exact[at]!r} within {self.slack[at]!r}"
            raise AssertionError(f"{what} is {ours[at]!r} at {at}, expected {wanted}")


class Neighbours(Expected):
    """What bfloat16 may hold that is rounded stochastically: one of the two numbers next to what is expected."""

    @np.errstate(all="ignore")
    def check(self, what: str, got: torch.Tensor, dtype: torch.dtype) -> None:
        finite = np.isfinite(self.exact)
        slack, ours = np.where(finite, self.slack, 0), exact(got)
        low, high = (beside(x, up) for x, up in ((self.exact - slack, False), (self.exact + slack, True)))
        assert got.dtype == dtype, what
        good = (low <= ours) & (ours <= high) | (np.isnan(ours) & np.isnan(self.exact))
        assert good.all(), f"{what} is no neighbour of the exact result"


def beside(x: np.ndarray, up: bool) -> np.ndarray:
    """The number of bfloat16 that is next to a number, above or below."""
    nearest = torch.from_numpy(np.asarray(x, np.float64)).float().bfloat16()
    is_beyond = nearest.double().numpy() < x if up else nearest.double().numpy() > x
    other = torch.nextafter(nearest, torch.full_like(nearest, np.inf if up else -np.inf))
    return np.where(is_beyond, other.double().numpy(), nearest.double().numpy())


@dataclass
class Coded(Expected):
    """What the values of 8-bit state may be: one of the two next to what is expected."""

    name: str
    layout: torch.Tensor

    @np.errstate(all="ignore")
    def check(self, what: str, got: torch.Tensor, dtype: torch.dtype) -> None:
        assert got.dtype == dtype, what
        ours, true, slack = (
            reference_codes.flat_like(self.layout, torch.from_numpy(np.asarray(x, np.float64)))[1].double().numpy()
            for x in (exact(got), self.exact, self.slack)
        )
        finite = np.isfinite(true)
        near = np.abs(ours - true) <= codes.allowed(np.where(finite, true, 0), is_signed(self.name)) + slack
        same = (ours == true) | (np.isnan(ours) & np.isnan(true))
        assert np.where(finite, near, same).all(), f"{what} is no neighbour of the exact result"
        assert is_signed(self.name) or (ours != 0)[finite & (true - slack > 0)].all(), f"{what} is zero"


def is_signed(name: str) -> bool:
    return reference_codes.CODE_OF[name].is_signed


@np.errstate(all="ignore")
def expected_adamw(
    group: dict[str, Any], step: float, g: np.ndarray, slack: float, stored: dict[str, np.ndarray]
) -> dict[str, Expected]:
    """A step on one parameter; ``g`` is its clipped gradient, ``step`` counts from 1."""
    options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")}
    largest = stored.get("max_exp_avg_sq", stored["exp_avg_sq"])
    results = adamw_step(stored["param"], g, stored["exp_avg"], stored["exp_avg_sq"], largest, step, **options)
    return {name: Expected(x.value, slack * np.abs(x.terms)) for name, x in results.items()}


@np.errstate(all="ignore")
def expected_average(
    average: torch.Tensor, source: torch.Tensor, decay: float, is_stochastic: bool = False
) -> Expected:
    moved = ema(exact(average), exact(source), decay)
    kind = Neighbours if is_stochastic and average.dtype == torch.bfloat16 else Expected
    return kind(moved.value, TOLERANCES[arithmetic(average, source)].terms * moved.terms)


@dataclass
class Norms:
    """Of a step's gradients, by the index of the parameter, and what follows from them."""

    each: dict[int, np.longdouble]
    total: np.longdouble
    skipped: bool
    coefficient: np.longdouble
    slack: float  # relative

    @classmethod
    @np.errstate(all="ignore")
    def of(cls, world: World, step: Step, grads: dict[int, np.ndarray]) -> "Norms":
        scale = np.longdouble(1.0 if step.grad_scale is None else step.grad_scale)
        each = {i: norm([g]) / scale for i, g in grads.items()}
        total = norm(list(each.values()))
        settings = world.case.settings
        skipped = bool(step.found_inf) or (settings.get("skip_nonfinite", False) and not np.isfinite(total))
        max_norm = settings.get("max_grad_norm")
        coefficient = clip_coefficient(total, max_norm) / scale
        slack = sums_slack(world.target, [world.model.params[i].grad for i in grads])
        return cls(each, total, skipped, coefficient, slack if max_norm is not None else 0.0)


def sums_slack(target: Target, tensors: list[torch.Tensor]) -> float:
    """The share of itself by which a norm may be off: what sums lose in float64, and in the runs of the backend."""
    slack = (8 + sum(real(x).numel() for x in tensors) / 8) * UNIT[torch.float64]
    return slack + rounding_share(target, 2.0, any(x.dtype not in DOUBLES for x in tensors))


@np.errstate(all="ignore")
def check_norms(world: World, norms: Norms, rows: list[int], grads: list[torch.Tensor]) -> None:
    settings, optimizer = world.case.settings, world.optimizer
    if "max_grad_norm" not in settings and not settings.get("skip_nonfinite"):
        assert optimizer.grad_norm is None
        return
    dtype = arithmetic(*grads)
    slack = [sums_slack(world.target, x) for x in (*([grad] for grad in grads), grads)]
    true = np.array([*(norms.each[i] for i in rows), norms.total], np.longdouble)
    got = torch.cat([optimizer.grad_norms, optimizer.grad_norm.reshape(1)])
    Expected(true, np.array(slack) * true).check("grad_norm", got, dtype)


@np.errstate(all="ignore")
def check_step(world: World, step: Step, before: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    """Hold what a step has made of ``before`` to the contract; ``others``, of another backend, have the dtypes."""
    after, params = world.tensors(), list(world.model.params)
    groups = {p: group for group in world.optimizer.param_groups for p in group["params"]}
    order = [i for p in groups for i in range(len(params)) if params[i] is p and p.grad is not None]
    grads = {i: exact(params[i].grad) for i in order}
    norms = Norms.of(world, step, grads)
    check_norms(world, norms, order, [params[i].grad for i in order])
    world.skipped += norms.skipped
    assert world.optimizer.skipped_steps == world.skipped
    assert list(after) == list(others)

    expected: dict[str, Expected] = {}
    for i in () if norms.skipped else order:
        p = before[f"param {i}"]
        slack = TOLERANCES[arithmetic(params[i])].terms + 2 * norms.slack
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if groups[params[i]]["amsgrad"] else [])]
        stored = {name: exact(before.get(f"{name} {i}", torch.zeros_like(p))) for name in names}
        stored["param"] = exact(before.get(f"weight {i}", p))
        count = before.get(f"step {i}", torch.zeros(())).item() + 1
        g = grads[i] * norms.coefficient
        for name, x in expected_adamw(groups[params[i]], count, g, slack, stored).items():
            is_coded = f"{codes_key(name)} {i}" in after
            expected[f"{name} {i}"] = Coded(x.exact, x.slack, name, params[i]) if is_coded else x
        if (weight := after.get(f"weight {i}")) is not None:
            expected[f"weight {i}"] = expected[f"param {i}"]
            for name, x in zip(("param", "master"), parts_of(weight, params[i], after[f"master {i}"]), strict=True):
                expected[f"{name} {i}"] = Expected(exact(x), np.zeros(x.shape))
        if world.optimizer.stochastic_rounding and params[i].dtype == torch.bfloat16:
            expected[f"param {i}"] = Neighbours(*astuple(expected[f"param {i}"]))
        shape = after[f"step {i}"].shape
        expected[f"step {i}"] = Expected(np.full(shape, np.longdouble(count)), np.zeros(shape))
    if world.ema is not None and not (world.case.fused and norms.skipped):
        count = world.ema.step
        if count % world.ema.update_every == 0:
            decay, is_random = world.ema.decay_at(count), world.ema.seed is not None
            for i in range(len(params)):
                weight = after[f"param {i}"]
                if world.case.fused:  # `ema.update()` alone sees the parameter
                    weight = after.get(f"weight {i}", weight)
                expected[f"average {i}"] = expected_average(before[f"average {i}"], weight, decay, is_random)
            buffers = before["average of buffer"], world.model.buffer
            of_buffers = decay if world.ema.average_buffers else 0.0
            expected["average of buffer"] = expected_average(*buffers, of_buffers, is_random)
            expected["average of count"] = expected_average(before["average of count"], world.model.count, 0.0)
    assert expected.keys() <= after.keys()
    for name, x in after.items():
        if name in expected:
            expected[name].check(name, x, others[name].dtype)
        elif name.replace("_codes", "") in expected:
            assert x.dtype == reference_codes.CODES, name  # its values are checked
        elif name in before:
            assert same_bits(x, before[name]), f"{name} has changed"
        else:
            assert norms.skipped, f"{name} was made by nobody"
            if name.startswith(("master", "weight")):
                continue
            assert same_bits(x, torch.zeros_like(x)), f"{name} was made by a step that was skipped, and is not zero"
    world.guards.check()


def parts_of(weight: torch.Tensor, param: torch.Tensor, master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 weight as it should lie in a parameter and its master."""
    rounded = weight.to(param.dtype) if param.dtype == torch.float16 else reference_storage.split(weight)[0]
    return rounded, weight if master.dtype == torch.float32 else reference_storage.split(weight)[1]


# Clipping by itself


@np.errstate(all="ignore")
def total_norm(tensors: list[torch.Tensor], order: float) -> np.longdouble:
    """The exact norm. For orders up to 0, PyTorch has that of the tensors' norms; that of an empty tensor is 0."""
    arrays = list(map(magnitudes, tensors))
    if order <= 0:
        arrays = [norm([x], order) if x.size else np.longdouble(0) for x in arrays]
    return norm(arrays, order)


def is_finite(total: np.longdouble, tensors: list[torch.Tensor]) -> bool:
    """Whether a norm is, in the dtype that it is returned in."""
    return bool(np.isfinite(as_stored(total, arithmetic(*tensors))))


@np.errstate(all="ignore")
def check_total_norm(
    target: Target, got: torch.Tensor, total: np.longdouble, tensors: list[torch.Tensor], order: float
) -> None:
    slack = sums_slack(target, tensors) * (max(1, 2 / abs(order)) if order else 0)  # a count has no rounding
    Expected(np.asarray(total), np.asarray(slack * total)).check("norm", got, arithmetic(*tensors))


@np.errstate(all="ignore")
def clipped_exactly(grad: torch.Tensor, norm: torch.Tensor, max_norm: float) -> Expected:
    g = exact(grad) * clip_coefficient(exact(norm), max_norm)
    return Expected(g, 3 * UNIT[arithmetic(grad)] * np.abs(g))
