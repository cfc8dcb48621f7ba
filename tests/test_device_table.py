"""The table that Triton kernels read: its layout, what it does not take, and how it gets to a device."""

from types import SimpleNamespace

import pytest
import torch
from test_tensor_table import DESCRIBED

from trainops import device_table
from trainops.device_table import DeviceTable, Groups, Kind, Recent, uploaded
from trainops.tensor_table import regular_table

CHUNK = 8


def upload(table):
    """``rows`` and ``chunks`` as lists of lists."""
    rows, chunks = table.upload()
    assert rows.dtype == chunks.dtype == torch.int64
    return rows.view(table.row_count, table.row_words).tolist(), chunks.view(-1, 2).tolist()


CODES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as csrc/tensor_table.h numbers them


def check_layout(table, columns, scalars=None, chunk_numel=CHUNK, groups=None):
    """Decode what is uploaded, and hold it to the module's docstring."""
    assert table.irregular == []
    rows, chunks = upload(table)
    row_counts, flags = groups or Groups([len(columns[0])], [False])
    group_of_row = [group for group, count in enumerate(row_counts) for _ in range(count)]
    kinds = []
    for i, tensors in enumerate(zip(*columns, strict=True)):
        numel, first_chunk, group, dtypes, *addresses = rows[i]
        codes = [0 if x is None else CODES.index(x.dtype) for x in tensors]
        assert dtypes == sum(code << 4 * column for column, code in enumerate(codes))
        assert numel == next((x.numel() for x in tensors if x is not None), 0)
        assert group == group_of_row[i]
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        assert addresses == (pointers if scalars is None else [*pointers, scalars[i].data_ptr()])
        own = range(0, max(1, numel), chunk_numel)
        assert chunks[first_chunk : first_chunk + len(own)] == [[i, begin] for begin in own]
        kinds.append(Kind(tuple(None if x is None else x.dtype for x in tensors), flags[group]))
    assert len(chunks) == table.chunk_count == sum(len(range(0, max(1, row[0]), chunk_numel)) for row in rows)
    assert [section.kind for section in table.sections] == list(dict.fromkeys(kinds))
    end = 0
    for section in table.sections:
        assert section.first_chunk == end
        end += section.chunk_count
        assert section.chunk_count > 0
        assert {kinds[row] for row, _ in chunks[section.first_chunk : end]} == {section.kind}
    assert end == table.chunk_count


def make(columns, scalars=None, chunk_numel=CHUNK, groups=None):
    table = DeviceTable(columns, scalars, chunk_numel, groups)
    check_layout(table, columns, scalars, chunk_numel, groups)
    return table


# Layout


@pytest.mark.parametrize("numel", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 100 * CHUNK + 5])
def test_one_row(numel):
    x = torch.ones(numel)
    table = make([[x]])
    rows, chunks = upload(table)
    assert rows == [[numel, 0, 0, 0, x.data_ptr()]]
    assert chunks == [[0, begin] for begin in range(0, max(1, numel), CHUNK)]
    assert (table.row_count, table.row_words, table.device) == (1, 5, x.device)


def test_the_words_of_a_row():
    param, grad, step = torch.ones(20), torch.ones(20).bfloat16(), torch.tensor(3.0)
    empty = torch.ones(0)
    table = make(
        [[empty, param], [None, grad], [None, None]], [torch.tensor(1.0), step], 8, Groups([1, 0, 1], [0, 1, 1])
    )
    rows, chunks = upload(table)
    assert rows[1] == [20, 1, 2, 2 << 4, param.data_ptr(), grad.data_ptr(), 0, step.data_ptr()]
    assert chunks == [[0, 0], [1, 0], [1, 8], [1, 16]]
    assert table.sections == [
        (((torch.float32, None, None), False), 0, 1),
        (((torch.float32, torch.bfloat16, None), True), 1, 3),
    ]


def test_rows_of_one_kind_are_one_section_in_any_order():
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.bfloat16, torch.float32]
    sizes = [3, 30, 0, 9, 1, 17]
    for turn in range(len(dtypes)):
        turned = [(turn + i) % len(dtypes) for i in range(len(dtypes))]
        table = make([[torch.ones(sizes[i], dtype=dtypes[i]) for i in turned]])
        counts = {section.kind.dtypes[0]: section.chunk_count for section in table.sections}
        assert counts == {torch.float32: 1 + 1 + 3, torch.bfloat16: 4 + 1, torch.float64: 2}


