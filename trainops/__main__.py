"""``python -m trainops``: which backends are here, what they were built with, or why they are missing.

``python -m trainops verify`` holds every op of every backend on this machine to the specification.
"""

import argparse
import os
import platform
import signal
import sys
from collections.abc import Iterator

import torch

from . import __version__
from .adapters import NAMES, backends, passed_over, select, serving


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
    for device_name, device in _devices():
        served, passed = _served_by(device), passed_over(device)
        print(f"  {device_name} tensors are served by: {served}")
        if served not in passed and not os.environ.get("TRAINOPS_BACKEND"):
            for other, why in passed.items():
                print(f"      not by {other}: {why}")


def _devices() -> Iterator[tuple[str, torch.device]]:
    """The devices that are here, as people know them."""
    yield "CPU", torch.device("cpu")
    if not torch.cuda.is_available():
        yield "CUDA (no such device here)", torch.device("cuda", 0)
    for index in range(torch.cuda.device_count()):
        yield f"cuda:{index} ({torch.cuda.get_device_name(index)})", torch.device("cuda", index)
    if torch.backends.mps.is_available():
        yield "MPS", torch.device("mps")
    for index in range(torch.xpu.device_count()):
        yield f"xpu:{index}", torch.device("xpu", index)


def _served_by(device: torch.device) -> str:
    try:
        select(None, device)
    except (RuntimeError, ValueError) as error:
        return f"nothing: {error}"
    return serving(device)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has seen enough ends this quietly
    sys.exit(main(sys.argv[1:]))
