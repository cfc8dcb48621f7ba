"""What the tests of tables share."""

from array import array

import torch

from trainops import core

# As csrc/core/table.h numbers them.
DTYPES = [
    "float32",
    "float64",
    "bfloat16",
    "float16",
    "int16",
    "uint8",
    "stochastic",
    "signed_codes",
    "unsigned_codes",
    None,
]
WORDS = sorted(core.words("row"), key=core.words("row").get)
CHUNK = 8
PLACES = ("first_place", "average_place", "average_place2", "average_place3", "average_place4")
NO_PLACES = dict.fromkeys(PLACES, -1) | {"origin": 0}
STEP_COLUMNS = ["param", "grad", "average", "step", "master"]


def names_of(kind):
    return [column.name for column in core.schemas[kind].columns]


def state_of(rule):
    return names_of(rule)[len(STEP_COLUMNS) :]


def numbers(words, width):
    """64-bit words as a list of rows."""
    words = array("q", words).tolist()
    return [words[i : i + width] for i in range(0, len(words), width)]


def step_columns(params, **columns):
    """The columns of AdamW's table; those that are not given are like the parameters."""
    like = {name: list(map(torch.ones_like, params)) for name in ("grad", "exp_avg", "exp_avg_sq")}
    return {"param": params, "step": [torch.tensor(1.0) for _ in params]} | like | columns


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
    assert table.has_float64 == any(kinds[core.schemas[kind].measured] == "float64" for kinds in dtypes)
    assert table.device_index == 0
    for by_kind in (False, True):
        words = table.words(chunk_numel=chunk_numel, by_kind=by_kind)
        chunks, positions, queue = numbers(words.chunks, 2), [], []
        counts = [len(range(0, max(1, row[0].numel()), chunk_numel)) for row in rows]
        of_rows = numbers(words.rows, len(core.words("row")) + len(names))
        assert len(of_rows) == len(rows)
        for i, row in enumerate(rows):
            its = dict(zip(WORDS, of_rows[i], strict=False))
            numel = row[0].numel()
            codes = list(map(DTYPES.index, dtypes[i]))
            of_dtypes = sum(code << 4 * column for column, code in enumerate(codes))
            expected = {"numel": numel, "first_chunk": sum(counts[:i]), "group": groups[i], "dtypes": of_dtypes}
            assert its == expected | NO_PLACES
            assert of_rows[i][len(its) :] == [core.address(x) for x in row]
            own = range(0, max(1, numel), chunk_numel)
            numbered = [[i, begin] for begin in own]
            if by_kind:
                positions.append(chunks.index([i, 0]))
                assert chunks[positions[i] : positions[i] + len(own)] == numbered
            else:
                positions.append(sum(counts[:i]))
                queue += [
                    (min(chunk_numel, numel - begin), chunk) for begin, chunk in zip(own, numbered, strict=True)
                ]
        assert by_kind or chunks == [chunk for _, chunk in sorted(queue, key=lambda chunk: -chunk[0])]
        assert len(chunks) == words.chunk_count == sum(counts)
        of_layout = [x for row, first in zip(rows, positions, strict=True) for x in (row[0].numel(), first)]
        assert array("q", words.layout).tolist() == [chunk_numel, by_kind, *of_layout]
        kinds = list(dict.fromkeys(dtypes)) if by_kind else [()]  # in the order of their first rows
        assert [section[0] for section in words.sections] == kinds
        end = 0
        for of_section, first_chunk, chunk_count in words.sections:
            assert first_chunk == end
            end += chunk_count
            members = [i for i, its in enumerate(dtypes) if not by_kind or its == of_section]
            listed = chunks if by_kind else [chunk for _, chunk in queue]
            assert list(dict.fromkeys(row for row, _ in listed[first_chunk:end])) == members
        assert end == words.chunk_count
    return words  # by kind