def test_flags_and_missing_tensors_make_sections_but_groups_do_not():
    x = [torch.ones(9) for _ in range(6)]
    assert len(make([x], groups=Groups([2, 1, 3], [False] * 3)).sections) == 1
    assert len(make([x], groups=Groups([2, 1, 3], [False, True, False])).sections) == 2
    assert len(make([x, [x[0], None, x[2], None, None, x[5]]]).sections) == 2


def test_empty_rows_come_first_and_last():
    columns = [[torch.ones(shape) for shape in [(0,), (3, 0, 2), (9,), (0,), (), (0,)]]]
    assert make(columns).chunk_count == 1 + 1 + 2 + 1 + 1 + 1
    assert make([[torch.ones(0)]]).sections == [(((torch.float32,), False), 0, 1)]


def test_any_list_of_tensors():
    generator = torch.Generator().manual_seed(0)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for _ in range(200):
        row_counts = [draw(0, 1, 2, 5) for _ in range(draw(1, 2, 4))] + [1]
        groups = Groups(row_counts, [draw(False, True) for _ in row_counts])
        columns = [[] for _ in range(draw(1, 2, 6))]
        for _ in range(sum(row_counts)):
            shape = draw((), (0,), (1,), (7,), (8,), (9,), (3, 5), (2, 3, 4, 5))
            for number, column in enumerate(columns):
                dtype = draw(torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
                missing = number > 0 and draw(True, False, False, False)
                column.append(None if missing else torch.ones(shape, dtype=dtype))
        scalars = draw(None, [torch.ones(draw((), (1,))) for _ in columns[0]])
        make(columns, scalars, draw(1, 4, 8, 8192), draw(None, groups))


def test_tens_of_thousands_of_chunks():
    columns = [[torch.ones(30_001), torch.ones(20_000).bfloat16(), torch.ones(0), torch.ones(5)]]
    assert make(columns, chunk_numel=1).chunk_count == 50_007
    assert make(columns, chunk_numel=2).chunk_count == 15_001 + 10_000 + 1 + 3


def test_more_elements_than_32_bits_count():
    x = torch.empty(2**31 + 5, dtype=torch.bfloat16)  # whose memory is never touched
    table = DeviceTable([[torch.ones(3).bfloat16(), x]], None, 2**20)
    rows, chunks = upload(table)
    assert rows[1] == [2**31 + 5, 1, 0, CODES.index(x.dtype), x.data_ptr()]
    assert chunks == [[0, 0], *([1, i * 2**20] for i in range(2049))]


def test_float64_is_found_by_column():
    columns = [[torch.ones(3), torch.ones(0)], [torch.ones(3), torch.ones(0).double()], [None, None]]
    assert [make(columns).has_float64(column) for column in range(3)] == [False, True, False]


def test_equal_sizes_share_their_chunks_and_nothing_else():
    first, second = make([[torch.ones(9)]]), make([[torch.ones(9)]])
    assert first._layout is second._layout
    assert make([[torch.ones(9).bfloat16()]])._layout.chunk_words == first._layout.chunk_words
    assert make([[torch.ones(9)]], chunk_numel=4).chunk_count == 3


# What is regular

GRID = torch.arange(48.0).view(2, 3, 4, 2)


@pytest.mark.parametrize(("tensor", "regular"), DESCRIBED.values(), ids=DESCRIBED)
def test_what_is_regular_alone(tensor, regular):
    columns = [[torch.ones(4), tensor, torch.ones(4)]]
    table = DeviceTable(columns, None, CHUNK)
    assert table.irregular == ([] if regular else [1])
    if regular:
        check_layout(table, columns)


ROWS = {
    "contiguous": (GRID, GRID, True),
    "channels_last": (*[GRID.contiguous(memory_format=torch.channels_last)] * 2, True),
    "permuted": (GRID.permute(2, 0, 3, 1), GRID.permute(2, 0, 3, 1).half(), True),
    "sizes_of_one": (torch.ones(4, 1, 3), torch.ones(4, 3, 1).transpose(1, 2), True),
    "strides_of_one": (torch.ones(1, 4), torch.ones(4, 1).T, True),
    "other_strides": (GRID, GRID.contiguous(memory_format=torch.channels_last), False),
    "other_strides_first": (GRID.contiguous(memory_format=torch.channels_last), GRID, False),
    "gaps": (GRID, torch.stack((GRID, GRID), -1)[..., 0], False),
    "gaps_in_both": (*[torch.stack((GRID, GRID), -1)[..., 0]] * 2, False),
    "expanded": (GRID, torch.ones(1, 1, 1, 1).expand_as(GRID), False),
    "expanded_both": (*[torch.ones(1, 1, 1, 1).expand_as(GRID)] * 2, False),
    "overlapping": (*[torch.ones(9).as_strided((3, 3), (1, 1))] * 2, False),
    "negated": (GRID, torch.complex(GRID, GRID).conj().imag, False),
    "negated_one": (torch.ones(()), torch.ones((), dtype=torch.complex64).conj().imag, False),
    "complex": (*[torch.complex(GRID, GRID)] * 2, False),
    "complex_second": (GRID, torch.complex(GRID, GRID), False),
    "integer": (GRID, GRID.int(), False),
    "meta": (GRID, GRID.to("meta"), False),
    "sparse": (GRID, GRID.to_sparse(), False),
    "other_size": (torch.ones(4), torch.ones(5), False),
    "empty_and_not": (torch.ones(0), torch.ones(1), False),
    "not_and_empty": (torch.ones(1), torch.ones(0), False),
    "empty": (torch.ones(0, 3), torch.ones(3, 0).T, True),
    "subclass": (GRID, GRID.as_subclass(type("Wrapped", (torch.Tensor,), {})), False),
    "parameters": (torch.nn.Parameter(GRID), torch.nn.Parameter(GRID), True),
    "missing": (GRID, None, True),
    "only_second": (None, GRID, True),
}


@pytest.mark.parametrize(("first", "second", "regular"), ROWS.values(), ids=ROWS)
def test_what_is_regular_together(first, second, regular):
    other = torch.ones(3)
    columns = [[other, first, other], [None, second, other]]
    table = DeviceTable(columns, None, CHUNK)
    assert table.irregular == ([] if regular else [1])
    if regular:
        check_layout(table, columns)


SCALARS = {
    "plain": (torch.tensor(1.0), True),
    "one_element": (torch.ones(1, 1), True),
    "view": (torch.ones(5)[3], True),
    "float64": (torch.tensor(1.0).double(), False),
    "bfloat16": (torch.tensor(1.0).bfloat16(), False),
    "integer": (torch.tensor(1), False),
    "two_elements": (torch.ones(2), False),
    "empty": (torch.ones(0), False),
    "meta": (torch.tensor(1.0).to("meta"), False),
    "parameter": (torch.nn.Parameter(torch.tensor(1.0)), True),
    "none": (None, False),
}


@pytest.mark.parametrize(("scalar", "regular"), SCALARS.values(), ids=SCALARS)
def test_what_scalars_are_regular(scalar, regular):
    columns, scalars = [[torch.ones(9), torch.ones(2)]], [torch.tensor(1.0), scalar]
    table = DeviceTable(columns, scalars, CHUNK)
    assert table.irregular == ([] if regular else [1])
    if regular:
        check_layout(table, columns, scalars)


def test_every_irregular_row_is_named():
    gaps = torch.ones(8)[::2]
    columns, steps = [[gaps, torch.ones(4), gaps, torch.ones(4)]], [torch.tensor(1.0)] * 3 + [torch.tensor(1)]
    assert DeviceTable(columns, steps, CHUNK).irregular == [0, 2, 3]


def test_irregular_rows_are_staged_and_written_back():
    def build(columns, scalars):
        return DeviceTable(columns, scalars, CHUNK)

    grad, step = torch.ones(8, 2)[:, 0], torch.tensor(1.0).double()
    with regular_table(build, [[torch.ones(8)], [grad]], [True, True], [step]) as table:
        rows, _ = upload(table)
        assert rows[0][4] != grad.data_ptr()
        assert rows[0][5] != step.data_ptr()


# Remembered layouts


@pytest.fixture
def layouts(monkeypatch):
    """Those that are remembered: none yet."""
    monkeypatch.setattr(device_table, "_layouts", Recent(2))
    return lambda: len(device_table._layouts)


def test_equal_tensors_have_one_layout(layouts):
    x, y, step = torch.ones(2, 9), torch.ones(2, 9), torch.tensor(1.0)
    table = DeviceTable([[x], [y]], [step], CHUNK, Groups([1], [False]))
    check_layout(table, [[x], [y]], [step])
    moved = [[x.clone()], [y.clone()]], [step.clone()]
    check_layout(DeviceTable(*moved, CHUNK, Groups((1,), (False,))), *moved)
    assert layouts() == 1
    DeviceTable([[x], [y]], [step], CHUNK, Groups([0, 1], [True, False]))
    assert layouts() == 2


SQUARE = torch.ones(24, 24)
OTHERS = {
    "address": (SQUARE[:4, :4].reshape(-1), torch.ones(16)),
    "size": (SQUARE.view(-1)[:9], SQUARE.view(-1)[:8]),
    "rows": (SQUARE[:3], SQUARE[:2]),
    "dtype": (SQUARE, SQUARE.view(torch.int32).view(torch.float32).view(torch.bfloat16)),
    "unsupported_dtype": (SQUARE, SQUARE.view(torch.int32)),
    "strides": (SQUARE, SQUARE.T),
    "gaps": (SQUARE[:2], SQUARE[:, :2]),
    "expanded": (SQUARE[0, :1].clone(), SQUARE[0, :1].expand(24)),
    "none": (SQUARE, None),
    "subclass": (SQUARE, SQUARE.as_subclass(type("Wrapped", (torch.Tensor,), {}))),
    "negated_one": (SQUARE[:1, :1], torch._neg_view(SQUARE[:1, :1])),
    "device": (torch.ones(0), torch.ones(0, device="meta")),
}


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize(("tensor", "other"), OTHERS.values(), ids=OTHERS)
def test_other_tensors_have_other_tables(layouts, tensor, other, column):
    """Also where they are at the same address."""
    fillers = [None, None] if other is not None else [SQUARE, SQUARE]
    first, second = ([[x], [filler]][:: 1 - 2 * column] for x, filler in zip((tensor, other), fillers, strict=True))
    assert DeviceTable(first, None, CHUNK).irregular == []
    table, layout = DeviceTable(second, None, CHUNK), device_table.Layout(second, None, CHUNK, None)
    assert table.irregular == layout.irregular
    if not layout.irregular:
        check_layout(table, second)


def test_chunks_and_scalars_make_other_layouts(layouts):
    x, step = torch.ones(9), torch.tensor(1.0)
    tables = [DeviceTable([[x]], None, CHUNK), DeviceTable([[x]], None, 4), DeviceTable([[x]], [step], CHUNK)]
    assert len({id(table._layout) for table in tables}) == 3
    assert DeviceTable([[x], [x]], None, CHUNK).irregular == []
    assert DeviceTable([[x]], [x], CHUNK).irregular == [0]  # a scalar of nine elements


def test_irregular_layouts_are_not_kept(layouts):
    assert DeviceTable([[torch.ones(8)[::2]]], None, CHUNK).irregular == [0]
    assert layouts() == 0


# Uploads


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
    monkeypatch.setattr(device_table, "_pinned", pinned)
    monkeypatch.setattr(device_table, "_uploads", Recent(2))
    monkeypatch.setattr(device_table, "_spares", {})
    monkeypatch.setattr(device_table, "_captured", [])
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
    assert len(device_table._spares[8]) == 4
    gpu.upload(4)
    assert len(device_table._spares[8]) == 4


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
    assert device_table._captured[0] is first
    gpu.capturing = False
    gpu.upload(2)
    gpu.upload(3)
    assert device_table._captured[0] is first  # which a replay may still read


def test_capture_copies_from_a_spare_and_remembers_nothing(gpu):
    gpu.upload(1)
    gpu.upload(2)
    gpu.capturing = True
    first = gpu.upload(7)
    (spare,) = device_table._captured
    assert spare.tolist() == [7]
    assert len(device_table._spares[8]) == 3
    second = gpu.upload(7)  # the first is filled by that graph alone
    assert second is not first
    assert device_table._captured[1] is not spare
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
    assert [x.tolist() for x in device_table._captured] == [[100 * k + i] for i in range(10) for k in (1, 2)]
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
