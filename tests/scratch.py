"""A copy of the source under ``build/``, for what must not happen in the source itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def tracked():
    """The files of the source, as they are now."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(name for name in names if (ROOT / name).is_file())


class Tree:
    """The copy. Files that have not changed keep their times, so that nothing is built again without need."""

    def __init__(self, name, **environment):
        self.path = ROOT / "build" / name
        self.environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
        names = set(tracked())
        for file in names:
            self.restore(file)
        for old in [path for path in self.path.rglob("*") if path.is_file() and not path.is_symlink()]:
            file = old.relative_to(self.path).as_posix()
            if (
                file not in names
                and not file.startswith("build/")
                and old.suffix != ".so"
                and old.name != "_build.json"
            ):
                old.unlink()
        link = self.path / "trainops" / "triton_kernels"  # in place of the installed package
        if not link.is_symlink():
            link.symlink_to("../triton_kernels")

    def restore(self, file):
        """Give a file what it has in the source."""
        source, target = ROOT / file, self.path / file
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def run(self, *command, limit=None):
        """The exit status of a Python command, and what it printed; no status if it takes longer than ``limit``."""
        try:
            done = subprocess.run(
                [sys.executable, *command],
                cwd=self.path,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None, f"did not end within {limit} s"
        return done.returncode, done.stdout

    def build(self):
        """Build the backends in place."""
        status, output = self.run("setup.py", "build_ext", "--inplace")
        if status != 0:
            raise SystemExit(f"the copy does not build:\n{output}")
