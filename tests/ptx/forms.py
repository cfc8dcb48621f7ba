"""The instructions that compute a value from values, as a table to be read beside NVIDIA's PTX manual.

Each row has the form of an opcode, the types that ``T`` may be (and ``F``, the type converted from), the operands,
and the result as a C++ expression of the sources ``a`` to ``d``, with functions of the headers. A form with two
results has one for each of its destinations ``p|q``. ``[...]`` may be left out. Among operands, ``W`` is the integer
of twice T's width, and ``B`` the bits of T. ``E``, ``C``, ``U`` and ``K`` are comparisons: of bits, signed integers,
unsigned integers, and floats.
"""

import functools
import itertools
import re
from typing import NamedTuple

WIDTHS = {"pred": 1, **{f"{kind}{width}": width for kind in "bus" for width in (8, 16, 32, 64)}}
WIDTHS |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "f16x2": 32, "bf16x2": 32}

CLASSES = {
    "int": "u16 s16 u32 s32 u64 s64",
    "int32": "u32 s32 u64 s64",
    "signed": "s16 s32 s64",
    "unsigned": "u16 u32 u64",
    "any": "u8 s8 u16 s16 u32 s32 u64 s64",
    "bits": "b16 b32 b64",
    "float": "f32 f64",
}
COMPARISONS = {
    "E": "eq ne",
    "C": "eq ne lt le gt ge",
    "U": "eq ne lt le gt ge lo ls hi hs",
    "K": "eq ne lt le gt ge equ neu ltu leu gtu geu num nan",
}

TABLE = """
form              T                 F         operands            result
add.T             int               -         T <- T T            a + b
sub.T             int               -         T <- T T            a - b
mul.lo.T          int               -         T <- T T            product(a, b)
mul.hi.T          int               -         T <- T T            product_high(a, b)
mul.wide.T        u16 s16 u32 s32   -         W <- T T            W(a) * W(b)
mad.lo.T          int               -         T <- T T T          product(a, b) + c
mad.wide.T        u16 s16 u32 s32   -         W <- T T W          W(a) * W(b) + c
div.T             int               -         T <- T T            quotient(a, b)
rem.T             int               -         T <- T T            remainder(a, b)
min.T             int               -         T <- T T            b < a ? b : a
max.T             int               -         T <- T T            a < b ? b : a
neg.T             signed            -         T <- T              -a
abs.T             signed            -         T <- T              a < 0 ? -a : a
add[.rn].T        float             -         T <- T T            a + b
sub[.rn].T        float             -         T <- T T            a - b
mul[.rn].T        float             -         T <- T T            a * b
div.rn.T          float             -         T <- T T            a / b
fma.rn.T          float             -         T <- T T T          std::fma(a, b, c)
add.rn.T          f16 bf16          -         T <- T T            fused(a, one<T>(), b)
mul.rn.T          f16 bf16          -         T <- T T            fused(a, b, T{0x8000})
fma.rn.T          f16 bf16          -         T <- T T T          fused(a, b, c)
add.rn.T          f16x2 bf16x2      -         B <- B B            fused_pairs<T>(a, pair(one<Half<T>>()), b)
mul.rn.T          f16x2 bf16x2      -         B <- B B            fused_pairs<T>(a, b, 0x80008000)
fma.rn.T          f16x2 bf16x2      -         B <- B B B          fused_pairs<T>(a, b, c)
sqrt.rn.T         float             -         T <- T              std::sqrt(a)
rcp.rn.T          float             -         T <- T              T(1) / a
rcp.approx.ftz.T  f64               -         T <- T              coarse_reciprocal(a)
min.T             float             -         T <- T T            smaller(a, b)
max.T             float             -         T <- T T            larger(a, b)
min.NaN.T         f32               -         T <- T T            nan(a, b) ? quiet_nan<T>() : smaller(a, b)
max.NaN.T         f32               -         T <- T T            nan(a, b) ? quiet_nan<T>() : larger(a, b)
neg.T             float             -         B <- B              negative(a)
abs.T             float f16 bf16    -         B <- B              magnitude(a)
abs.T             f16x2 bf16x2      -         B <- B              a & 0x7fff7fff
abs.ftz.T         f32               -         T <- T              without_subnormals(std::fabs(a))
and.T             bits pred         -         T <- T T            a & b
or.T              bits pred         -         T <- T T            a | b
xor.T             bits pred         -         T <- T T            a ^ b
not.T             bits              -         T <- T              ~a
not.T             pred              -         T <- T              !a
shl.T             bits              -         T <- T u32          shift_left(a, b)
shr.T             bits int          -         T <- T u32          shift_right(a, b)
shf.l.wrap.T      b32               -         T <- T T u32        funnel_left(a, b, c & 31)
shf.r.wrap.T      b32               -         T <- T T u32        funnel_right(a, b, c & 31)
shf.l.clamp.T     b32               -         T <- T T u32        funnel_left(a, b, c < 32 ? c : 32)
shf.r.clamp.T     b32               -         T <- T T u32        funnel_right(a, b, c < 32 ? c : 32)
bfi.T             b32 b64           -         T <- T T u32 u32    insert_bits(a, b, c, d)
bfe.T             int32             -         T <- T u32 u32      extract_bits(a, b, c)
brev.T            b32 b64           -         T <- T              reverse_bits(a)
popc.T            b32 b64           -         u32 <- T            __builtin_popcountll(a)
clz.T             b32 b64           -         u32 <- T            leading_zeros(a)
bfind.T           u32 u64           -         u32 <- T            highest_bit(a)
bfind.shiftamt.T  u32 u64           -         u32 <- T            a == 0 ? ~u32(0) : leading_zeros(a)
prmt.T            b32               -         T <- T T u32        permute_bytes(a, b, c)
lop3.T            b32               -         T <- T T T u32      logic(a, b, c, d)
setp.E.T          bits              -         pred <- T T         E(a, b)
setp.C.T          signed            -         pred <- T T         C(a, b)
setp.U.T          unsigned          -         pred <- T T         U(a, b)
setp.K.T          float             -         pred <- T T         K(a, b)
setp.K.T          f16 bf16          -         pred <- T T         K(widen(a), widen(b))
setp.K.T          f16x2 bf16x2      -         pred <- B B         K(low<T>(a), low<T>(b)) ; K(high<T>(a), high<T>(b))
selp.T            int bits          -         T <- T T pred       c ? a : b
selp.T            float             -         B <- B B pred       c ? a : b
mov.T             int bits pred     -         T <- T              a
mov.T             float             -         B <- B              a
cvt.T.F           any               any       T <- F              T(a)
cvt.rn.T.F        float             any       T <- F              T(a)
cvt.rzi.T.F       any               float     T <- F              to_integer<T>(std::trunc(a))
cvt.rni.T.F       any               float     T <- F              to_integer<T>(std::nearbyint(a))
cvt.rmi.T.F       any               float     T <- F              to_integer<T>(std::floor(a))
cvt.rpi.T.F       any               float     T <- F              to_integer<T>(std::ceil(a))
cvt.rn.T.F        f32               f64       T <- F              T(a)
cvt.T.F           f64               f32       T <- F              T(a)
cvt.T.F           f32               f16 bf16  T <- F              widen(a)
cvt.T.F           f64               f16 bf16  T <- F              T(widen(a))
cvt.rn.T.F        f16 bf16          f32       T <- F              narrow<T>(a)
cvt.rn.T.F        f16               f64       T <- F              narrow<T>(to_odd(a))
cvt.rn.T.F        f16x2 bf16x2      f32       B <- F F            pair_of<T>(a, b)
"""


