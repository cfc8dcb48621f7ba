"""Builds an extension module with ninja: in parallel, and only what changed, headers and commands included.

Every path in the build file is relative to the source tree, so a copy of a built tree is up to date.
"""

import os
import shlex
import subprocess
from pathlib import Path

import ninja
from ninja.ninja_syntax import Writer, escape

ROOT = Path(__file__).parent.parent


def max_jobs() -> int:
    """Compiler processes at a time: ``MAX_JOBS``, or one per core where it is not set or 0."""
    value = os.environ.get("MAX_JOBS") or "0"
    if not value.isdecimal():
        raise SystemExit(f"MAX_JOBS must be a number of processes, not {value!r}")
    return int(value) or os.cpu_count() or 1


def command_output(*command: str) -> str:
    """What a program prints; empty if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout + done.stderr


def build_module(
    module: Path,
    sources: list[str],
    compilers: dict[str, list[str]],
    linker: list[str],
    libraries: list[str],
    version: str,
    quiet: bool = False,
) -> None:
    """Compile each source with the compiler of its suffix, and link the objects into ``module``.

    Paths are relative to the source tree. Raises CalledProcessError after the compilers have shown their errors.
    """
    folder = module.parent
    rules = folder / "build.ninja"
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    # ninja repeats a command that changed. With the version in a comment, a new compiler compiles everything again.
    comment = f" # {version}"
    with (ROOT / rules).open("w") as file:
        writer = Writer(file, width=1 << 20)  # a line that is wrapped could lose a space inside quotes
        writer.variable("builddir", str(folder))
        for suffix, compiler in compilers.items():
            command = f"{escape(shlex.join(compiler))} -MMD -MF $out.d -c $in -o $out{escape(comment)}"
            writer.rule(suffix, command, description="compile $in", depfile="$out.d", deps="gcc")
        command = f"{escape(shlex.join(linker))} $in -o $out {escape(shlex.join(libraries) + comment)}"
        writer.rule("link", command, description="link $out")
        objects = [f"{folder / source}.o" for source in sources]
        for source, target in zip(sources, objects, strict=True):
            writer.build(target, Path(source).suffix, source)
        writer.build(str(module), "link", objects)
    options = ["-f", str(rules), "-j", str(max_jobs()), "-k", "0", *(["--quiet"] if quiet else [])]
    # Errors belong on stderr (2); ninja writes them to stdout.
    subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), *options], cwd=ROOT, stdout=2, check=True)
