"""``python -m trainops``: which backends are here, what they were built with, or why they are missing."""

import platform
import signal

import torch

from . import __version__
from .adapters import NAMES, backends, select, serving


def main() -> None:
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
    main()
