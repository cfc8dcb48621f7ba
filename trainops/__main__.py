"""``python -m trainops``: which backends are here, what they were built with, or why they are missing.

``python -m trainops verify`` holds every op of every backend on this machine to the specification.
"""

import argparse
import platform
import signal
import sys

import torch

from . import __version__
from .adapters import NAMES, backends, select, serving


def main(arguments: list[str]) -> int:
    """What the command line says; 1 where something is not as it should be."""
    parser = argparse.ArgumentParser("python -m trainops", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="[verify]")
    own = commands.add_parser("verify", help="hold every op of every backend here to the specification")
    own.add_argument("--device", help="such as cuda or cuda:1; default: the CPU, and a GPU where there is one")
    own.add_argument("--backend", choices=NAMES, help="default: all")
    args = parser.parse_args(arguments)
    if args.command is None:
        show_backends()
        return 0
    from .verify import verify

    try:
        return 0 if verify(args.device, args.backend) else 1
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1


def show_backends() -> None:
    """Print a table of the backends and which of them serve which tensors."""
    found = backends()
    print(f"trainops {__version__}, torch {torch.__version__}, Python {platform.python_version()}\n")
    for name in NAMES:
        backend = found[name]
        state = "available" if backend.available else "missing"
        print(f"  {name:<10} {state:<10} {backend.details or backend.reason}")
    print()
    for device_type, present in (("cpu", True), ("cuda", torch.cuda.is_available())):
        note = "" if present else "  (no such device here)"
        print(f"  {device_type.upper()} tensors are served by: {_served_by(device_type)}{note}")


def _served_by(device_type: str) -> str:
    try:
        select(None, device_type)
    except (RuntimeError, ValueError) as error:
        return f"nothing: {error}"
    return serving(device_type)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has seen enough ends this quietly
    sys.exit(main(sys.argv[1:]))
