"""Which rows kernels take as they are, how others are staged, and the rows that come straight from an optimizer."""

import ctypes
import gc
import weakref

import pytest
import torch
from table_fixtures import CHUNK, DTYPES, WORDS, check_words, names_of, numbers, state_of, step_columns
from torch import nn

import trainops
from trainops import core
from trainops.plain import PLAIN
from trainops.tables import staged_table

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = (getattr(torch, name) for name in DTYPES[:4])

# What kernels can take as it is

GRID = torch.arange(48.0).view(2, 3, 4, 2)
LAST = GRID.contiguous(memory_format=torch.channels_last)
GAPS = torch.stack((GRID, GRID), -1)[..., 0]
COMPLEX_ONE = torch.ones((), dtype=torch.complex64)
SQUARE = torch.ones(24, 24)
WRAPPED = GRID.as_subclass(type("Wrapped", (torch.Tensor,), {}))
ROWS = {
    "contiguous": (GRID, GRID, True),
    "scalar": (torch.tensor(1.0), torch.tensor(1.0), True),
    "parameters": (nn.Parameter(GRID), nn.Parameter(GRID), True),
    "views": (GRID[1:], GRID[:1], True),
    "double_and_half": (GRID.double(), GRID.half(), True),
    "bfloat16": (GRID, GRID.bfloat16(), True),
    "channels_last": (LAST, LAST, True),
    "permuted": (GRID.permute(2, 0, 3, 1), GRID.permute(2, 0, 3, 1).half(), True),
    "sizes_of_one": (torch.ones(4, 1, 3), torch.ones(4, 3, 1).transpose(1, 2), True),
    "strides_of_one": (torch.ones(1, 4), torch.ones(4, 1).T, True),
    "other_strides_of_one": (torch.ones(1, 4), torch.ones(4, 1).expand(4, 1).T, True),
    "empty": (torch.ones(0, 3), torch.ones(3, 0).T, True),
    "empty_slices": (SQUARE[:0], SQUARE[::2][:0], True),
    "other_strides": (GRID, LAST, False),
    "other_strides_first": (LAST, GRID, False),
    "transposed_square": (SQUARE, SQUARE.T, False),
    "gaps": (GRID, GAPS, False),
    "gaps_first": (GAPS, GRID, False),
    "gaps_in_both": (GAPS, GAPS, False),
    "columns": (SQUARE[:2].view(24, 2), SQUARE[:, :2], False),
    "columns_of_one": (SQUARE[:, :1], SQUARE[:, :1], False),
    "expanded": (GRID, torch.ones(1, 1, 1, 1).expand_as(GRID), False),
    "expanded_both": (*[torch.ones(1, 1, 1, 1).expand_as(GRID)] * 2, False),
    "expanded_one": (SQUARE[0, :24], SQUARE[0, :1].expand(24), False),
    "overlapping": (*[torch.ones(9).as_strided((3, 3), (1, 1))] * 2, False),
    "negated": (GRID, torch.complex(GRID, GRID).conj().imag, False),
    "negated_first": (torch.complex(GRID, GRID).conj().imag, GRID, False),
    "negated_one": (torch.ones(()), COMPLEX_ONE.conj().imag, False),
    "negated_one_first": (COMPLEX_ONE.conj().imag, torch.ones(()), False),
    "negated_view_of_one": (SQUARE[:1, :1], torch._neg_view(SQUARE[:1, :1]), False),
    "complex": (*[torch.complex(GRID, GRID)] * 2, False),
    "complex_second": (GRID, torch.complex(GRID, GRID), False),
    "conjugated": (*[torch.complex(GRID, GRID).conj()] * 2, False),
    "integer": (GRID, GRID.int(), False),
    "integer_of_the_same_memory": (SQUARE, SQUARE.view(torch.int32), False),
    "bool": (GRID, GRID > 0, False),
    "float8": (GRID, GRID.to(torch.float8_e4m3fn), False),
    "meta": (GRID, GRID.to("meta"), False),
    "empty_on_meta": (torch.ones(0), torch.ones(0, device="meta"), False),
    "sparse": (GRID, GRID.to_sparse(), False),
    "other_size": (torch.ones(4), torch.ones(5), False),
    "fewer_rows": (SQUARE[:3], SQUARE[:2], False),
    "empty_and_not": (torch.ones(0), torch.ones(1), False),
    "not_and_empty": (torch.ones(1), torch.ones(0), False),
    "subclass": (GRID, WRAPPED, False),
    "subclass_first": (WRAPPED, GRID, False),
    "other_shape_of_the_same_strides": (torch.ones(4, 6), torch.ones(24).as_strided((2, 12), (6, 1)), False),
    "empty_of_other_shapes": (torch.ones(0, 3), torch.ones(3, 0), False),
    "missing": (GRID, None, False),
    "missing_first": (None, GRID, False),
    "no_tensor": (GRID, 1.0, False),
}


