"""PTX to C++: one function for each entry. ``instructions.py`` translates the lines of its body.

Registers become variables of as many bits, and labels stay labels. A directive that is not known is an error.
"""

import re

from . import forms
from .instructions import Instructions, UnknownError, name_of, split


class Entry(Instructions):
    """One kernel."""

    def __init__(self, name, parameters, attributes, body, symbols, files):
        super().__init__()
        self.name, self.files = name, files
        self.shared_bytes, self.parameter_bytes = 0, 0
        self.parameters = []
        for symbol, size, alignment in map(declaration, split(parameters)):
            offset = -(-self.parameter_bytes // alignment) * alignment
            self.parameters.append((offset, size))
            self.symbols[symbol] = f"u64({offset})"
            self.parameter_bytes = offset + size
        for text in symbols:
            if re.search(rf"[\[\s]{re.escape(declaration(text)[0])}\b", body):
                self.share(text)
        found = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", attributes)
        self.most_threads = int(found[1]) if found else 1024
        for line in statements(body):
            self.translate(line)

    def share(self, text):
        symbol, size, alignment = declaration(text)
        offset = -(-self.shared_bytes // alignment) * alignment
        self.symbols[symbol] = f"u32({offset})"
        self.shared_bytes = offset + size

    def translate(self, line):
        if line in "{}" or line.endswith(":"):
            self.lines.append(name_of(line[:-1]) + ":;" if line.endswith(":") else line)
        elif found := re.match(r"\.loc (\d+) (\d+)(?:.*inlined_at (\d+) (\d+))?", line):
            places = [f"{self.files[file]}:{line}" for file, line in (found.groups()[:2], found.groups()[2:]) if file]
            if found[2] != "0":
                self.where = ", inlined at ".join(places)
        elif found := re.fullmatch(r"\.reg \.(\w+) (.*)", line):
            for register in split(found[2]):
                stem, _, count = register.strip(">").partition("<")
                names = [f"{stem}{i}" for i in range(int(count))] if count else [stem]
                self.registers.update(names)
                self.lines.append(f"{forms.bits(found[1])} {', '.join(map(name_of, names))};")
        elif line.startswith(".shared"):
            self.share(line)
        elif not line.startswith(".pragma"):
            self.instruction(line)

    def source(self, number):
        sites = [f'{{"{opcode}", "{where}"}}' for opcode, where in self.sites] or ['{"", ""}']
        parameters = [f"{{{offset}, {size}}}" for offset, size in self.parameters] or ["{0, 0}"]
        return [
            f"namespace kernel_{number} {{",
            f"Site sites[] = {{{', '.join(sites)}}};",
            f"const Parameter parameters[] = {{{', '.join(parameters)}}};",
            "void run(Thread& t) {",
            *self.lines,
            "}\n}",
        ]

    def record(self, number):
        scope = f"kernel_{number}::"
        numbers = f"{len(self.parameters)}, {self.parameter_bytes}, {self.shared_bytes}, {self.most_threads}"
        return f'{{"{self.name}", {scope}run, {scope}parameters, {numbers}, {scope}sites, {len(self.sites)}}},'


def declaration(text):
    """Name, bytes and alignment of a parameter or a shared variable."""
    found = re.search(
        r"(?:\.align (\d+) )?\.([busf]\d+)(?: \.ptr[^,]*?)? ([\w$]+)(?:\[(\d*)\])?$", " ".join(text.split())
    )
    if not found:
        raise UnknownError(text)
    item = forms.WIDTHS[found[2]] // 8
    return found[3], item * int(found[4] or (0 if found[4] == "" else 1)), int(found[1] or item)


def statements(body):
    """Labels, braces, directives and instructions, one at a time."""
    for line in body.splitlines():
        line = " ".join(line.split())
        if line.startswith(".loc"):
            yield line
            continue
        for part in re.findall(r"[$\w]+:(?!:)|^\{(?=$)|^\{(?= )|\}$|[^;{}]+(?:\{[^;}]*\}[^;{}]*)*;|\}|\{", line):
            if part := part.strip().rstrip(";").strip():
                yield part


def translate(ptx):
    """The C++ of a PTX file."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
    files = {
        number: "/".join(path.split("/")[-2:]) for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx)
    }
    heads = re.compile(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{;]*)\{")
    entries, end, outside = [], 0, ""
    for head in heads.finditer(ptx):
        outside += ptx[end : head.start()]
        depth, end = 1, head.end()
        while depth:
            brace = re.compile(r"[{}]").search(ptx, end)
            depth, end = depth + (1 if brace[0] == "{" else -1), brace.end()
        entries.append((*head.groups(), ptx[head.end() : end - 1]))
    outside = re.split(r"\.section\b", outside + ptx[end:])[0]
    if re.search(r"\.func\b", outside):
        raise UnknownError("directive .func")
    symbols = re.findall(r"(\.shared [^;]*);", outside)
    kernels = [Entry(*entry, symbols, files) for entry in entries]
    lines = ['#include "machine.h"', "using namespace ptx;", "namespace {"]
    for number, kernel in enumerate(kernels):
        lines += kernel.source(number)
    lines += ["const Kernel kernels[] = {", *(kernel.record(number) for number, kernel in enumerate(kernels)), "};"]
    lines += ["}", f'extern "C" EXPORT void add() {{ add_kernels(kernels, {len(kernels)}); }}', ""]
    return "\n".join(lines)
