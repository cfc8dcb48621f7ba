"""All inspections in one process, as `make inspect` runs them. With ``--quick``, a sample of what Triton compiles."""

import sys

from . import inspect_cpu, inspect_cuda, inspect_triton


def main(quick: bool = False) -> int:
    """Run all; 1 if one of them found a fault."""
    results = {"cpu": inspect_cpu.main(), "cuda": inspect_cuda.main(), "triton": inspect_triton.main(quick)}
    faulty = [backend for backend, result in results.items() if result]
    print("faults in: " + ", ".join(faulty) if faulty else "no faults")
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main("--quick" in sys.argv[1:]))
