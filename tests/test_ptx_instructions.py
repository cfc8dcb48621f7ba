"""Each instruction form that ``tests/ptx`` computes with, against numpy and Python's integers of any size."""

import functools
import itertools
import math
import shutil
import subprocess
from fractions import Fraction

import cuda_shim
import numpy as np
import pytest
import torch

if cuda_shim.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

from ptx import Machine, build, forms, instructions, translate

FLOATS = {"f32": np.float32, "f64": np.float64}
MANTISSAS = {
    "f32": (24, -149),
    "f64": (53, -1074),
    "f16": (11, -24),
    "bf16": (8, -133),
}  # bits, the smallest exponent
LARGEST = {"f32": 128, "f64": 1024, "f16": 16, "bf16": 128}
SHIFTS = [0, 1, 7, 31, 32, 33, 63, 64, 255, 256, 2**32 - 1]
TABLES = [0x00, 0x96, 0xE8, 0xCA, 0xFF]


def values_of(kind):
    """Operands as bits: ends, carries and signs; of floats also subnormals, infinities, NaN, and ties of rounding."""
    width = forms.WIDTHS[kind]
    if kind == "pred":
        return [0, 1]
    if kind in MANTISSAS:
        exact = [
            0,
            1,
            -1,
            1.5,
            -2.5,
            3e9,
            -3e9,
            70000,
            1e19,
            -1e19,
            255.5,
            2.0**-24,
            1 / 3,
            1e-39,
            3e38,
            65519.9,
            65520,
        ]
        exact += [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, math.inf, -math.inf, math.nan]
        if kind in FLOATS:
            with np.errstate(all="ignore"):
                array = np.array([*exact, -0.0, 1e-300, 0.1, 5e-324, -(2.0**-1023)], FLOATS[kind])
            return [
                *array.view(f"u{width // 8}").tolist(),
                (1 << width) - 3,
            ]  # the last: NaN with a sign and a payload
        return [0, 1 << 15, 1, 0x3C00, 0x3F80, 0x7BFF, 0x7C00, 0xFC00, 0x7F80, 0x7FC1, 0x8001, 0x0400]
    top = 1 << (width - 1)
    return sorted(
        {
            0,
            1,
            2,
            3,
            5,
            17,
            top - 1,
            top,
            top + 1,
            2 * top - 1,
            2 * top - 7,
            0x5A % top,
            (0xDEADBEEFCAFE5A3C >> 3) % (2 * top),
        }
    )


def decode(kind, bits):
    """What bits mean: an integer, or a numpy float."""
    width = forms.WIDTHS[kind]
    if kind in FLOATS:
        return np.array(bits, f"u{width // 8}").view(FLOATS[kind])[()]
    if kind in MANTISSAS:
        dtype = torch.float16 if kind == "f16" else torch.bfloat16
        return np.float32(torch.tensor(bits - (bits >> 15 << 16), dtype=torch.int16).view(dtype).item())
    return bits - (1 << width) if kind[0] == "s" and bits >> (width - 1) else bits


def rounded(kind, exact):
    """A fraction or a float as bits of a float type: to nearest, ties to even."""
    if not isinstance(exact, Fraction):
        if math.isnan(exact):
            return quiet(kind)
        if math.isinf(exact) or exact == 0:
            sign = int(math.copysign(1, exact) < 0) << (forms.WIDTHS[kind] - 1)
            return sign | (infinity(kind) if exact else 0)
        exact = Fraction(float(exact))
    if exact == 0:
        return 0
    precision, least = MANTISSAS[kind]
    exponent = max(exact.numerator.bit_length() - exact.denominator.bit_length() - precision - 1, least)
    while abs(exact) / Fraction(2) ** exponent >= 2**precision:
        exponent += 1
    mantissa = round(abs(exact) / Fraction(2) ** exponent)  # Python rounds ties to even
    field = 0 if exponent == least and mantissa < 2 ** (precision - 1) else exponent - least + 1
    bits = (field << (precision - 1)) + mantissa - (2 ** (precision - 1) if field else 0)
    sign = int(exact < 0) << (forms.WIDTHS[kind] - 1)
    return sign | min(bits, infinity(kind))


