"""The loops in machine code that read memory: which compute in float64, and on a CPU, which element by element.

A loop is what a compiler's textbook calls one (a natural loop): a jump back to an instruction that every way into the
loop passes, and all that lies on a way from there to the jump, wherever it stands in the listing.
"""

import re
from collections import defaultdict
from typing import NamedTuple

FLOAT64 = re.compile(r"\bD(?:ADD|MUL|FMA|SETP|MNMX)\b|\.F64\b|\bMUFU\.\w+64H\b|\.f64\b")
# Arithmetic of x86 on packed and on single numbers.
PACKED = re.compile(r"v?(?:add|sub|mul|div|sqrt|min|max)p[sd]\b")
SINGLE = re.compile(r"v?(?:add|sub|mul|div|sqrt|min|max)s[sd]\b")
LOADS = re.compile(r"\bLDG\.E\S*\.128\b|\bld\.global\b")  # whole packs in SASS, all in PTX


class Instruction(NamedTuple):
    """Its text, the numbers of those that it may jump to, and whether the next one may follow."""

    text: str
    targets: tuple[int, ...] = ()
    falls_through: bool = True


class Loops(NamedTuple):
    """How many inner loops read memory, with and without float64 instructions."""

    with_float64: int
    without: int


def of_sass(lines: list[str]) -> list[Instruction]:
    """A function as cuobjdump lists it."""
    found = [match.groups() for line in lines if (match := re.search(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", line))]
    numbers = {int(address, 16): i for i, (address, _) in enumerate(found)}
    reconverges: dict[str, int] = {}  # where threads go on that wait at a barrier
    code = []
    for _, text in found:
        targets: tuple[int, ...] = ()
        falls = not re.search(r"^(?:EXIT|RET\S*)\b", text)
        if match := re.search(r"\bBSSY\S*\s+(B\d+),.*?(0x[0-9a-f]+)", text):
            reconverges[match[1]] = int(match[2], 16)
        elif match := re.search(r"\bBSYNC\S*\s+(B\d+)", text):
            targets, falls = (numbers[reconverges[match[1]]],), text[0] == "@"
        elif match := re.search(r"\bBRA(\S*)\s+(.*?)(0x[0-9a-f]+)$", text):
            targets, falls = (numbers[int(match[3], 16)],), text[0] == "@" or bool(match[2]) or ".DIV" in match[1]
        elif match := re.search(r"\bCALL\.REL\S*\s+(0x[0-9a-f]+)", text):  # which leaves loops, too
            targets = (numbers[int(match[1], 16)],)
        code.append(Instruction(text, targets, falls))
    return code


def of_ptx(text: str) -> list[Instruction]:
    """The body of a kernel."""
    lines = [line.partition("//")[0].strip() for line in text[text.index("{") + 1 :].splitlines()]
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in lines:
        if match := re.fullmatch(r"(\$\w+):", line):
            labels[match[1]] = len(instructions)
        elif line.endswith(";"):
            instructions.append(line)
    code = []
    for line in instructions:
        match = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
        ends = line[0] != "@" and (match is not None or re.match(r"(?:ret|exit|trap);", line) is not None)
        code.append(Instruction(line, (labels[match[1]],) if match else (), not ends))
    return code


def of_x86(lines: list[str]) -> list[Instruction]:
    """A function as objdump lists it. A jump to another one, and one through a register, ends it."""
    found = [match.groups() for line in lines if (match := re.match(r"\s*([0-9a-f]+):\t(\S.*?)\s*$", line))]
    numbers = {address: i for i, (address, _) in enumerate(found)}
    code = []
    for _, text in found:
        jump = re.match(r"(?:bnd |notrack )*(j\w+)\s+([0-9a-f]+)?", text)
        targets = (numbers[jump[2]],) if jump and jump[2] in numbers else ()
        ends = jump[1] == "jmp" if jump else re.match(r"(?:repz |bnd )*(?:ret|ud2|hlt)", text) is not None
        code.append(Instruction(text, targets, not ends))
    return code


def reached(code: list[Instruction]) -> tuple[list[int], dict[int, list[int]]]:
    """The instructions in reverse postorder, and by number those that may come before each."""
    before: dict[int, list[int]] = defaultdict(list)
    order: list[int] = []
    stack, seen = [(0, iter(next_of(code, 0)))], {0}
    while stack:
        at, following = stack[-1]
        for to in following:
            before[to].append(at)
            if to not in seen:
                seen.add(to)
                stack.append((to, iter(next_of(code, to))))
                break
        else:
            order.append(at)
            stack.pop()
    return order[::-1], before


def next_of(code: list[Instruction], at: int) -> list[int]:
    """The numbers of the instructions that may follow."""
    following = [at + 1] if code[at].falls_through and at + 1 < len(code) else []
    return [*following, *code[at].targets]


def dominators(order: list[int], before: dict[int, list[int]]) -> dict[int, int]:
    """By number, the last instruction that every way there has passed (Cooper, Harvey and Kennedy)."""
    place = {at: i for i, at in enumerate(order)}
    above = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for at in order[1:]:
            known = [x for x in before[at] if x in above]
            last = known[0]
            for other in known[1:]:
                while last != other:  # they climb until they meet
                    if place[last] > place[other]:
                        last = above[last]
                    else:
                        other = above[other]
            if above.get(at) != last:
                above[at] = last
                changed = True
    return above


def natural_loops(code: list[Instruction]) -> list[frozenset[int]]:
    """The numbers of the instructions of each loop; jumps back to one instruction make one loop."""
    order, before = reached(code)
    above = dominators(order, before)
    jumps: dict[int, list[int]] = defaultdict(list)
    place = {at: i for i, at in enumerate(order)}
    for at in order:
        for to in next_of(code, at):
            if place[to] <= place[at]:
                climbing = at
                while place[climbing] > place[to]:
                    climbing = above[climbing]
                if climbing == to:
                    jumps[to].append(at)
    loops = []
    for head, ends in jumps.items():
        members, pending = {head}, list(ends)
        while pending:
            if (at := pending.pop()) not in members:
                members.add(at)
                pending += before[at]
        loops.append(frozenset(members))
    return loops


def inspect(code: list[Instruction]) -> Loops:
    """Look at the loops that read memory and have no smaller such loop within."""
    reading = [loop for loop in natural_loops(code) if any(LOADS.search(code[at].text) for at in loop)]
    inner = [loop for loop in reading if not any(other < loop for other in reading)]
    with_float64 = sum(any(FLOAT64.search(code[at].text) for at in loop) for loop in inner)
    return Loops(with_float64, len(inner) - with_float64)


def loops_over_blocks(code: list[Instruction]) -> tuple[int, int]:
    """How many innermost loops prefetch and compute, and how many of them element by element."""
    blocks = []
    for loop in natural_loops(code):
        texts = [code[at].text for at in loop]
        if any(text.startswith("prefetch") for text in texts) and any(map(is_arithmetic, texts)):
            blocks.append(loop)
    inner = [loop for loop in blocks if not any(other < loop for other in blocks)]
    return len(inner), sum(any(SINGLE.match(code[at].text) for at in loop) for loop in inner)


def is_arithmetic(text: str) -> bool:
    """Whether an instruction of x86 computes with floating-point numbers."""
    return PACKED.match(text) is not None or SINGLE.match(text) is not None
