"""The words of tables and of the settings of a step, which kernels on a device read."""

import gc
import weakref
from array import array

import pytest
import torch
from table_fixtures import CHUNK, DTYPES, NO_PLACES, WORDS, check_words, names_of, numbers, step_columns

from trainops import core
from trainops.adapters import _device
from trainops.uploads import Recent, uploaded

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = (getattr(torch, name) for name in DTYPES[:4])


def reduced(*tensors, **options):
    return check_words("reduce", {"tensor": list(tensors)}, **options)


@pytest.mark.parametrize("numel", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 100 * CHUNK + 5])
def test_one_row(numel):
    x = torch.ones(numel)
    words = reduced(x)
    assert numbers(words.rows, len(WORDS) + 1) == [[numel, 0, 0, 0, *NO_PLACES.values(), x.data_ptr()]]
    assert numbers(words.chunks, 2) == [[0, begin] for begin in range(0, max(1, numel), CHUNK)]


def test_the_words_of_a_row():
    params, steps = [torch.ones(0), torch.ones(20)], [torch.tensor(1.0), torch.tensor(3.0)]
    moments, grads = [[torch.ones_like(x) for x in params] for _ in range(2)], [torch.ones(0), torch.ones(20).half()]
    columns = {"param": params, "grad": grads, "step": steps, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
    words = check_words("adamw", columns | {"max_exp_avg_sq": [None, None]}, [1, 0, 1])
    tensors = params[1], grads[1], None, steps[1], None, moments[0][1], moments[1][1], None
    its = [20, 1, 2, 0x90090930, *NO_PLACES.values(), *map(core.address, tensors)]
    assert numbers(words.rows, len(WORDS) + 8)[1] == its
    assert numbers(words.chunks, 2) == [[0, 0], [1, 0], [1, 8], [1, 16]]
    types = [("float32", grad, None, "float32", None, *["float32"] * 2, None) for grad in ("float32", "float16")]
    assert words.sections == [(types[0], 0, 1), (types[1], 1, 3)]


def test_the_places_of_a_row():
    """They are words, and where there is one, bfloat16 has another type."""
    columns = step_columns([torch.ones(9).bfloat16(), torch.ones(9), torch.ones(9).bfloat16()])
    columns["average"] = [torch.ones(9), torch.ones(9).bfloat16(), None]
    places = [(5, [6, 3], 7, True), (8, [9], 1 << 40, True), (-1, [], 0, False)]
    table = core.table("adamw", columns, "cpu", places=places)
    words = table.words(chunk_numel=CHUNK, by_kind=True)
    found = [row[4:10] for row in numbers(words.rows, len(WORDS) + 8)]
    assert found == [[5, 6, 3, -1, -1, 7], [8, 9, -1, -1, -1, 1 << 40], [-1] * 5 + [0]]
    found = [(kind[0], kind[2]) for kind, _, _ in words.sections]
    assert found == [("stochastic", "float32"), ("float32", "stochastic"), ("bfloat16", None)]
    assert table.is_special
    assert not core.table("adamw", columns, "cpu").is_special
    with pytest.raises(ValueError, match="so many averages"):
        core.table("adamw", columns, "cpu", places=[(0, [0] * 5, 0, False)] * 3)
    with pytest.raises(ValueError, match="as many places as rows"):
        core.table("adamw", columns, "cpu", places=places[:2])


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
    its = [2**31 + 5, 1, 0, DTYPES.index("bfloat16"), *NO_PLACES.values(), x.data_ptr()]
    assert numbers(words.rows, len(WORDS) + 1)[1] == its
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
        kind, group_rows = draw(*core.schemas, "adamw"), [draw(0, 1, 2, 5) for _ in range(draw(1, 2, 4))] + [1]
        columns = {name: [] for name in names_of(kind)}
        for _ in range(sum(group_rows)):
            shape = draw((), (0,), (1,), (7,), (8,), (9,), (3, 5), (2, 3, 4, 5))
            for column in core.schemas[kind].columns:
                x = torch.ones(shape, dtype=draw(FLOAT32, FLOAT32, BFLOAT16, FLOAT16, FLOAT64))
                missing = column.optional and draw(True, False, False, False)
                if column.of_param:
                    masters = {BFLOAT16: (torch.int16, FLOAT32), FLOAT16: (FLOAT32,)}.get(columns["param"][-1].dtype)
                    missing = missing or masters is None
                    x = x if missing else torch.ones(shape, dtype=draw(*masters))
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
    assert numbers(words.rows, len(WORDS) + 1)[0][-1] == address
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
    words = array("q", core.step_settings("adamw", 2.5, [0.75, 0.5], groups, (7, [8, 9]))).tolist()
    first = [x for y in (0.1, 0.9, 1.0, 1e-8, 0.0, 1.0) for x in (0, bits(y))]
    second = [1, lr.data_ptr(), 2, beta1.data_ptr(), *(x for y in (0.99, 1e-3, -0.0, 0.0) for x in (0, bits(y)))]
    assert words == [0, bits(2.5), bits(0.75), bits(0.5), 0, 0, 7, 8, 9, 0, 0, *first, *second]
    nothing = [0] * 8
    assert array("q", core.step_settings("adamw", None, [1.0], [])).tolist() == [0, 0, bits(1.0), *nothing]
    assert array("q", core.step_settings("adamw", lr, [], [])).tolist() == [1, lr.data_ptr(), 0, *nothing]
    with pytest.raises(KeyError, match="lr"):
        core.step_settings("adamw", None, [1.0], [{}])


@pytest.mark.parametrize("lr", [torch.tensor(1), torch.ones(2), torch.tensor(1.0).half(), "1", None], ids=str)
def test_settings_that_kernels_cannot_take(lr):
    settings = dict.fromkeys(core.schemas["adamw"].settings, 0.5)
    with pytest.raises(TypeError, match="a setting is a number, or a tensor with one float32 or float64"):
        core.step_settings("adamw", None, [0.5], [settings, settings | {"lr": lr}])