def infinity(kind):
    precision, least = MANTISSAS[kind]
    return (LARGEST[kind] - least - precision + 2 << precision - 1) if kind != "f16" else 0x7C00


def quiet(kind):
    return (1 << forms.WIDTHS[kind] - 1) - 1


def arithmetic(function):
    """Of float32 and float64, as numpy computes it."""

    def bits(kind, *operands):
        with np.errstate(all="ignore"):
            result = FLOATS[kind](function(*operands))
        return quiet(kind) if np.isnan(result) else int(result.view(f"u{forms.WIDTHS[kind] // 8}"))

    return bits


def fused(kind, a, b, c):
    if kind not in FLOATS and not np.isfinite([a, b, c]).all():
        with np.errstate(all="ignore"):
            return rounded(kind, np.float64(a) * np.float64(b) + np.float64(c))
    if not (np.isfinite(a) and np.isfinite(b) and np.isfinite(c)):
        return arithmetic(lambda a, b, c: a * b if not np.isfinite(a * b) and np.isfinite(c) else a * b + c)(kind, *(
            FLOATS["f64"](x) if np.isfinite(x) else x for x in (a, b)), c)  # fmt: skip
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        product = math.copysign(1, a) * math.copysign(1, b)
        exact_zero = a * b == 0 and c == 0 and product < 0 and math.copysign(1, c) < 0
        return 1 << (forms.WIDTHS[kind] - 1) if exact_zero else 0
    return rounded(kind, exact)


def extremum(choose, wins):
    def bits(kind, a, b):
        if np.isnan(a) or np.isnan(b):
            other = b if np.isnan(a) else a
            return quiet(kind) if wins or np.isnan(other) else rounded(kind, other)
        return rounded(kind, choose(a, b, key=lambda x: (x, math.copysign(1, x))))

    return bits


def to_integer(rounds):
    def bits(kind, a, source):
        width, is_signed = forms.WIDTHS[kind], kind[0] == "s"
        low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if is_signed else (0, (1 << width) - 1)
        if np.isnan(a):
            return 1 << (width - 1) if source == "f64" or width == 64 else 0
        return (high if a > 0 else low) if np.isinf(a) else min(max(rounds(Fraction(float(a))), low), high)

    return bits


def toward_zero(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def extracted(kind, a, position, length):
    position, length, width = position & 255, length & 255, forms.WIDTHS[kind]
    bit = lambda i: a >> i & 1  # noqa: E731
    sign = 0 if kind[0] == "u" or length == 0 else bit(min(position + length - 1, width - 1))
    picks = [bit(position + i) if i < length and position + i < width else sign for i in range(width)]
    return sum(value << i for i, value in enumerate(picks))


def inserted(kind, a, b, position, length):
    for i in range(length & 255):
        at = (position & 255) + i
        if at < forms.WIDTHS[kind]:
            b = b & ~(1 << at) | (a >> i & 1) << at
    return b


def permuted(_, a, b, order):
    source = [(b << 32 | a) >> (8 * i) & 255 for i in range(8)]
    digits = [order >> (4 * i) & 15 for i in range(4)]
    return sum((source[d & 7] if d < 8 else 255 * (source[d & 7] >> 7)) << (8 * i) for i, d in enumerate(digits))


def highest(kind, a):
    return a.bit_length() - 1 if a else 2**32 - 1


COMPARE = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}
COMPARE |= {"lo": "__lt__", "ls": "__le__", "hi": "__gt__", "hs": "__ge__"}


def compared(name, a, b):
    unordered = bool(a != a or b != b)
    if name in ("nan", "num"):
        return unordered == (name == "nan")
    if unordered:
        return name in ("equ", "neu", "ltu", "leu", "gtu", "geu")
    return bool(getattr(a, COMPARE[name.removesuffix("u") if len(name) == 3 else name])(b))


