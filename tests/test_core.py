"""Tables, which C++ builds: the order of what is in them, the words that kernels read, and what is refused.

Then how words get to a device.
"""

import ctypes
import gc
import importlib
import inspect
import weakref
from array import array
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import trainops
from trainops import core, reference, uploads
from trainops.adapters import _device
from trainops.plain import PLAIN
from trainops.tables import staged_table
from trainops.uploads import Recent, known, uploaded

CHUNK = 8
DTYPES = ["float32", "float64", "bfloat16", "float16"]  # as csrc/core/table.h numbers them; then there is no tensor
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = (getattr(torch, name) for name in DTYPES)
RULES = [kind for kind, schema in core._core.SCHEMAS.items() if schema.settings]
STEP_COLUMNS = ["param", "grad", "average", "step"]


def names_of(kind):
    return [column.name for column in core.schema(kind).columns]


def state_of(rule):
    return names_of(rule)[len(STEP_COLUMNS) :]


# The order of what is in a table


def test_what_the_columns_are():
    """Where a number stands is written in C++ alone; what there is, is written here once more."""
    adamw = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert {kind: names_of(kind) for kind in core._core.SCHEMAS} == {
        "adamw": [*STEP_COLUMNS, *adamw],
        "ema": ["average", "tensor"],
        "reduce": ["tensor"],
        "transform": ["tensor"],
    }
    columns = {kind: core.schema(kind).columns for kind in core._core.SCHEMAS}
    uses = {
        use: {f"{kind} {column.name}" for kind in columns for column in columns[kind] if getattr(column, use)}
        for use in ("written", "optional", "one_per_row")
    }
    written = {f"adamw {name}" for name in ("param", "average", "step", *adamw)} | {"ema average", "transform tensor"}
    assert uses == {
        "written": written,
        "optional": {"adamw average", "adamw max_exp_avg_sq"},
        "one_per_row": {"adamw step"},
    }
    measured = {kind: names_of(kind)[core.schema(kind).measured] for kind in core._core.SCHEMAS}
    assert measured == {"adamw": "grad", "ema": "average", "reduce": "tensor", "transform": "tensor"}
    assert core.row_words() == ["numel", "first_chunk", "group", "dtypes"]
    assert core.step_words() == ["max_norm", "ema_decay"]


@pytest.mark.parametrize("kind", core._core.SCHEMAS)
def test_columns_and_settings_are_found_by_name(kind):
    names, settings = names_of(kind), core.schema(kind).settings
    assert [core.column(kind, name) for name in names] == list(range(len(names)))
    assert [core.setting(kind, name) for name in settings] == list(range(len(settings)))
    with pytest.raises(ValueError, match="not in list"):
        core.column(kind, "step_size")
    with pytest.raises(ValueError, match="not in list"):
        core.setting(kind, "step_size")


OPTIMIZERS = {"adamw": (trainops.AdamW, {"amsgrad": True})}


@pytest.mark.parametrize("rule", RULES)
def test_an_optimizer_has_the_columns_and_settings_of_its_rule(rule):
    kind, options = OPTIMIZERS[rule]
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = kind([p], **options)
    (group,) = optimizer.param_groups
    assert optimizer.rule == rule
    assert list(optimizer.state_names(group)) == state_of(rule)
    assert list(optimizer.settings(group)) == core.schema(rule).settings
    optimizer.step()
    assert list(optimizer.state[p]) == ["step", *state_of(rule)]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_the_columns_of_a_step_and_the_specification_takes_the_rest(rule):
    assert names_of(rule)[: len(STEP_COLUMNS)] == STEP_COLUMNS
    parameters = inspect.signature(getattr(reference, f"{rule}_")).parameters
    columns = {name for name, x in parameters.items() if x.kind == x.POSITIONAL_OR_KEYWORD}
    settings = [name for name in parameters if name not in columns]
    assert columns == set(names_of(rule)) - {"average"}
    assert settings == [*core.schema(rule).settings, "coefficient", "skip"]