@pytest.fixture(params=["dlpack", "python"])
def reader(request, monkeypatch):
    """Tensors describe themselves, or, where PyTorch is older, a function of Python describes them."""
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if request.param == "dlpack" and api is None:
        pytest.skip("this PyTorch has no DLPack exchange API")
    other = core._core.TensorReader()
    other.configure(api=api if request.param == "dlpack" else None, describe=core.describe, plain_types=tuple(PLAIN))
    monkeypatch.setattr(core, "reader", other)
    return request.param


@pytest.mark.parametrize(("first", "second", "regular"), ROWS.values(), ids=ROWS)
def test_what_is_regular(reader, first, second, regular):
    other = torch.ones(3)
    columns = {"average": [other, first, other], "tensor": [other, second, other]}
    if regular:
        check_words("ema", columns)
    else:
        table = core.table("ema", columns, "cpu")
        assert table.irregular == [1]
        with pytest.raises(RuntimeError, match="rows that kernels cannot take"):
            table.words(chunk_numel=CHUNK, by_kind=True)


@pytest.mark.parametrize("second", [0, 1])
def test_tensors_of_two_devices_are_no_table(monkeypatch, second):
    """Two GPUs, as far as descriptions tell."""
    x, y = torch.ones(3), torch.ones(3)

    def on_gpus(tensor):
        address, code, bits, _, _, *layout = core.describe(tensor)
        return (address, code, bits, 2, second if tensor is y else 0, *layout)

    other = core._core.TensorReader()
    other.configure(api=None, describe=on_gpus, plain_types=tuple(PLAIN))
    monkeypatch.setattr(core, "reader", other)
    table = core.table("ema", {"average": [x, x], "tensor": [x, y]}, "cuda")
    assert table.irregular == ([] if second == 0 else [1])


STEPS = {
    "plain": (torch.tensor(1.0), True),
    "one_element": (torch.ones(1, 1), True),
    "view": (torch.ones(5)[3], True),
    "strided": (torch.ones(5)[1::4][:1], True),
    "parameter": (nn.Parameter(torch.tensor(1.0)), True),
    "float64": (torch.tensor(1.0).double(), False),
    "bfloat16": (torch.tensor(1.0).bfloat16(), False),
    "integer": (torch.tensor(1), False),
    "two_elements": (torch.ones(2), False),
    "empty": (torch.ones(0), False),
    "meta": (torch.tensor(1.0).to("meta"), False),
    "subclass": (WRAPPED[0, 0, 0, 0], False),
    "none": (None, False),
}


@pytest.mark.parametrize(("step", "regular"), STEPS.values(), ids=STEPS)
def test_what_step_counts_are_regular(reader, step, regular):
    columns = step_columns([torch.ones(9), torch.ones(2)], step=[torch.tensor(1.0), step])
    if regular:
        check_words("adamw", columns)
    else:
        assert core.table("adamw", columns, "cpu").irregular == [1]


