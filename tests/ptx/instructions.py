"""One PTX instruction as C++. ``forms.py`` has those that compute a value from values; here are all others.

An instruction that is not known is an error that names it. ``machine.h`` says what the C++ calls.
"""

import re

from . import forms

SPECIAL = {
    **{"%tid.x": "t.thread", "%ctaid.x": "t.block", "%ntid.x": "t.threads", "%nctaid.x": "t.blocks"},
    **{f"%{name}.{axis}": "u32(0)" for name in ("tid", "ctaid") for axis in "yz"},
    **{f"%{name}.{axis}": "u32(1)" for name in ("ntid", "nctaid") for axis in "yz"},
    "%laneid": "(t.thread % 32)",
}
HINTS = "ca|cg|cs|lu|cv|wb|wt|nc|volatile|weak|L1::evict_last|L1::evict_first|L1::evict_normal"
MEMORY = re.compile(
    rf"(?P<kind>ld|st)(?:\.volatile|\.weak)?(?:\.(?P<space>global|shared|param))?(?:\.(?:{HINTS}))*"
    r"(?:\.v(?P<count>2|4))?\.(?P<type>\w+)"
)
ATOMIC = re.compile(
    r"(?P<kind>atom|red)(?:\.(?P<order>relaxed|acquire|release|acq_rel))?(?:\.(?P<scope>cta|gpu|sys))?\.(?P<space>global|shared)"
    r"(?:\.(?P<late>cta|gpu|sys))?\.add\.(?P<type>[us]32|u64)"
)
MATRICES = re.compile(
    r"(?P<kind>ld|st)matrix\.sync\.aligned\.m8n8\.x(?P<count>1|2|4)(?P<transposed>\.trans)?\.shared\.b16"
)
ORDERS = {None: "relaxed", "relaxed": "relaxed", "acquire": "acquire", "release": "release"}
ORDERS["acq_rel"] = "acquire_release"
FENCES = {"membar.cta": "block", "membar.gl": "device", "membar.sys": "device"}
FENCES |= {f"fence.{order}.{scope}": FENCES[f"membar.{name}"] for order in ("acq_rel", "sc")
           for scope, name in (("cta", "cta"), ("gpu", "gl"), ("sys", "sys"))}  # fmt: skip
VOTES = {"or": "any", "and": "all", "popc": "count"}


class UnknownError(Exception):
    """An instruction or a directive that there is no translation of."""


def name_of(text):
    """A register, label or kernel as C++ may call it."""
    return re.sub(r"\W", "_", text.replace("%", "r_").replace("$", "L_"))


