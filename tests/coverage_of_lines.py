"""Measures which lines of ``trainops/`` and ``csrc/`` the tests run, in a copy of the source that is built for it.

python tests/coverage_of_lines.py               of `make test`
python tests/coverage_of_lines.py --thorough    of `make test-all`
"""

import sys

from scratch import Tree

# Of C++, gcc counts lines; the kernels of CUDA are those that the tests compile for the CPU.
COUNTED = "--coverage -O1"


def main():
    tree = Tree(
        "coverage",
        CFLAGS=COUNTED,
        CXXFLAGS=COUNTED,
        LDFLAGS="--coverage",
        TRAINOPS_SKIP="cuda",
        TRAINOPS_REQUIRE="cpu",
        TRAINOPS_SHIM_FLAGS="--coverage",
        MAX_JOBS="2",
    )
    tree.build()
    for stale in tree.path.rglob("*.gcda"):
        stale.unlink()
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--cov=trainops", "--cov-report=term"]
    status, output = tree.run(*pytest, *sys.argv[1:])
    print(output[output.find("= tests coverage") - 40 :] if "tests coverage" in output else output)
    gcovr = [
        "-m",
        "gcovr",
        "--root",
        ".",
        "--filter",
        "csrc/",
        "--gcov-ignore-errors=all",
        "--merge-mode-functions=merge-use-line-0",
    ]
    print(tree.run(*gcovr, "build")[1])
    return status


if __name__ == "__main__":
    sys.exit(main())