# What each form computes of a type and operands: bits, or an integer of which the lowest bits count.
EXPECTED = {
    "add.T": lambda k, a, b: a + b,
    "sub.T": lambda k, a, b: a - b,
    "mul.lo.T": lambda k, a, b: a * b,
    "mul.hi.T": lambda k, a, b: a * b >> forms.WIDTHS[k],
    "mul.wide.T": lambda k, a, b: a * b,
    "mad.lo.T": lambda k, a, b, c: a * b + c,
    "mad.wide.T": lambda k, a, b, c: a * b + c,
    "div.T": lambda k, a, b: toward_zero(a, b),
    "rem.T": lambda k, a, b: a - toward_zero(a, b) * b,
    "min.T": lambda k, a, b: extremum(min, wins=False)(k, a, b) if k in FLOATS else min(a, b),
    "max.T": lambda k, a, b: extremum(max, wins=False)(k, a, b) if k in FLOATS else max(a, b),
    "neg.T": lambda k, a: a ^ 1 << forms.WIDTHS[k] - 1 if k in FLOATS else -a,
    "abs.T": lambda k, a: a & quiet(k) if k in MANTISSAS else a & 0x7FFF7FFF if k.endswith("x2") else abs(a),
    "abs.ftz.T": arithmetic(lambda a: abs(a) if abs(a) >= np.finfo(np.float32).tiny or np.isnan(a) else 0),
    "add[.rn].T": arithmetic(lambda a, b: a + b),
    "sub[.rn].T": arithmetic(lambda a, b: a - b),
    "mul[.rn].T": arithmetic(lambda a, b: a * b),
    "add.rn.T": lambda k, a, b: fused(k, a, 1.0, b),
    "mul.rn.T": lambda k, a, b: fused(k, a, b, -0.0),
    "div.rn.T": arithmetic(lambda a, b: a / b),
    "fma.rn.T": fused,
    "sqrt.rn.T": arithmetic(np.sqrt),
    "rcp.rn.T": arithmetic(lambda a: type(a)(1) / a),
    "min.NaN.T": extremum(min, wins=True),
    "max.NaN.T": extremum(max, wins=True),
    "and.T": lambda k, a, b: a & b,
    "or.T": lambda k, a, b: a | b,
    "xor.T": lambda k, a, b: a ^ b,
    "not.T": lambda k, a: 1 - a if k == "pred" else ~a,
    "shl.T": lambda k, a, n: a << n if n < 64 else 0,
    "shr.T": lambda k, a, n: a >> min(n, 64),
    "shf.l.wrap.T": lambda k, a, b, n: (b << 32 | a) << (n & 31) >> 32,
    "shf.r.wrap.T": lambda k, a, b, n: (b << 32 | a) >> (n & 31),
    "shf.l.clamp.T": lambda k, a, b, n: (b << 32 | a) << min(n, 32) >> 32,
    "shf.r.clamp.T": lambda k, a, b, n: (b << 32 | a) >> min(n, 32),
    "bfi.T": inserted,
    "bfe.T": extracted,
    "brev.T": lambda k, a: int(f"{a:0{forms.WIDTHS[k]}b}"[::-1], 2),
    "popc.T": lambda k, a: a.bit_count(),
    "clz.T": lambda k, a: forms.WIDTHS[k] - a.bit_length(),
    "bfind.T": highest,
    "bfind.shiftamt.T": lambda k, a: forms.WIDTHS[k] - 1 - highest(k, a) if a else 2**32 - 1,
    "prmt.T": permuted,
    "lop3.T": lambda k, a, b, c, t: sum(
        (t >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32)
    ),
    "selp.T": lambda k, a, b, p: a if p else b,
    "mov.T": lambda k, a: a,
}
ROUND = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}


def halves(kind, operands, index):
    """The lower (0) or the higher halves of pairs."""
    return [decode(kind[:-2], x >> 16 * index & 0xFFFF) for x in operands]


def expected(row, chosen, form, operands):
    """The bits of a result."""
    kind = chosen["T"]
    if row.form.startswith("setp"):
        comparison = next(name for letter, name in chosen.items() if letter != "T")
        if form.second:
            return sum(compared(comparison, *halves(kind, operands, i)) << i for i in range(2))
        return compared(comparison, *operands)
    if row.form.startswith("cvt"):
        if (how := row.form.split(".")[1]) in ROUND:
            return to_integer(ROUND[how])(kind, *operands, chosen["F"])
        if kind in ("f16x2", "bf16x2"):
            return rounded(kind[:-2], operands[0]) << 16 | rounded(kind[:-2], operands[1])
        if kind in MANTISSAS:
            return rounded(kind, Fraction(operands[0]) if isinstance(operands[0], int) else operands[0])
        return operands[0]
    if kind in ("f16x2", "bf16x2") and row.form != "abs.T":
        return sum(EXPECTED[row.form](kind[:-2], *halves(kind, operands, i)) << 16 * i for i in range(2))
    return EXPECTED[row.form](kind, *operands)


