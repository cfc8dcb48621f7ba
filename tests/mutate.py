"""Plants the faults of ``mutants.py`` in a copy of the source, one at a time, and shows which ones no test notices.

    python tests/mutate.py                     all of them; goes on where it was stopped
    python tests/mutate.py --only cpu,ema      those whose name or file has one of these words
    python tests/mutate.py --new               those that ``tests/MUTANTS.md`` has no outcome of
    python tests/mutate.py --again             also those whose outcome is known

An outcome counts for the source and the tests that it was found with; with others, the mutant is planted again. The
last outcome of each is a row of ``tests/MUTANTS.md``.
"""

import argparse
import hashlib
import json
import os
import queue
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from mutants import C_PLUS_PLUS
from mutants_averages import AVERAGES
from mutants_codes import CODES
from mutants_cuda_codes import CUDA_CODES
from mutants_ema import EMA
from mutants_gpu import TRITON_AND_CUDA
from mutants_lr_finder import LR_FINDER
from mutants_models import MODELS
from mutants_monitor import MONITOR
from mutants_python import PYTHON
from mutants_queue import QUEUE
from mutants_rounding import ROUNDING
from mutants_rules import RULES
from mutants_shards import SHARDS
from mutants_statistics import STATISTICS
from mutants_storage import STORAGE
from scratch import ROOT, Tree, tracked

OUTCOMES = ROOT / "build" / "mutants.json"
TABLE = ROOT / "tests" / "MUTANTS.md"
NEW = "not planted yet"
MUTANTS = [
    *C_PLUS_PLUS,
    *RULES,
    *PYTHON,
    *EMA,
    *AVERAGES,
    *MODELS,
    *LR_FINDER,
    *MONITOR,
    *SHARDS,
    *STATISTICS,
    *STORAGE,
    *CODES,
    *CUDA_CODES,
    *ROUNDING,
    *TRITON_AND_CUDA,
    *QUEUE,
]
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


class Workers:
    """As many copies of the source as mutants are tried at a time."""

    def __init__(self, jobs):
        self.trees = queue.Queue()
        for i in range(jobs):
            self.trees.put(Tree(f"mutants-{i}", TRAINOPS_SKIP="cuda", TRAINOPS_REQUIRE="cpu"))
        self.passing = set()

    def outcome(self, mutant):
        """Whether the tests notice the mutant, which one does, and in how many seconds."""
        tree = self.trees.get()
        try:
            tree.build()
            if mutant.tests not in self.passing:
                status, output = test(tree, mutant.tests)
                if status != 0:
                    raise RuntimeError(f"{' '.join(mutant.tests)} does not pass without a mutant:\n{output[-4000:]}")
                self.passing.add(mutant.tests)
            began = time.monotonic()
            return *plant(tree, mutant), time.monotonic() - began
        finally:
            self.trees.put(tree)


def plant(tree, mutant):
    """Whether the tests notice the mutant, and which one does."""
    path = tree.path / mutant.file
    original = path.read_text()
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        if mutant.file.startswith("csrc/") and not mutant.file.startswith("csrc/cuda/"):
            tree.build()  # the tests build the CUDA kernels themselves
        status, output = test(tree, mutant.tests)
    finally:
        path.write_text(original)
    if status == 0:
        return UNNOTICED, ""
    if noticed := re.search(r"^(?:FAILED|ERROR) (\S+?::.*?)(?: - .*)?$", output, re.MULTILINE):
        return NOTICED, noticed[1]
    if status is None or status < 0:
        return NOTICED, output if status is None else f"signal {-status}"
    raise RuntimeError(f"{mutant.name}: its tests could not be run:\n{output[-4000:]}")


def test(tree, selections):
    return tree.run("-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *selections, limit=LIMIT)


def rows():
    """What the table says of each mutant, by its name."""
    return dict(re.findall(r"^\| (.+?) \| `.+?` \| (.+) \|$", TABLE.read_text(), re.MULTILINE))


def write_table(known):
    """The mutants with their last outcomes, in Markdown: those that are known, others as the table has them."""
    before = rows()
    lines = [
        "# Mutants",
        "",
        "`make mutants` plants these faults (`mutants.py`) one at a time and runs the tests that should notice.",
        "",
        "| fault | file | noticed by |",
        "| --- | --- | --- |",
    ]
    for mutant in MUTANTS:
        _, outcome, by = known.get(mutant.name, ("", before.get(mutant.name, NEW), ""))
        shown = f"`{by.removeprefix('tests/')}`" if outcome == NOTICED else outcome
        shown = f"no fault: {mutant.no_fault}" if mutant.no_fault else shown
        lines.append(f"| {mutant.name} | `{mutant.file}` | {shown} |")
    TABLE.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="words of names or files, separated by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--again", action="store_true", help="also those whose outcome is known")
    parser.add_argument("--new", action="store_true", help="those without an outcome in the table")
    arguments = parser.parse_args()
    words = arguments.only.split(",") if arguments.only else [""]
    chosen = [m for m in MUTANTS if not m.no_fault and any(word in f"{m.name} {m.file}" for word in words)]
    if arguments.new:
        table = rows()
        chosen = [m for m in chosen if table.get(m.name, NEW) == NEW]
    if not chosen:
        raise SystemExit("no mutant is new" if arguments.new else f"no mutant has {arguments.only!r} in name or file")

    # By the name of the mutant: what the outcome was found with, the outcome, and what noticed it.
    known = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    keys = {mutant: fingerprint(mutant) for mutant in chosen}
    pending = [m for m in chosen if arguments.again or m.name not in known or known[m.name][0] != keys[m]]
    print(f"{len(chosen)} mutants, {len(chosen) - len(pending)} of them known", flush=True)
    workers = Workers(min(arguments.jobs, len(pending)))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = {pool.submit(workers.outcome, mutant): mutant for mutant in pending}
        try:
            for i, done in enumerate(as_completed(running), start=1):
                mutant, (outcome, by, seconds) = running[done], done.result()
                known[mutant.name] = keys[mutant], outcome, by
                OUTCOMES.write_text(json.dumps(known, indent=1))
                print(f"[{i}/{len(pending)}] {seconds:4.0f} s  {outcome}  {mutant.name}  {by}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            write_table(known)
    survivors = [mutant for mutant in chosen if known[mutant.name][1] == UNNOTICED]
    print("survivors:" if survivors else "no survivors")
    for mutant in survivors:
        print(f"  {mutant.name}  ({mutant.file})")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