def split(operands):
    """Operands, at commas that are in no braces or brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[(]*[}\])])", operands) if part.strip()]


def in_braces(operand):
    return [part.strip() for part in operand.strip("{} ").split(",")] if operand[0] == "{" else [operand]


class Instructions:
    """The instructions of a kernel, and what they refer to."""

    def __init__(self):
        self.registers, self.symbols = set(), {}
        self.where = "?"  # in the source
        self.lines, self.sites = [], []

    def instruction(self, line):
        found = re.fullmatch(r"(?:@(!?[%\w]+) )?([\w.:]+)(?: (.*))?", line)
        if not found:
            raise UnknownError(line)
        guard, opcode, operands = found.groups()
        operands = split(operands or "")
        try:
            code = self.computed(opcode, operands) or self.control(opcode, operands) or self.memory(opcode, operands)
        except (ValueError, IndexError) as error:
            raise UnknownError(f"{line} ({error})") from error
        if not code:
            raise UnknownError(line)
        self.lines.append(f"if ({self.value(guard)}) {{ {code} }}" if guard else f"{{ {code} }}")

    def value(self, operand):
        """An operand as a C++ expression."""
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand.removeprefix("!") in self.registers:
            return operand[: operand.startswith("!")] + name_of(operand.removeprefix("!"))
        if found := re.fullmatch(r"0([fFdD])([0-9A-Fa-f]+)", operand):
            return f"u{32 if found[1] in 'fF' else 64}(0x{found[2]}ull)"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
            number = int(operand.rstrip("U"), 0)
            return f"u64({number & (2**64 - 1)}ull)"
        if operand in self.symbols:
            return self.symbols[operand]
        raise ValueError(f"operand {operand}")

    def address(self, operand):
        found = re.fullmatch(r"\[\s*([^\]+]+?)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not found:
            raise ValueError(f"address {operand}")
        return f"u64({self.value(found[1])}) + {self.value(found[2] or '0')}"

    def site(self, opcode):
        self.sites.append((opcode, self.where))
        return f"sites[{len(self.sites) - 1}]"

    def computed(self, opcode, operands):
        if opcode.startswith("mov.b") and "{" in "".join(operands):
            return self.moved(int(opcode.removeprefix("mov.b")), *map(in_braces, operands))
        form = forms.find(opcode)
        if form is None:
            return None
        destination, *sources = operands
        if len(sources) != len(form.sources):
            raise ValueError("number of operands")
        inputs = [
            f"const auto {letter} = get<{kind}>({self.value(source)});"
            for letter, kind, source in zip("abcd", form.sources, sources, strict=False)
        ]
        targets = destination.split("|")
        outputs = [f"set<{form.destination}>({self.value(targets[0])}, {form.result});"]
        if len(targets) > 1:
            outputs.append(f"set<pred>({self.value(targets[1])}, {form.second or f'!({form.result})'});")
        return " ".join(inputs + outputs)

    def moved(self, width, targets, sources):
        """Between a register and those that it is made of, the lowest first."""
        if len(sources) == 1:
            part = f"b{width // len(targets)}"
            values = [f"{self.value(target)} = get<{part}>(x >> {i * width // len(targets)});"
                      for i, target in enumerate(targets) if target != "_"]  # fmt: skip
            return f"const auto x = get<b{width}>({self.value(sources[0])}); {' '.join(values)}"
        part = width // len(sources)
        values = [f"b{width}(get<b{part}>({self.value(source)})) << {i * part}" for i, source in enumerate(sources)]
        return f"set<b{width}>({self.value(targets[0])}, {' | '.join(values)});"

    def control(self, opcode, operands):
        if opcode in ("bra", "bra.uni"):
            return f"goto {name_of(operands[0])};"
        if opcode in ("ret", "exit"):
            return "return;"
        if opcode == "trap":
            return f"t.trap({self.site(opcode)});"
        if found := re.fullmatch(r"cvta(?:\.to)?\.global\.u64|(cvta\.param\.u64)", opcode):
            origin = "u64(t.parameters) + " if found[1] else ""  # they lie in the host's memory
            return f"{self.value(operands[0])} = {origin}{self.value(operands[1])};"
        if opcode in FENCES:
            return f"t.fence(Scope::{FENCES[opcode]}, {self.site(opcode)});"
        if opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned"):
            (index,) = operands
            return f"t.barrier({self.value(index)}, {self.site(opcode)});"
        if opcode == "bar.warp.sync":
            return f"t.warp_barrier({self.value(operands[0])}, {self.site(opcode)});"
        if found := re.fullmatch(r"(?:bar|barrier)\.red\.(or|and|popc)(?:\.aligned)?\.(?:pred|u32)", opcode):
            target, index, vote = map(self.value, operands)
            return f"{target} = t.barrier_vote({index}, Vote::{VOTES[found[1]]}, {vote}, {self.site(opcode)});"
        if found := re.fullmatch(r"shfl\.sync\.(up|down|bfly|idx)\.b32", opcode):
            targets = operands[0].split("|")
            inside = f" {self.value(targets[1])} = inside;" if len(targets) > 1 else ""
            arguments = ", ".join(f"u32({self.value(operand)})" for operand in operands[1:])
            call = f"t.shuffle(Shuffle::{found[1]}, {arguments}, inside, {self.site(opcode)})"
            return f"bool inside; {self.value(targets[0])} = {call};{inside}"
        if found := re.fullmatch(r"redux\.sync\.(add|min|max)\.([us]32)", opcode):
            target, value, mask = map(self.value, operands)
            call = f"t.reduce(Reduction::{found[1]}, get<{found[2]}>({value}), {mask}, {self.site(opcode)})"
            return f"set<{found[2]}>({target}, {call});"
        if found := MATRICES.fullmatch(opcode):
            count = int(found["count"])
            loads = found["kind"] == "ld"
            registers, address = operands if loads else operands[::-1]
            values = [self.value(register) for register in in_braces(registers)]
            if len(values) != count:
                raise ValueError("number of matrices")
            call = f"t.{'load' if loads else 'store'}_matrices({self.address(address)}, parts, {count}, "
            call += f"{'true' if found['transposed'] else 'false'}, {self.site(opcode)});"
            if loads:
                moves = " ".join(f"{value} = parts[{i}];" for i, value in enumerate(values))
                return f"u32 parts[{count}]; {call} {moves}"
            return f"const u32 parts[] = {{{', '.join(values)}}}; {call}"
        if opcode == "vote.sync.ballot.b32":
            target, vote, mask = map(self.value, operands)
            return f"{target} = t.ballot({vote}, {mask}, {self.site(opcode)});"
        return None

    def memory(self, opcode, operands):
        if found := ATOMIC.fullmatch(opcode):
            target, address, value = operands if found["kind"] == "atom" else ("", *operands)
            if found["space"] == "shared":  # of this block alone, whatever the scope
                call = f"t.shared_add<{found['type']}>({self.address(address)}, {self.value(value)}, "
                call += f"{self.site(opcode)});"
                return f"{self.value(target)} = {call}" if target else call
            scope = "block" if "cta" in (found["scope"], found["late"]) else "device"
            returns = "true" if target else "false"
            call = f"t.atomic_add<{found['type']}>({self.address(address)}, {self.value(value)}, "
            call += f"Order::{ORDERS[found['order']]}, Scope::{scope}, {returns}, {self.site(opcode)});"
            return f"{self.value(target)} = {call}" if target else call
        if not (found := MEMORY.fullmatch(opcode)):
            return None
        loads = found["kind"] == "ld"
        address, values = operands[::-1] if loads else operands
        values, kind = in_braces(values), found["type"]
        if len(values) != int(found["count"] or 1):
            raise ValueError("number of values")
        item = forms.WIDTHS[kind] // 8
        stored = kind if kind[0] in "us" else f"b{8 * item}"
        place = {"param": "parameter", None: "generic"}.get(found["space"], found["space"])
        where, size = self.address(address), item * len(values)
        if loads:
            access = "" if place == "parameter" else "Access::read, "
            code = f"const auto m = t.{place}({where}, {size}, {access}{self.site(opcode)});"
            for i, value in enumerate(values):
                if value != "_":
                    code += f" set<{stored}>({self.value(value)}, read<{stored}>(m + {i * item}));"
            return code
        code = f"char v[{size}];"
        for i, value in enumerate(values):
            code += f" write<{stored}>(v + {i * item}, get<{stored}>({self.value(value)}));"
        end = ", v" if place == "shared" else ""
        return f"{code} std::memcpy(t.{place}({where}, {size}, Access::write, {self.site(opcode)}{end}), v, {size});"
