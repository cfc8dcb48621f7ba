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
SOURCES = {"csrc", "trainops", "triton_kernels", "setup.py"}
LIMIT = 600  # seconds for the tests of one mutant: a fault may make them hang


def fingerprint(mutant):
    """What the outcome of a mutant depends on: itself, the source, its tests, and what all tests share."""
    digest = hashlib.sha256(repr(mutant).encode())
    for name in tracked():
        folder, _, file = name.partition("/")
        is_shared = folder == "tests" and not file.startswith(("test_", "mut"))
        if folder in SOURCES or is_shared or name in mutant.tests:
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


def write_table(found):
    """The mutants with their outcomes, in Markdown."""
    lines = [
        "# Mutants",
        "",
        "`make mutants` plants these faults (`mutants.py`) one at a time and runs the tests that should notice.",
        "",
        "| fault | file | noticed by |",
        "| --- | --- | --- |",
    ]
    for mutant, (outcome, by) in found.items():
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

    outcomes = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    keys = {mutant: fingerprint(mutant) for mutant in MUTANTS}
    pending = [m for m in chosen if arguments.again or keys[m] not in outcomes]
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
        outcome, by = outcomes[keys[mutant]] = plant(tree, mutant)
        OUTCOMES.write_text(json.dumps(outcomes, indent=1))
        print(f"[{i}/{len(pending)}] {time.monotonic() - began:4.0f} s  {outcome}  {mutant.name}  {by}", flush=True)
    found = {mutant: outcomes.get(key, ("not tried", "")) for mutant, key in keys.items()}
    write_table(found)
    survivors = [mutant for mutant in chosen if found[mutant][0] == UNNOTICED]
    print("survivors:" if survivors else "no survivors")
    for mutant in survivors:
        print(f"  {mutant.name}  ({mutant.file})")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