@pytest.mark.parametrize("rule", RULES)
def test_triton_takes_the_state_in_the_order_of_the_columns(rule):
    pytest.importorskip("triton")
    new_state = importlib.import_module(f"trainops.triton_kernels.{rule}").new_state
    update = importlib.import_module("trainops.triton_kernels.update")
    grad, *state, scalars = inspect.signature(new_state.fn).parameters
    assert (grad, scalars) == ("grad", "scalars")
    assert state[: len(state_of(rule))] == state_of(rule)
    types = [name for name in inspect.signature(update.update.fn).parameters if name.startswith("STATE")]
    assert types == [f"STATE{i}_TYPE" for i in range(len(state))]  # a rule with less state leaves the last ones out
    assert update.STATE.value == len(STEP_COLUMNS)


# What a table's words are


def numbers(words, width):
    """64-bit words as a list of rows."""
    words = array("q", words).tolist()
    return [words[i : i + width] for i in range(0, len(words), width)]


def check_words(kind, columns, group_rows=(), chunk_numel=CHUNK):
    """Build a table, and hold its words to csrc/core/schema.h and device_words.h."""
    table = core.table(kind, columns, "cpu", group_rows)
    assert table.irregular == []
    names = names_of(kind)
    rows = list(zip(*(columns.get(name) or [None] * table.rows for name in names), strict=True))
    groups = [group for group, count in enumerate(group_rows or [len(rows)]) for _ in range(count)]
    dtypes = [tuple(None if x is None else str(x.dtype).removeprefix("torch.") for x in row) for row in rows]
    assert table.rows == len(rows)
    assert table.group_rows == list(group_rows or [len(rows)])
    assert table.has_float64 == any(kinds[core.schema(kind).measured] == "float64" for kinds in dtypes)
    assert table.device_index == 0
    for by_kind in (False, True):
        words = table.words(chunk_numel=chunk_numel, by_kind=by_kind)
        chunks, first_chunks = numbers(words.chunks, 2), []
        of_rows = numbers(words.rows, len(core.row_words()) + len(names))
        assert len(of_rows) == len(rows)
        for i, row in enumerate(rows):
            its = dict(zip(core.row_words(), of_rows[i], strict=False))
            numel = row[0].numel()
            codes = [4 if dtype is None else DTYPES.index(dtype) for dtype in dtypes[i]]
            of_dtypes = sum(code << 4 * column for column, code in enumerate(codes))
            first_chunks.append(its["first_chunk"])
            assert its == {"numel": numel, "first_chunk": first_chunks[i], "group": groups[i], "dtypes": of_dtypes}
            assert of_rows[i][len(its) :] == [core.address(x) for x in row]
            own = range(0, max(1, numel), chunk_numel)
            assert chunks[first_chunks[i] : first_chunks[i] + len(own)] == [[i, begin] for begin in own]
        counts = [len(range(0, max(1, row[0].numel()), chunk_numel)) for row in rows]
        assert len(chunks) == words.chunk_count == sum(counts)
        of_layout = [x for row, first in zip(rows, first_chunks, strict=True) for x in (row[0].numel(), first)]
        assert array("q", words.layout).tolist() == [chunk_numel, *of_layout]
        kinds = list(dict.fromkeys(dtypes)) if by_kind else [()]  # in the order of their first rows
        assert [section[0] for section in words.sections] == kinds
        end = 0
        for of_section, first_chunk, chunk_count in words.sections:
            assert first_chunk == end
            end += chunk_count
            members = [i for i, its in enumerate(dtypes) if not by_kind or its == of_section]
            assert list(dict.fromkeys(row for row, _ in chunks[first_chunk:end])) == members
        assert end == words.chunk_count
    return words  # by kind


def reduced(*tensors, **options):
    return check_words("reduce", {"tensor": list(tensors)}, **options)


def step_columns(params, **columns):
    """The columns of AdamW's table; those that are not given are like the parameters."""
    like = {name: list(map(torch.ones_like, params)) for name in ("grad", "exp_avg", "exp_avg_sq")}
    return {"param": params, "step": [torch.tensor(1.0) for _ in params]} | like | columns


