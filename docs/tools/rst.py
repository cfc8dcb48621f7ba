"""Lets mkdocstrings show what docstrings have of Sphinx: roles, literal blocks and tables."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod):`~?([\w.]+)`")
RULE = re.compile(r"=+( +=+)+$")


class Rst(griffe.Extension):
    """Rewrites every docstring of the package as Markdown when it is collected."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """The whole package has been loaded."""
        aliases = {name: member for name, member in pkg.members.items() if member.is_alias}
        self._public = {name: alias.final_target for name, alias in aliases.items()}
        # Functions whose module has their name: there, a path leads to the module.
        self._hidden = {
            name
            for name, member in pkg.members.items()
            if member.is_module and name in member.members
        }
        self._visit(pkg, set())

    def _visit(self, obj: griffe.Object | griffe.Alias, seen: set[str]) -> None:
        if obj.is_alias or obj.path in seen:
            return
        seen.add(obj.path)
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value, lambda name: self._path(name, obj))
        for member in obj.members.values():
            self._visit(member, seen)

    def _path(self, name: str, obj: griffe.Object) -> str:
        """Where a name of a docstring leads to; empty where the reference does not have it."""
        first, _, rest = name.removeprefix("trainops.").partition(".")
        if first in self._hidden:
            return f"trainops.{first}.{first}"
        if first in self._public:
            return f"trainops.{first}" + (f".{rest}" if rest else "")
        owner = obj if obj.is_class else obj.parent
        for public, kind in self._public.items():
            if kind.is_class and owner in (kind, *kind.mro()) and name in kind.all_members:
                return f"trainops.{public}.{name}"
        return ""


def markdown(text: str, path: Any) -> str:
    """A docstring in Markdown."""

    def link(found: re.Match[str]) -> str:
        name = found[1]
        target = path(name)
        return f"[`{name}`][{target}]" if target else f"`{name}`"

    return ROLE.sub(link, "\n".join(tables(blocks(text.split("\n")))))


def blocks(lines: list[str]) -> list[str]:
    """Literal blocks, which a line that ends in two colons begins, as fenced code."""
    out: list[str] = []
    i = 0
    while i < len(lines):
        line = lines[i]
        i += 1
        if not line.rstrip().endswith("::"):
            out.append(line)
            continue
        if line.strip() != "::":
            out.append(line.rstrip()[:-1])
        margin = len(line) - len(line.lstrip())
        while i < len(lines) and not lines[i].strip():
            i += 1
        code: list[str] = []
        while i < len(lines) and (
            not lines[i].strip() or len(lines[i]) - len(lines[i].lstrip()) > margin
        ):
            code.append(lines[i])
            i += 1
        while code and not code[-1].strip():
            code.pop()
        inner = min(len(x) - len(x.lstrip()) for x in code if x.strip())
        indent = " " * margin
        out += ["", f"{indent}```python", *(indent + x[inner:] for x in code), f"{indent}```", ""]
    return out


def tables(lines: list[str]) -> list[str]:
    """Simple tables, between three rules, as Markdown's."""
    out: list[str] = []
    i = 0
    while i < len(lines):
        if not RULE.match(lines[i].strip()):
            out.append(lines[i])
            i += 1
            continue
        starts = [found.start() for found in re.finditer(r"=+", lines[i])]
        end = [n for n in range(i + 1, len(lines)) if RULE.match(lines[n].strip())][1]
        rows: list[list[str]] = []
        for line in lines[i + 1 : end]:
            if RULE.match(line.strip()):
                rows.append(["---"] * len(starts))
                continue
            cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
            if rows and not cells[0]:
                rows[-1] = [
                    " ".join(filter(None, pair)) for pair in zip(rows[-1], cells, strict=True)
                ]
            else:
                rows.append(cells)
        out += ["", *(f"| {' | '.join(row)} |" for row in rows), ""]
        i = end + 1
    return out
