"""Installs a wheel where there is no compiler, and verifies it there: ``make dist``.

    python tests/smoke_wheel.py dist/trainops-*.whl

The environment is new, its `PATH` has nothing but itself, and torch comes from the interpreter that runs this.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

# What has to be true there, as a program.
PROGRAM = """
import shutil, sys
import torch, trainops
assert trainops.__file__.startswith(sys.prefix), trainops.__file__
assert not any(map(shutil.which, ("cc", "gcc", "c++", "g++", "clang", "nvcc"))), "there is a compiler"
found = trainops.backends()
assert found["cpu"].available, found["cpu"].reason
weight = torch.nn.Parameter(torch.ones(1000))
weight.grad = torch.ones(1000)
trainops.AdamW([weight], max_grad_norm=1.0, backend="cpu").step()
assert (weight < 1).all()
"""


def main(wheel: str) -> None:
    """Raises where something is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False, symlinks=True)
        python = Path(folder, "bin", "python")
        site = sysconfig.get_path("purelib", vars={"base": folder})
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", f"--target={site}", wheel],
            check=True,
        )
        Path(site, "torch.pth").write_text(str(Path(sysconfig.get_path("purelib"))))
        environment = {"PATH": str(python.parent), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        for arguments in (["-c", PROGRAM], ["-m", "trainops"], ["-m", "trainops", "verify", "--backend", "cpu"]):
            subprocess.run([python, *arguments], cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