@pytest.mark.parametrize("numel", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 100 * CHUNK + 5])
def test_one_row(numel):
    x = torch.ones(numel)
    words = reduced(x)
    assert numbers(words.rows, 5) == [[numel, 0, 0, 0, x.data_ptr()]]
    assert numbers(words.chunks, 2) == [[0, begin] for begin in range(0, max(1, numel), CHUNK)]


def test_the_words_of_a_row():
    params, steps = [torch.ones(0), torch.ones(20)], [torch.tensor(1.0), torch.tensor(3.0)]
    moments, grads = [[torch.ones_like(x) for x in params] for _ in range(2)], [torch.ones(0), torch.ones(20).half()]
    columns = {"param": params, "grad": grads, "step": steps, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
    words = check_words("adamw", columns | {"max_exp_avg_sq": [None, None]}, [1, 0, 1])
    tensors = params[1], grads[1], None, steps[1], moments[0][1], moments[1][1], None
    assert numbers(words.rows, 11)[1] == [20, 1, 2, 0x4000430, *map(core.address, tensors)]
    assert numbers(words.chunks, 2) == [[0, 0], [1, 0], [1, 8], [1, 16]]
    types = [("float32", grad, None, *["float32"] * 3, None) for grad in ("float32", "float16")]
    assert words.sections == [(types[0], 0, 1), (types[1], 1, 3)]


def test_rows_of_one_kind_are_one_section_in_any_order():
    dtypes, sizes = [FLOAT32, BFLOAT16, FLOAT32, FLOAT64, BFLOAT16, FLOAT32], [3, 30, 0, 9, 1, 17]
    for turn in range(len(dtypes)):
        turned = [(turn + i) % len(dtypes) for i in range(len(dtypes))]
        words = reduced(*(torch.ones(sizes[i], dtype=dtypes[i]) for i in turned))
        counts = {kind: chunk_count for (kind,), _, chunk_count in words.sections}
        assert counts == {"float32": 1 + 1 + 3, "bfloat16": 4 + 1, "float64": 2}


def test_missing_tensors_make_sections_but_groups_do_not():
    params = [torch.ones(9) for _ in range(6)]
    averages = [params[0], None, params[2], None, None, params[5]]

    def sections(group_rows=(), **columns):
        return len(check_words("adamw", step_columns(params, **columns), group_rows).sections)

    assert sections([2, 1, 0, 3]) == 1
    assert sections([2, 4], average=averages) == 2
    assert sections(average=averages, max_exp_avg_sq=params) == 2
    assert sections(average=averages, max_exp_avg_sq=averages[::-1]) == 4


def test_empty_rows_come_first_and_last():
    assert reduced(*(torch.ones(shape) for shape in [(0,), (3, 0, 2), (9,), (0,), (), (0,)])).chunk_count == 7
    assert reduced(torch.ones(0)).sections == [(("float32",), 0, 1)]
    assert reduced().sections == []


def test_tens_of_thousands_of_chunks():
    tensors = [torch.ones(30_001), torch.ones(20_000).bfloat16(), torch.ones(0), torch.ones(5)]
    assert reduced(*tensors, chunk_numel=1).chunk_count == 50_007
    assert reduced(*tensors, chunk_numel=2).chunk_count == 15_001 + 10_000 + 1 + 3


def test_more_elements_than_32_bits_count():
    x = torch.empty(2**31 + 5, dtype=BFLOAT16)  # whose memory is never touched
    words = reduced(torch.ones(3).bfloat16(), x, chunk_numel=2**20)
    assert numbers(words.rows, 5)[1] == [2**31 + 5, 1, 0, DTYPES.index("bfloat16"), x.data_ptr()]
    assert numbers(words.chunks, 2) == [[0, 0], *([1, i * 2**20] for i in range(2049))]


def test_float64_is_found_in_the_column_that_is_measured():
    def has_float64(kind, **columns):
        check_words(kind, columns)
        return core.table(kind, columns, "cpu").has_float64

    single, double = [torch.ones(3), torch.ones(0)], [torch.ones(3), torch.ones(0).double()]
    assert [has_float64("reduce", tensor=x) for x in (single, double)] == [False, True]
    assert has_float64("ema", average=double, tensor=single)
    assert not has_float64("ema", average=single, tensor=double)
    assert has_float64("adamw", **step_columns(single, grad=double))
    others = ("param", "average", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert not has_float64("adamw", **step_columns(single, **dict.fromkeys(others, double)))


def test_any_list_of_tensors():
    generator, chunks_of = torch.Generator().manual_seed(0), {}

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for _ in range(200):
        kind, group_rows = draw(*core._core.SCHEMAS, "adamw"), [draw(0, 1, 2, 5) for _ in range(draw(1, 2, 4))] + [1]
        columns = {name: [] for name in names_of(kind)}
        for _ in range(sum(group_rows)):
            shape = draw((), (0,), (1,), (7,), (8,), (9,), (3, 5), (2, 3, 4, 5))
            for column in core.schema(kind).columns:
                x = torch.ones(shape, dtype=draw(FLOAT32, FLOAT32, BFLOAT16, FLOAT16, FLOAT64))
                missing = column.optional and draw(True, False, False, False)
                columns[column.name].append(
                    torch.ones(draw((), (1,))) if column.one_per_row else None if missing else x
                )
        words = check_words(kind, columns, draw((), group_rows), draw(1, 4, 8, 8192))
        assert chunks_of.setdefault(words.layout, words.chunks) == words.chunks
    assert len(chunks_of) > 150


def test_equal_sizes_share_their_chunks_and_nothing_else(monkeypatch):
    sent = []
    monkeypatch.setattr(_device, "_chunks", Recent(2))
    monkeypatch.setattr(_device, "uploaded", lambda words, device: sent.append(words) or uploaded(words, device))

    def staged(*tensors, chunk_numel=CHUNK, by_kind=True):
        table = core.table("reduce", {"tensor": list(tensors)}, "cpu")
        words = table.words(chunk_numel=chunk_numel, by_kind=by_kind)
        found = _device.stage(table, torch.device("cpu"), chunk_numel, by_kind)
        assert found.rows.tolist() == array("q", words.rows).tolist()
        assert found.chunks.tolist() == array("q", words.chunks).tolist()
        assert (found.chunk_count, found.sections) == (words.chunk_count, words.sections if by_kind else [])
        return sent[-2:]

    x, y = torch.ones(9), torch.ones(3, 3)
    (rows, chunks), again = staged(x), staged(x)
    assert rows is again[0]
    assert chunks is again[1]
    for others in (staged(y), staged(x.half())):
        assert others[0] != rows
        assert others[1] is chunks
    assert staged(x, chunk_numel=4)[1] != chunks
    assert staged(x, x.half(), y, by_kind=True)[1] != staged(x, x.half(), y, by_kind=False)[1]
    assert len(_device._chunks) == 2


def test_what_a_table_describes_lives_as_long_as_its_words():
    x = torch.ones(9)
    is_alive, table = weakref.ref(x), core.table("transform", {"tensor": [x]}, "cpu")
    words = table.words(chunk_numel=CHUNK, by_kind=True)
    address = x.data_ptr()
    del x, table
    gc.collect()
    assert is_alive() is not None
    assert numbers(words.rows, 5)[0][-1] == address
    del words
    gc.collect()
    assert is_alive() is None


# The settings of a step


def bits(x):
    return torch.tensor(x, dtype=FLOAT64).view(torch.int64).item()


def test_the_words_of_settings():
    lr, beta1 = torch.tensor(0.5), torch.tensor([0.25], dtype=FLOAT64)
    groups = [
        {"lr": 0.1, "beta1": 0.9, "beta2": 1, "eps": 1e-8, "weight_decay": 0.0, "maximize": True},
        {"maximize": False, "weight_decay": -0.0, "eps": 1e-3, "beta2": 0.99, "beta1": beta1, "lr": lr},
    ]
    words = array("q", core.step_settings("adamw", 2.5, 0.75, groups)).tolist()
    numbers_of_first = (0.1, 0.9, 1.0, 1e-8, 0.0, 1.0)
    second = [1, lr.data_ptr(), 2, beta1.data_ptr(), *(x for y in (0.99, 1e-3, -0.0, 0.0) for x in (0, bits(y)))]
    assert words == [bits(2.5), bits(0.75), *(x for y in numbers_of_first for x in (0, bits(y))), *second]
    assert array("q", core.step_settings("adamw", None, 1.0, [])).tolist() == [0, bits(1.0)]
    with pytest.raises(KeyError, match="lr"):
        core.step_settings("adamw", None, 1.0, [{}])


@pytest.mark.parametrize("lr", [torch.tensor(1), torch.ones(2), torch.tensor(1.0).half(), "1", None], ids=str)
def test_settings_that_kernels_cannot_take(lr):
    settings = dict.fromkeys(core.schema("adamw").settings, 0.5)
    with pytest.raises(TypeError, match="a setting is a number, or a tensor with one float32 or float64"):
        core.step_settings("adamw", None, 0.5, [settings, settings | {"lr": lr}])


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
        rows = numbers(table.words(chunk_numel=CHUNK, by_kind=True).rows, 11)
        assert [row[:3] for row in rows] == [[4, 0, 0], [8, 1, 1]]
        addresses = {name: [row[4 + core.column("adamw", name)] for row in rows] for name in names_of("adamw")}
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
    return core.collect("adamw", averages=averages or {}, states=names, device_type="cpu", **arguments)


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
        table = collected(optimizer, averages)
        words = table.words(chunk_numel=CHUNK, by_kind=True)
        for name in ("rows", "chunks", "layout", "sections"):
            assert getattr(words, name) == getattr(expected, name)
        assert (table.rows, table.group_rows, table.irregular) == (count, group_rows, [])
        assert all(x is params[row] for x, row in zip(table.params, rows, strict=True))
        assert table.averaged == sum(id(params[row]) in averages for row in rows)
        for row in skipped:
            params[row].grad = columns["grad"][row]


def test_state_that_a_group_does_not_use_is_left_out(stepped):
    optimizer, params = stepped
    optimizer.param_groups[2]["amsgrad"] = False
    rows = numbers(collected(optimizer).words(chunk_numel=CHUNK, by_kind=True).rows, 11)
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
    assert collected(optimizer, averages) is None


# How words get to a device


def test_words_that_were_seen_last_are_one_object():
    first, other = (array("q", words).tobytes() for words in ([1, 2], [1, 3]))
    assert known(first) is first
    assert known(bytes(bytearray(first))) is first
    assert known(array("q", [1]).tobytes()) == array("q", [1]).tobytes()  # another size
    assert known(bytes(bytearray(first))) is first
    assert known(other) is other
    assert known(bytes(bytearray(other))) is other


def test_what_is_recent():
    recent = Recent(2)
    assert recent.recall("a") is None
    assert recent.remember("a", 1) == 1
    recent.remember("b", 2)
    assert recent.recall("a") == 1
    recent.remember("c", 3)  # "b" was used longest ago
    assert [recent.recall(key) for key in "abc"] == [1, None, 3]
    recent.remember("a", 4)
    assert recent.recall("a") == 4
    assert len(recent) == 2


def test_uploads_to_the_cpu_are_copies():
    words = torch.tensor([1, -2, 2**62]).numpy().tobytes()
    first, second = (uploaded(words, torch.device("cpu")) for _ in range(2))
    assert first.tolist() == [1, -2, 2**62]
    first.zero_()
    assert second.tolist() == [1, -2, 2**62]


def words_of(*numbers):
    return torch.tensor(numbers).numpy().tobytes()


@pytest.fixture
def gpu(monkeypatch):
    """The calls that ``uploaded`` makes of CUDA, without it: streams, capture, and pinned memory, which is recorded.

    The device is "meta", whose tensors have no content; what was copied is found in the pinned memory.
    """
    fake = SimpleNamespace(device=torch.device("meta"), stream=1, capturing=False, pinned=[])

    def pin_memory(x):
        fake.pinned.append(x)
        return x

    def pinned(count):
        assert not fake.capturing  # no pinned memory may be allocated then
        return torch.zeros(count, dtype=torch.int64)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=fake.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(uploads, "_pinned", pinned)
    monkeypatch.setattr(uploads, "_uploads", Recent(2))
    monkeypatch.setattr(uploads, "_spares", {})
    monkeypatch.setattr(uploads, "_captured", [])
    fake.upload = lambda *numbers: uploaded(words_of(*numbers), fake.device)
    return fake


def test_uploads_are_reused_by_content(gpu):
    first = gpu.upload(1, 2)
    assert first.device == gpu.device
    assert gpu.upload(1, 2) is first
    assert gpu.upload(1, 3) is not first
    assert gpu.upload(1, 2) is first
    assert [x.tolist() for x in gpu.pinned] == [[1, 2], [1, 3]]


def test_uploads_that_are_not_recent_are_made_again(gpu):
    first = gpu.upload(1)
    gpu.upload(2)
    gpu.upload(3)
    assert gpu.upload(1) is not first
    assert len(gpu.pinned) == 4
    assert len(uploads._spares[8]) == 4
    gpu.upload(4)
    assert len(uploads._spares[8]) == 4


def test_another_stream_has_uploads_of_its_own(gpu):
    first = gpu.upload(1)
    gpu.stream = 2
    second = gpu.upload(1)
    assert second is not first
    assert gpu.upload(1) is second
    gpu.stream = 1
    assert gpu.upload(1) is first


def test_capture_takes_what_is_there_and_keeps_it(gpu):
    first = gpu.upload(1)
    gpu.capturing = True
    assert gpu.upload(1) is first
    assert uploads._captured[0] is first
    gpu.capturing = False
    gpu.upload(2)
    gpu.upload(3)
    assert uploads._captured[0] is first  # which a replay may still read


def test_capture_copies_from_a_spare_and_remembers_nothing(gpu):
    gpu.upload(1)
    gpu.upload(2)
    gpu.capturing = True
    first = gpu.upload(7)
    (spare,) = uploads._captured
    assert spare.tolist() == [7]
    assert len(uploads._spares[8]) == 3
    second = gpu.upload(7)  # the first is filled by that graph alone
    assert second is not first
    assert uploads._captured[1] is not spare
    gpu.capturing = False
    assert gpu.upload(7) is not second
    assert spare.tolist() == [7]
    assert gpu.pinned[-1].tolist() == [7]


def test_capture_without_a_spare_raises(gpu):
    gpu.upload(1)
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="take a step on tensors of these sizes outside of a CUDA graph"):
        gpu.upload(1, 2)


def test_many_captures_one_after_the_other(gpu):
    for i in range(10):
        gpu.upload(1)
        gpu.capturing = True
        assert gpu.upload(100 + i) is not gpu.upload(200 + i)
        gpu.capturing = False
    assert [x.tolist() for x in uploads._captured] == [[100 * k + i] for i in range(10) for k in (1, 2)]
    gpu.capturing = True
    for i in range(2):
        gpu.upload(i + 3)
    with pytest.raises(RuntimeError, match="at most 4 steps"):
        gpu.upload(5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_uploads_to_a_gpu_arrive():
    device = torch.device("cuda", torch.cuda.current_device())
    first = uploaded(words_of(1, -2, 2**62), device)
    assert first.tolist() == [1, -2, 2**62]
    assert uploaded(words_of(1, -2, 2**62), device) is first
    with torch.cuda.stream(torch.cuda.Stream()):
        second = uploaded(words_of(1, -2, 2**62), device)
        assert second.tolist() == [1, -2, 2**62]
    assert second is not first