def operands_of(row, chosen, form):
    """All combinations of a few values for each operand, as bits."""
    columns = [values_of(kind) for kind in form.sources]
    if row.form.startswith(("shl", "shr", "shf", "bfe", "bfi")):
        columns = [
            SHIFTS if kind == "u32" and i > 0 else column
            for i, (kind, column) in enumerate(zip(form.sources, columns, strict=True))
        ]
    if row.form in ("bfe.T", "bfi.T") and form.sources[0] == "u32":
        columns[0] = columns[0][::2]
    if row.form == "prmt.T":
        columns[2] = [0x3210, 0x7654, 0x0123, 0xFEDC, 0x8B4C, 0xFFFF1234]
    if row.form == "lop3.T":
        columns[3] = TABLES
    if chosen["T"].endswith("x2") and form.sources[0] == "b32":
        half = values_of("f16")
        columns = [
            [x << 16 | y for x, y in zip(half, half[i:] + half[:i], strict=True)] for i in (1, 4, 5)[: len(columns)]
        ]
    if len(columns) > 2:
        columns = [column if len(column) < 12 else column[::2] for column in columns]
    combinations = itertools.product(*columns)
    divides = row.form in ("div.T", "rem.T")
    return [x for x in combinations if not divides or x[1] != 0]


CASES = [(row, opcode, chosen) for row in forms.ROWS for opcode, chosen in row.opcodes()]
COARSE = "rcp.approx.ftz.f64"


def register(kind):
    return (
        "%p"
        if kind == "pred"
        else f"%{'fd' if kind[0] == 'f' and kind != 'f16' and kind != 'f16x2' else 'r'}{forms.WIDTHS[kind]}_"
    )


def entry(number, opcode, form):
    """A kernel in which each thread computes one result. Operands and results have eight bytes each."""
    lines = [f".visible .entry k{number}(.param .u64 operands, .param .u64 results)", "{"]
    lines += [".reg .pred %p<9>; .reg .b16 %r16_<9>; .reg .b16 %r8_<9>; .reg .b32 %r32_<9>; .reg .b64 %r64_<9>;",
              ".reg .f32 %fd32_<9>; .reg .f64 %fd64_<9>; .reg .b32 %i<9>; .reg .b64 %a<9>;",
              "ld.param.u64 %a0, [operands]; ld.param.u64 %a1, [results];",
              "mov.u32 %i0, %tid.x; mov.u32 %i1, %ctaid.x;",
              "mov.u32 %i2, %ntid.x; mad.lo.u32 %i0, %i1, %i2, %i0;",
              f"mul.wide.u32 %a2, %i0, {8 * len(form.sources)}; add.u64 %a0, %a0, %a2;",
              "mul.wide.u32 %a2, %i0, 8; add.u64 %a1, %a1, %a2;"]  # fmt: skip
    for i, kind in enumerate(form.sources):
        if kind == "pred":
            lines.append(f"ld.global.u32 %i3, [%a0+{8 * i}]; setp.ne.u32 %p{i}, %i3, 0;")
        else:
            stored = "f" if register(kind)[1] == "f" else "b"
            lines.append(f"ld.global.{stored}{forms.WIDTHS[kind]} {register(kind)}{i}, [%a0+{8 * i}];")
    sources = [f"{register(kind)}{i}" for i, kind in enumerate(form.sources)]
    result = "%p8|%p7" if form.second else f"{register(form.destination)}8"
    if opcode.startswith("lop3"):  # its table is a number in the code
        lines.append(f"{opcode} {result}, {', '.join(sources[:3])}, 0;")
        for table in TABLES:
            lines += [
                f"setp.eq.u32 %p0, %r32_3, {table};",
                f"@%p0 {opcode} {result}, {', '.join(sources[:3])}, {table};",
            ]
    else:
        lines.append(f"{opcode} {result}, {', '.join(sources)};")
    if form.destination == "pred":
        lines.append("selp.u32 %i4, 1, 0, %p8;")
        if form.second:
            lines.append("selp.u32 %i5, 2, 0, %p7; or.b32 %i4, %i4, %i5;")
        lines.append("st.global.u32 [%a1], %i4;")
    else:
        stored = "f" if register(form.destination)[1] == "f" else "b"
        lines.append(f"st.global.{stored}{forms.WIDTHS[form.destination]} [%a1], {result};")
    return "\n".join([*lines, "ret;", "}"])


