"""Plants the faults of ``mutants.py`` in a copy of the source, one at a time, and shows which ones no test notices.

    python tests/mutate.py                     all of them; goes on where it was stopped
    python tests/mutate.py --only cpu,ema      those whose name or file has one of these words
    python tests/mutate.py --again             also those whose outcome is known

An outcome counts for the source and the tests that it was found with. The table goes to ``tests/MUTANTS.md``.
"""

import argparse
import hashlib
import json
import sys
import time

from mutants import C_PLUS_PLUS, PYTHON
from mutants_gpu import TRITON_AND_CUDA
from scratch import ROOT, Tree, tracked

OUTCOMES = ROOT / "build" / "mutants.json"
MUTANTS = [*C_PLUS_PLUS, *PYTHON, *TRITON_AND_CUDA]
NOTICED, UNNOTICED = "noticed", "UNNOTICED"
LIMIT = 600  # seconds for the tests of one mutant: a fault may make them hang


def fingerprint():
    """What outcomes depend on."""
    folders = {"csrc", "tests", "trainops", "triton_kernels", "setup.py"}
    digest = hashlib.sha256()
    for name in tracked():
        if name.split("/")[0] in folders and not name.endswith(".md"):
            digest.update(name.encode() + (ROOT / name).read_bytes())
    return digest.hexdigest()


def test(tree, selections):
    return tree.run("-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *selections, limit=LIMIT)


def must_pass(tree, selections):
    """Without a fault, the tests notice none."""
    status, output = test(tree, selections)
    if status != 0:
        raise SystemExit(f"{' '.join(selections)} does not pass without a mutant:\n{output[-4000:]}")


def plant(tree, mutant):
    """Whether the tests notice the mutant, and which one did."""
    path = tree.path / mutant.file
    path.write_text(path.read_text().replace(mutant.old, mutant.new))
    try:
        if mutant.file.startswith("csrc/") and not mutant.file.startswith("csrc/cuda/"):
            tree.build()  # the tests build the CUDA kernels themselves
        status, output = test(tree, mutant.tests)
    finally:
        tree.restore(mutant.file)
    if status == 0:
        return UNNOTICED, ""
    failed = [
        line.split(" ")[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR ")) and "::" in line
    ]
    if failed:
        return NOTICED, failed[0]
    if status is None or status < 0:
        return NOTICED, output if status is None else f"signal {-status}"
    raise SystemExit(f"{mutant.name}: its tests could not be run:\n{output[-4000:]}")


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
        tree = Tree("mutants", TRAINOPS_SKIP="cuda", TRAINOPS_REQUIRE="cpu")
        tree.build()
    passing = set()
    for i, mutant in enumerate(pending, start=1):
        if mutant.tests not in passing:
            must_pass(tree, mutant.tests)
            passing.add(mutant.tests)
        began = time.monotonic()
        outcomes[mutant.name] = plant(tree, mutant)
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
