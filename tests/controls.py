"""Wrong ways to do what trainops does, which every check of numbers must notice.

Each is the specification with one fault in it: a context manager within which the ``reference`` backend is wrong. A
check that accepts one of them, where the option it concerns is on, checks nothing.
"""

import functools
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch

from trainops import reference as formulas
from trainops import reference_storage as storage
from trainops.adapters import pytorch as kernels

NARROW = (torch.bfloat16, torch.float16)


def written(groups, *columns):
    """What a step writes, by the names of its columns; not the step counts."""
    return [
        x
        for group in groups
        for name in columns or group.columns.keys() - {"grad", "step"}
        for x in group.columns.get(name, [])
        if x is not None
    ]


def with_columns(groups, change, *columns):
    """The groups with the changed tensors of these columns; those that belong to all elements, if none are named."""
    names = set(columns) if columns else {name for group in groups for name in group.columns} - {"step"}
    return [
        replace(
            group,
            columns={
                name: [x if x is None else change(x) for x in column] if name in names else column
                for name, column in group.columns.items()
            },
        )
        for group in groups
    ]


def of_steps(change):
    """A fault: a step is one of other groups, whatever ``change`` makes of them."""

    def update(rule, groups, *args, right=kernels.update):
        return right(rule, change(groups), *args)

    return mock.patch.object(kernels, "update", update)


def put_back(tensors, saved, where=slice(None)):
    """Give tensors what they had: everywhere, or in their elements ``where``, counted along the flattened tensor."""
    for x, old in zip(tensors, saved, strict=True):
        if x.numel() > 0:
            changed = x.clone().flatten()
            changed[where] = old.flatten()[where]
            x.copy_(changed.view(x.shape))


def leaving(where, *columns):
    """A fault: what kernels write is not written (all of it, or the elements ``where``; all columns, or some)."""

    def in_place(kernel, choose):
        @functools.wraps(kernel)
        def wrong(*args, **kwargs):
            tensors = choose(*args)
            saved = [x.clone() for x in tensors]
            result = kernel(*args, **kwargs)
            put_back(tensors, saved, where)
            return result

        return wrong

    faults = {"update": in_place(kernels.update, lambda rule, groups, *_: written(groups, *columns))}
    if not columns:
        faults |= {
            name: in_place(getattr(kernels, name), lambda tensors, *_: list(tensors))
            for name in ("scale_", "clamp_", "ema_")
        }
    return mock.patch.multiple(kernels, **faults)


def of_groups(**settings):
    """A fault: the groups of a step have other settings."""
    return of_steps(lambda groups: [replace(group, settings={**group.settings, **settings}) for group in groups])


def wrong_decay():
    """A fault: averages move a tenth too far."""

    def ema_(averages, tensors, decay, *args, move=formulas.ema_):
        move(averages, tensors, 1.1 * decay - 0.1, *args)

    return mock.patch.object(formulas, "ema_", ema_)


def average_of_the_old_param():
    """A fault: the average follows the parameter as it was before the step."""

    def update(rule, groups, control, decays, *args, right=kernels.update):
        columns = [(group.columns["param"], group.columns["average"]) for group in groups]
        rows = [row for group in columns for row in zip(*group, strict=True)]
        followed = [(p.clone(), average, average.clone()) for p, average in rows if average is not None]
        result = right(rule, groups, control, decays, *args)
        for param, average, old in followed:
            average.copy_(old)
            kernels.ema_([average], [param], decays[0], result.skipped)
        return result

    return mock.patch.object(kernels, "update", update)


@contextmanager
def wrong_norm(factor=1.01):
    """The norm is off by a hundredth, and so is what is clipped with it."""

    def sum_norms(*args, norms=formulas.sum_norms):
        total, each = norms(*args)
        return total * factor, each * factor

    with mock.patch.object(formulas, "sum_norms", sum_norms):
        yield


def cut_off(value, dtype):
    """A wider value as the 16-bit number next to it that is nearer to zero."""
    rounded = value.to(dtype)
    nearer_to_zero = (rounded.view(torch.int16) - 1).view(dtype)
    return torch.where(rounded.double().abs() > value.double().abs(), nearer_to_zero, rounded)


@contextmanager
def truncated(*columns):
    """16-bit results are cut off instead of rounded: all of them, or these columns of a step."""
    chosen = set()  # the addresses of these

    def update(rule, groups, *args, right=kernels.update):
        chosen.clear()
        chosen.update(x.data_ptr() for x in written(groups, *columns))
        return right(rule, groups, *args)

    def write(target, value, *rest, right=storage.write):
        if target.dtype in NARROW and (not columns or target.data_ptr() in chosen):
            value = cut_off(value, target.dtype)
        right(target, value, *rest)

    with (
        mock.patch.object(kernels, "update", update),
        mock.patch.object(formulas, "write", write),
        mock.patch.object(storage, "write", write),
    ):
        yield


LAST = slice(-1, None)

# Of every op.
CONTROLS = {
    "nothing": lambda: leaving(slice(None)),
    "all_but_the_last_element": lambda: leaving(LAST),
}

# Of a step of AdamW.
STEP_CONTROLS = CONTROLS | {
    "param_kept": lambda: leaving(slice(None), "param"),
    "exp_avg_kept": lambda: leaving(slice(None), "exp_avg"),
    "exp_avg_sq_kept": lambda: leaving(slice(None), "exp_avg_sq"),
}


# Of a step that moves an average.
AVERAGE_CONTROLS = {
    "average_kept": lambda: leaving(slice(None), "average"),
    "last_element_kept": lambda: leaving(LAST, "average"),
    "average_of_the_old_param": lambda: average_of_the_old_param(),
    "wrong_decay": lambda: wrong_decay(),
}


passed = set()  # the checks, with their arguments, that accept the specification


def must_fail(control, check, *args, **kwargs):
    """The check must accept the specification, and not the fault."""
    call = check, repr((args, kwargs))
    if call not in passed:
        with torch.random.fork_rng(devices=[]):  # the fault is given the same random numbers
            check(*args, **kwargs)
        passed.add(call)
    with control(), pytest.raises(AssertionError):
        check(*args, **kwargs)