HEAD = ".version 7.8\n.target sm_90\n.address_size 64\n"


@functools.cache
def program():
    return HEAD + "\n".join(entry(i, opcode, forms.find(opcode)) for i, (_, opcode, _) in enumerate(CASES))


@pytest.fixture(scope="module")
def machine():
    machine = Machine()
    build.kernels(program())
    return machine


@pytest.mark.parametrize("row", dict.fromkeys(row.form for row in forms.ROWS))
def test_form(machine, row):
    cases = [(i, *case) for i, case in enumerate(CASES) if case[0].form == row]
    assert cases
    for number, of_case, opcode, chosen in cases:
        form = forms.find(opcode)
        assert form is not None, opcode
        inputs = operands_of(of_case, chosen, form)
        assert len(inputs) > 1
        width = 1 + bool(form.second) if form.destination == "pred" else forms.WIDTHS[form.destination]
        with machine.memory():
            operands = torch.tensor(np.array(inputs, np.uint64).view(np.int64))
            results = torch.zeros(len(inputs), dtype=torch.int64)
            machine.run(f"k{number}", len(inputs), 1, operands, results)
        for bits, result in zip(inputs, results.numpy().view(np.uint64).tolist(), strict=True):
            kinds = form.sources
            values = [decode(kind, x) for kind, x in zip(kinds, bits, strict=True)]
            got = result & ((1 << width) - 1)
            if opcode == COARSE:
                check_coarse(values[0], decode("f64", got))
                continue
            true = int(expected(of_case, chosen, form, values)) & ((1 << width) - 1)
            if form.destination == "f64" and np.isnan(decode("f64", true)):
                assert np.isnan(decode("f64", got)), (opcode, values)
            else:
                assert got == true, (opcode, values, hex(got), hex(true))


def check_coarse(a, got):
    """20 bits of a reciprocal; subnormals are zeros."""
    tiny = np.finfo(np.float64).tiny
    a = math.copysign(0.0, a) if abs(a) < tiny else a
    true = math.nan if math.isnan(a) else math.copysign(math.inf, a) if a == 0 else 1 / a
    if math.isnan(true) or math.isinf(true):
        assert got == true or (math.isnan(got) and math.isnan(true))
    else:
        assert abs(got - true) <= 2.0**-20 * abs(true) + tiny


UNKNOWN = [
    "tanh.approx.f32 %f1, %f2;",
    "add.rz.f32 %f1, %f1, %f1;",
    "ld.acquire.gpu.global.u32 %r1, [%r2];",
    "bar.sync 0, 64;",
    "cvt.rn.satfinite.f16.f32 %r1, %f1;",
    "atom.global.cas.b32 %r1, [%r2], 0, 1;",
    "mov.u32 %r1, %clock;",
    "call f;",
    ".local .align 4 .b8 depot[8];",
]


@pytest.mark.parametrize("line", UNKNOWN, ids=lambda line: line.split()[0])
def test_an_unknown_instruction_is_an_error_that_names_it(line):
    body = f"{HEAD}.visible .entry k()\n{{\n.reg .b32 %r<5>; .reg .f32 %f<5>;\n{line}\nret;\n}}"
    with pytest.raises(instructions.UnknownError, match=line.split()[0].replace(".", r"\.")):
        translate.translate(body)


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no ptxas")
def test_the_forms_are_those_of_nvidias_assembler(tmp_path):
    (tmp_path / "forms.ptx").write_text(program())
    done = subprocess.run(
        ["ptxas", "-arch=sm_90", str(tmp_path / "forms.ptx"), "-o", str(tmp_path / "forms.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:2000]