class Form(NamedTuple):
    """What an opcode computes: C++ types of its operands, and the expression."""

    destination: str
    sources: list[str]
    result: str
    second: str  # for the second destination of two


class Row(NamedTuple):
    form: str
    names: dict[str, list[str]]  # what each letter of the form may be
    operands: str
    result: str

    def expression(self):
        """The forms' opcodes as a regular expression, with a group for each letter."""
        pattern = re.sub(r"\[(.*?)\]", r"(?:\1)?", self.form.replace(".", r"\."))
        return re.compile(
            re.sub(
                r"(?<=\.)[A-Z](?=\\|$)", lambda letter: f"(?P<{letter[0]}>{'|'.join(self.names[letter[0]])})", pattern
            )
        )

    def opcodes(self):
        """All of them, by what the letters are."""
        letters = re.findall(r"(?<=\.)[A-Z](?=\.|$)", self.form)
        for names in itertools.product(*(self.names[letter] for letter in letters)):
            chosen = dict(zip(letters, names, strict=True))
            opcode = re.sub(r"(?<=\.)[A-Z](?=\.|$)", lambda letter, chosen=chosen: chosen[letter[0]], self.form)
            yield re.sub(r"[\[\]]", "", opcode), chosen


def choices(types):
    return [name for entry in types.split() for name in CLASSES.get(entry, entry).split()]


def rows():
    for line in TABLE.strip().splitlines()[1:]:
        form, types, converted, operands, result = re.split(r"\s{2,}", line.strip())
        names = {"T": choices(types), "F": choices(converted)}
        names |= {letter: listed.split() for letter, listed in COMPARISONS.items()}
        yield Row(form, names, operands, result)


ROWS = list(rows())
EXPRESSIONS = [row.expression() for row in ROWS]


def bits(name):
    """The untyped bits of a type."""
    return "pred" if name == "pred" else f"b{WIDTHS[name]}"


@functools.cache
def find(opcode):
    """The form of an opcode; None where the table has no row for it."""
    for row, pattern in zip(ROWS, EXPRESSIONS, strict=True):
        if not (found := pattern.fullmatch(opcode)):
            continue
        names = found.groupdict()
        scalar = names.get("T", "")
        names["B"] = bits(scalar)
        names["W"] = scalar[0] + str(2 * WIDTHS[scalar])
        left, right = row.operands.split(" <- ")
        types = [names.get(name) or name for name in (left, *right.split())]
        text = re.sub(r"\b[TFWECUK]\b", lambda letter, names=names: names[letter[0]], row.result)
        result, _, second = text.partition(" ; ")
        return Form(types[0], types[1:], result, second)
    return None
