"""All inspections in one process, as `make inspect` runs them. With ``--quick``, a sample of what Triton compiles."""

import sys

from . import inspect_cpu, inspect_cuda, inspect_triton


def main(quick: bool = False) -> int:
    """Run all; 1 if one of them found a fault."""
    return max([inspect_cpu.main(), inspect_cuda.main(), inspect_triton.main(quick)])


if __name__ == "__main__":
    sys.exit(main("--quick" in sys.argv[1:]))