@pytest.mark.parametrize("name", ["grad", "average", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_every_column_is_compared_with_the_parameter(name):
    params = [torch.ones(2, 3), torch.ones(2, 3)]
    for other in (torch.ones(3, 2), torch.ones(3, 2).T, torch.ones(2, 6)[:, ::2], torch.ones(6)):
        columns = step_columns(params, **{name: [torch.ones(2, 3), other]})
        assert core.table("adamw", columns, "cpu").irregular == [1]
    columns = step_columns(params, **{name: [torch.ones(2, 3), None]})
    is_optional = name in ("average", "max_exp_avg_sq")
    assert core.table("adamw", columns, "cpu").irregular == ([] if is_optional else [1])


def test_every_irregular_row_is_named():
    gaps = torch.ones(8)[::2]
    steps = [torch.tensor(1.0)] * 3 + [torch.tensor(1)]
    columns = step_columns([gaps, torch.ones(4), gaps, torch.ones(4)], step=steps)
    assert core.table("adamw", columns, "cpu").irregular == [0, 2, 3]


X = torch.ones(3)
REFUSED = {
    "another kind": (("average", {"average": [X]}, "cpu"), "no table of that kind: average"),
    "another device": (("reduce", {"tensor": [X]}, "xpu"), "no kernels for devices of type xpu"),
    "a column too few": (("ema", {"average": [X]}, "cpu"), "a table of kind ema has a column tensor"),
    "one list is shorter": (("ema", {"average": [X, X], "tensor": [X]}, "cpu"), "columns are lists of one length"),
    "one list is longer": (("ema", {"average": [X], "tensor": [X, X]}, "cpu"), "columns are lists of one length"),
    "no list": (("ema", {"average": [X], "tensor": (X,)}, "cpu"), "columns are lists of one length"),
    "a column too many": (("ema", {"average": [X], "tensor": [X], "sources": [X]}, "cpu"), "no such column"),
    "rows of no group": (("reduce", {"tensor": [X, X]}, "cpu", [1]), "as many rows"),
    "groups without rows": (("reduce", {"tensor": [X, X]}, "cpu", [1, 2]), "as many rows"),
    "a column of None": (("reduce", {"tensor": None}, "cpu"), "columns are lists of one length"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_table(arguments, message):
    with pytest.raises(ValueError, match=message):
        core.table(*arguments)


def test_tensors_of_another_device_than_the_table_are_irregular():
    assert core.table("reduce", {"tensor": [X, X]}, "cuda").irregular == [0, 1]


def test_irregular_rows_are_staged_and_written_back():
    """Of the copies, those that kernels write to are copied back, and nothing else."""
    params, grads = [torch.ones(4), torch.ones(8, 2)[:, 0]], [torch.ones(4), torch.ones(8, 2)[:, 1]]
    steps = [torch.tensor(1.0), torch.tensor(1.0).double()]
    columns = step_columns(params, grad=grads, step=steps)
    with staged_table("adamw", columns, "cpu", [1, 1]) as table:
        rows = numbers(table.words(chunk_numel=CHUNK, by_kind=True).rows, len(WORDS) + 8)
        assert [row[:3] for row in rows] == [[4, 0, 0], [8, 1, 1]]
        addresses = {
            name: [row[len(WORDS) + core.schemas["adamw"].places[name]] for row in rows] for name in names_of("adamw")
        }
        for name, tensors in columns.items():
            assert addresses[name][0] == tensors[0].data_ptr()
            regular = name in ("exp_avg", "exp_avg_sq")
            assert (addresses[name][1] == tensors[1].data_ptr()) == regular, name
            ctypes.c_float.from_address(addresses[name][1]).value = 7.0
    for name, (_, x) in columns.items():
        assert x.flatten()[0] == (1 if name == "grad" else 7), name
    assert steps[1].dtype == FLOAT64


# The rows of a step, straight from an optimizer's containers


def collected(optimizer, averages=None, **changes):
    names = [optimizer.state_names(group) for group in optimizer.param_groups]
    arguments = {"param_groups": optimizer.param_groups, "state": optimizer.state} | changes
    arguments = {"averages": averages or [], "buffers": []} | arguments
    return core.collect("adamw", states=names, device_type="cpu", **arguments)


@pytest.fixture
def stepped():
    """An optimizer with a step behind it; the second group has AMSGrad, and one parameter no gradient."""
    params = [nn.Parameter(torch.randn(i + 1, dtype=DTYPE)) for i, DTYPE in enumerate([FLOAT32, FLOAT64, FLOAT16])]
    groups = [{"params": params[:1]}, {"params": []}, {"params": params[1:], "amsgrad": True}]
    optimizer = trainops.AdamW(groups, backend="reference")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer, params


def test_collected_rows_are_those_of_lists(stepped):
    optimizer, params = stepped
    averages = {id(p): torch.ones_like(p) for p in (params[0], params[2])} | {id(X): X}
    columns = step_columns(params, grad=[p.grad for p in params], average=[averages.get(id(p)) for p in params])
    columns |= {name: [optimizer.state[p].get(name) for p in params] for name in ("step", *state_of("adamw"))}
    for count, skipped in ((3, []), (2, [1]), (2, [0])):
        for row in skipped:
            params[row].grad = None
        rows = [row for row in range(3) if row not in skipped]
        group_rows = [sum(row == 0 for row in rows), 0, sum(row > 0 for row in rows)]
        of_rows = {name: [column[row] for row in rows] for name, column in columns.items()}
        expected = check_words("adamw", of_rows, group_rows)
        table = collected(optimizer, [averages])
        words = table.words(chunk_numel=CHUNK, by_kind=True)
        for name in ("rows", "chunks", "layout", "sections"):
            assert getattr(words, name) == getattr(expected, name)
        assert (table.rows, table.group_rows, table.irregular) == (count, group_rows, [])
        assert all(x is params[row] for x, row in zip(table.params, rows, strict=True))
        assert table.averaged == [sum(id(params[row]) in averages for row in rows)]
        for row in skipped:
            params[row].grad = columns["grad"][row]


def test_a_table_keeps_what_it_has_collected(stepped):
    """Kernels run without the interpreter lock: another thread may drop a gradient."""
    optimizer, params = stepped
    table = collected(optimizer)
    is_alive = [weakref.ref(p.grad) for p in params]
    for p in params:
        p.grad = None
    gc.collect()
    assert all(x() is not None for x in is_alive)
    del table
    gc.collect()
    assert all(x() is None for x in is_alive)


def test_buffers_come_behind_all_other_rows(stepped):
    """Those that move keep their type, those that are copied are bytes, and some are left."""
    optimizer, params = stepped
    averages = [{id(p): torch.ones_like(p) for p in params}, {id(params[1]): torch.ones_like(params[1])}]
    long, short = (torch.arange(12.0), torch.zeros(12)), (torch.tensor(7), torch.tensor(0))
    others = [(torch.zeros(1, dtype=FLOAT16), params[2].detach()[2:])]
    others += [(torch.zeros(()), torch.ones((), dtype=torch.complex64))]
    others += [(torch.zeros(4, dtype=torch.int32), torch.arange(4)), (torch.zeros(3, 2), torch.zeros(2, 3).t())]
    taken = [[(*long, True, 0), (torch.zeros(0), torch.ones(0), False, 1)], [(*short, False, 0), (*long, False, 1)]]
    buffers = [taken[0], [*taken[1], *((*pair, i == 3, 2) for i, pair in enumerate(others))]]
    table = collected(optimizer, averages, buffers=buffers)
    assert (table.averages, table.rows, table.averaged) == (2, 3, [3, 1])
    assert table.left == [[], [id(buffer) for _, buffer in others]]
    names = [*names_of("adamw"), "average2"]
    for by_kind in (False, True):
        words = table.words(chunk_numel=CHUNK, by_kind=by_kind)
        rows = numbers(words.rows, len(WORDS) + len(names))
        assert (words.chunk_count, words.all_chunks, len(rows)) == (3, 3 + 2 + 1 + 6, 6)
        for row, param in zip(rows, params, strict=False):
            assert row[-1] == core.address(averages[1].get(id(param)))
        expected = [(12, *long, "average", 0), (8, *short, "average2", 5), (48, *long, "average2", 5)]
        for row, (numel, average, buffer, name, code) in zip(rows[3:], expected, strict=True):
            cells = dict(zip(names, row[len(WORDS) :], strict=True))
            assert {key: x for key, x in cells.items() if x} == {
                "param": core.address(buffer),
                name: core.address(average),
            }
            codes = [code if key in ("param", name) else DTYPES.index(None) for key in names]
            assert row[0] == numel
            assert row[3] == sum(x << 4 * place for place, x in enumerate(codes))
        chunks = numbers(words.chunks, 2)
        assert sorted(chunks[3:]) == [[3, 0], [3, 8], [4, 0], *([5, begin] for begin in range(0, 48, 8))]
        if by_kind:
            kinds = [(section[0][0], *section[1:]) for section in words.sections[-2:]]
            assert kinds == [("float32", 3, 2), ("uint8", 5, 7)]
    assert (
        table.words(chunk_numel=CHUNK, by_kind=False).layout
        != collected(optimizer).words(chunk_numel=CHUNK, by_kind=False).layout
    )


def test_state_that_a_group_does_not_use_is_left_out(stepped):
    optimizer, params = stepped
    optimizer.param_groups[2]["amsgrad"] = False
    rows = numbers(collected(optimizer).words(chunk_numel=CHUNK, by_kind=True).rows, len(WORDS) + 8)
    assert [row[-1] for row in rows] == [0, 0, 0]
    assert "max_exp_avg_sq" in optimizer.state[params[1]]


@pytest.mark.parametrize(
    "change", ["no gradient", "no state", "no step", "no moment", "gaps", "subclass", "param_groups", "average"]
)
def test_rows_of_a_step_that_are_not_collected(stepped, change):
    optimizer, (_, p, _) = stepped
    state, averages = optimizer.state[p], {}
    assert collected(optimizer) is not None
    if change == "no gradient":
        optimizer.zero_grad()
    elif change == "no state":
        del optimizer.state[p]
    elif change.startswith("no "):
        del state[{"no step": "step", "no moment": "exp_avg"}[change]]
    elif change == "gaps":
        state["exp_avg_sq"] = torch.ones(4, dtype=FLOAT64)[::2]
    elif change == "subclass":
        p.grad = p.grad.as_subclass(type(WRAPPED))
    elif change == "param_groups":
        optimizer.param_groups[2]["params"] = tuple(optimizer.param_groups[2]["params"])
    else:
        averages[id(p)] = torch.ones(3, dtype=FLOAT64)
    assert collected(optimizer, [averages]) is None
