"""Plants the faults of ``mutants.py`` in a copy of the source, one at a time, and shows which ones no test notices.

    python tests/mutate.py                     all of them; goes on where it was stopped
    python tests/mutate.py --only cpu,ema      those whose name or file has one of these words
    python tests/mutate.py --again             also those whose outcome is known

An outcome counts for the source and the tests that it was found with. The table goes to ``tests/MUTANTS.md``.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mutants import MUTANTS

ROOT = Path(__file__).parent.parent
SCRATCH = ROOT / "build" / "mutants"
TREE = SCRATCH / "tree"
OUTCOMES = SCRATCH / "outcomes.json"
NOTICED, UNNOTICED = "noticed", "UNNOTICED"
TIME_LIMIT = 600  # seconds for the tests of one mutant: a fault may make them hang


def tracked():
    """The files of the source, as they are now."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(name for name in names if (ROOT / name).is_file())


def fingerprint():
    """What outcomes depend on."""
    folders = {"csrc", "tests", "trainops", "triton_kernels", "setup.py"}
    digest = hashlib.sha256()
    for name in tracked():
        if name.split("/")[0] in folders and not name.endswith(".md"):
            digest.update(name.encode() + (ROOT / name).read_bytes())
    return digest.hexdigest()


def copy_tree():
    """The source and what is built of it. Files that have not changed keep their times: nothing is built again."""
    TREE.mkdir(parents=True, exist_ok=True)
    names = set(tracked())
    for name in names:
        restore(name)
    for old in TREE.rglob("*"):
        name = old.relative_to(TREE).as_posix()
        is_built = name.startswith("build/") or old.suffix == ".so" or old.name == "_build.json"
        if old.is_file() and not old.is_symlink() and name not in names and not is_built:
            old.unlink()
    link = TREE / "trainops" / "triton_kernels"  # in place of the installed package
    if not link.is_symlink():
        link.symlink_to("../triton_kernels")


def restore(name):
    source, target = ROOT / name, TREE / name
    if not target.exists() or target.read_bytes() != source.read_bytes():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def run(*command):
    """The exit status of a command in the copy, and what it printed; no status if it did not end in time."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TRAINOPS_SKIP": "cuda", "TRAINOPS_REQUIRE": "cpu"}
    try:
        done = subprocess.run(
            command,
            cwd=TREE,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIME_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"did not end within {TIME_LIMIT} s"
    return done.returncode, done.stdout


def build():
    status, output = run(sys.executable, "setup.py", "build_ext", "--inplace")
    if status != 0:
        raise SystemExit(f"the copy does not build:\n{output}")


def test(selections):
    return run(sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *selections)


def must_pass(selections):
    """Without a fault, the tests notice none."""
    status, output = test(selections)
    if status != 0:
        raise SystemExit(f"{' '.join(selections)} does not pass without a mutant:\n{output[-4000:]}")


def plant(mutant):
    """Whether the tests notice the mutant, and which one did."""
    path = TREE / mutant.file
    path.write_text(path.read_text().replace(mutant.old, mutant.new))
    try:
        if mutant.file.startswith("csrc/") and not mutant.file.startswith("csrc/cuda/"):
            build()  # the tests build the CUDA kernels themselves
        status, output = test(mutant.tests)
    finally:
        restore(mutant.file)
    if status == 0:
        return UNNOTICED, ""
    failed = [line.split(" ")[1] for line in output.splitlines() if line.startswith("FAILED ")]
    if status is not None and not failed:
        raise SystemExit(f"{mutant.name}: its tests could not be run:\n{output[-4000:]}")
    return NOTICED, failed[0] if failed else output


def write_table(outcomes):
    """The mutants with their outcomes, in Markdown."""
    lines = [
        "# Mutants",
        "",
        "`make mutants` plants these faults (`mutants.py`) one at a time and runs the tests that should notice.",
        "",
        "| fault | file | noticed by |",
        "| --- | --- | --- |",
    ]
    for mutant in MUTANTS:
        outcome, by = outcomes.get(mutant.name, ("not tried", ""))
        shown = f"`{by.removeprefix('tests/')}`" if outcome == NOTICED else outcome
        shown = f"no fault: {mutant.no_fault}" if mutant.no_fault else shown
        lines.append(f"| {mutant.name} | `{mutant.file}` | {shown} |")
    (ROOT / "tests" / "MUTANTS.md").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="words of names or files, separated by commas")
    parser.add_argument("--again", action="store_true", help="also those whose outcome is known")
    arguments = parser.parse_args()
    words = arguments.only.split(",") if arguments.only else [""]
    chosen = [m for m in MUTANTS if not m.no_fault and any(word in f"{m.name} {m.file}" for word in words)]
    if not chosen:
        raise SystemExit(f"no mutant has {arguments.only!r} in its name or file")

    known = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    outcomes = known["outcomes"] if known.get("fingerprint") == fingerprint() else {}
    pending = [m for m in chosen if arguments.again or m.name not in outcomes]
    print(f"{len(chosen)} mutants, {len(chosen) - len(pending)} of them known", flush=True)
    if pending:
        copy_tree()
        build()
    passing = set()
    for i, mutant in enumerate(pending, start=1):
        if mutant.tests not in passing:
            must_pass(mutant.tests)
            passing.add(mutant.tests)
        began = time.monotonic()
        outcomes[mutant.name] = plant(mutant)
        OUTCOMES.write_text(json.dumps({"fingerprint": fingerprint(), "outcomes": outcomes}, indent=1))
        outcome, by = outcomes[mutant.name]
        print(f"[{i}/{len(pending)}] {time.monotonic() - began:4.0f} s  {outcome}  {mutant.name}  {by}", flush=True)
    write_table(outcomes)
    survivors = [m for m in chosen if outcomes[m.name][0] == UNNOTICED]
    print(
        "\n".join(["survivors:", *(f"  {m.name}  ({m.file})" for m in survivors)] if survivors else ["no survivors"])
    )
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
