"""How ``setup.py`` builds: what it records, what it compiles again, and what it makes of its environment.

The compilers of most tests are scripts, which take no time and fail when they are told to.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import cuda_shim
import pytest
from cuda_shim import ROOT, ninja_build
from targets import SHIM

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc/ninja_build.py", "csrc/nvcc.py")
ARCHITECTURES = "7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0"
SOURCES = (
    "csrc/core/module.cpp",
    "csrc/cpu/module.cpp",
    "csrc/cpu/ema.cpp",
    "csrc/cuda/module.cpp",
    "csrc/cuda/ema.cu",
)
# It answers as g++ and as nvcc do, and fails for sources that contain the word "fault".
COMPILER = """#!/bin/sh
case "$*" in *--version*) echo "fake, release 1.0, V1.0"; exit ;; esac
source= target=
while [ $# -gt 0 ]; do
  case "$1" in -c) source=$2 ;; -o) target=$2 ;; esac
  shift
done
if [ -f "$source" ] && grep -q fault "$source"; then echo "$source: a fault" >&2; exit 1; fi
echo made > "$target"
"""
needs_compiler = pytest.mark.skipif(cuda_shim.compiler() is None, reason="there is no C++ compiler")


PACKAGES = [
    f"{name}/__init__.py"
    for name in ("trainops/adapters", "trainops/integrations", "trainops/verify", "triton_kernels")
]


class Tree:
    """A source tree with our ``setup.py``, sources of one line, and compilers that are scripts."""

    def __init__(self, root):
        self.root = root
        for name in FILES:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        for name in (*SOURCES, *PACKAGES):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("")
        (root / "trainops" / "__init__.py").write_text('__version__ = "1.0"\n')
        for compiler in (root / "fake" / "g++", root / "fake" / "bin" / "nvcc"):
            compiler.parent.mkdir(parents=True, exist_ok=True)
            compiler.write_text(COMPILER)
            compiler.chmod(0o755)

    def setup(self, *command, **variables):
        """Run ``setup.py``: its exit status, and all that it printed."""
        environment = {name: value for name, value in os.environ.items() if name not in ("MAX_JOBS", "LDFLAGS")}
        environment |= {"CXX": str(self.root / "fake" / "g++"), "CUDA_HOME": str(self.root / "fake")} | variables
        command = [sys.executable, "setup.py", *(command or ("build_ext", "--inplace"))]
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def record(self):
        return json.loads((self.root / "trainops" / "_build.json").read_text())

    def modules(self, folder="trainops"):
        return sorted(path.name.removesuffix(SUFFIX) for path in self.root.glob(f"{folder}/*{SUFFIX}"))


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def compiled(output):
    return sorted(re.findall(r"compile (\S+)", output))


def test_build_again_with_nothing_to_do_by_force_and_with_a_fault(tree):
    status, output = tree.setup()
    assert status == 0, output
    assert compiled(output) == sorted(SOURCES)
    assert tree.modules() == ["_core", "_cpu", "_cuda"]
    core, cuda = {"built_with": "fake, release 1.0, V1.0"}, {"built_with": f"nvcc 1.0 for {ARCHITECTURES}"}
    assert tree.record() == {"core": core, "cpu": core, "cuda": cuda}

    status, output = tree.setup()
    assert status == 0, output
    assert compiled(output) == []
    assert tree.modules() == ["_core", "_cpu", "_cuda"]

    status, output = tree.setup("build_ext", "--inplace", "--force")
    assert status == 0, output
    assert compiled(output) == sorted(SOURCES)

    # One module fails: its binary is gone, its compiler's words are shown, and the others are there.
    (tree.root / "csrc/cpu/ema.cpp").write_text("fault")
    status, output = tree.setup()
    assert status == 0, output
    assert compiled(output) == ["csrc/cpu/ema.cpp"]
    assert "csrc/cpu/ema.cpp: a fault" in output
    left = ["_core", "_cuda"]
    assert tree.modules() == tree.modules("build/lib*/trainops") == left  # a wheel takes what is in build/lib
    reason = "fake, release 1.0, V1.0 failed; `pip install -v .` in the source tree shows its output"
    assert tree.record() == {"core": core, "cpu": {"reason": reason}, "cuda": cuda}


@pytest.mark.parametrize(
    ("source", "compiler"),
    [("csrc/core/module.cpp", "fake, release 1.0, V1.0"), ("csrc/cuda/ema.cu", "nvcc 1.0")],
    ids=["core", "cuda"],
)
def test_a_module_fails_alone(tree, source, compiler):
    module = Path(source).parent.name
    (tree.root / source).write_text("fault")
    status, output = tree.setup()
    assert status == 0, output
    assert f"{source}: a fault" in output
    assert tree.modules() == [f"_{name}" for name in ("core", "cpu", "cuda") if name != module]
    assert tree.record()[module]["reason"].startswith(f"{compiler} failed")


def test_missing_compilers(tree):
    status, output = tree.setup(CXX="no-such-compiler", CUDA_HOME="no-such-folder")
    assert status == 0, output
    assert tree.modules() == []
    missing = "there was no working C++ compiler when trainops was built (no-such-compiler)"
    assert tree.record() == {
        "core": {"reason": missing},
        "cpu": {"reason": missing},
        "cuda": {"reason": "there was no nvcc when trainops was built"},
    }
    assert missing in output
    assert "without its cuda backend" not in output  # most machines have no nvcc: nothing to warn of


def test_skipped(tree):
    status, output = tree.setup(TRAINOPS_SKIP="cpu, cuda,core")
    assert status == 0, output
    assert compiled(output) == tree.modules() == []
    skipped = {"reason": "skipped by TRAINOPS_SKIP when trainops was built"}
    assert tree.record() == dict.fromkeys(("core", "cpu", "cuda"), skipped)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TRAINOPS_REQUIRE": "cuda", "TRAINOPS_SKIP": "cuda"}, r"both name \['cuda'\]"),
        ({"TRAINOPS_REQUIRE": "cpu", "TRAINOPS_SKIP": "core"}, "TRAINOPS_SKIP names core, which every backend"),
        ({"TRAINOPS_REQUIRE": "gpu"}, r"TRAINOPS_REQUIRE names \['gpu'\]; there are \['core', 'cpu', 'cuda'\]"),
        ({"TRAINOPS_SKIP": "gpu"}, r"TRAINOPS_SKIP names \['gpu'\]; there are \['core', 'cpu', 'cuda'\]"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS must be a number of processes, not 'many'"),
    ],
    ids=["skipped_and_required", "skipped_core", "unknown_required", "unknown_skipped", "jobs"],
)
def test_an_error_leaves_what_was_installed(tree, variables, message):
    (tree.root / "trainops" / f"_cuda{SUFFIX}").write_text("from before")
    (tree.root / "trainops" / "_build.json").write_text("{}")
    status, output = tree.setup(**variables)
    assert status == 1
    assert re.search(message, output.splitlines()[-1]), output
    assert tree.modules() == ["_cuda"]
    assert tree.record() == {}
    assert not (tree.root / "build").exists()


def test_a_required_backend_without_its_compiler(tree):
    (tree.root / "trainops" / f"_cuda{SUFFIX}").write_text("from before")
    status, output = tree.setup(TRAINOPS_REQUIRE="cuda", CUDA_HOME="no-such-folder", TRAINOPS_SKIP="cpu")
    assert status == 1
    assert "there was no nvcc" in output.splitlines()[-1], output
    assert tree.modules() == ["_cuda"]


@pytest.mark.parametrize(
    ("source", "variables", "message"),
    [
        ("fault", {}, "fake, release 1.0, V1.0 failed; "),
        ("", {"CXX": "no-such-compiler"}, r"there was no working C\+\+ compiler"),
    ],
    ids=["fails", "missing"],
)
def test_a_required_backend_that_is_not_built_leaves_what_was_installed(tree, source, variables, message):
    assert tree.setup()[0] == 0
    (tree.root / "trainops" / f"_cpu{SUFFIX}").write_text("from before")
    (tree.root / "csrc/cpu/ema.cpp").write_text(source)
    installed = {path: path.read_bytes() for path in tree.root.glob("trainops/*") if path.is_file()}
    status, output = tree.setup(TRAINOPS_REQUIRE="cpu", **variables)
    assert status == 1
    pattern = f"TRAINOPS_REQUIRE names cpu(, which needs core)?, which cannot be built: {message}"
    assert re.search(pattern, output.splitlines()[-1]), output
    assert {path: path.read_bytes() for path in tree.root.glob("trainops/*") if path.is_file()} == installed


def test_a_source_distribution_builds(tree):
    status, output = tree.setup("sdist")
    assert status == 0, output
    with tarfile.open(next((tree.root / "dist").iterdir())) as archive:
        archive.extractall(tree.root / "unpacked", filter="data")
    shutil.rmtree(tree.root / "csrc")
    unpacked = next((tree.root / "unpacked").iterdir())
    (tree.root / "fake").rename(unpacked / "fake")
    tree.root = unpacked
    status, output = tree.setup()
    assert status == 0, output
    assert tree.modules() == ["_core", "_cpu", "_cuda"]


FOUR_SOURCES = {
    "math/ema.h": "#pragma once\n",
    "math/adamw.h": '#pragma once\n#include "ema.h"\n',
    "ema.cpp": '#include "math/ema.h"\n',
    "adamw.cpp": '#include "math/adamw.h"\n',
    "adamw.cu": '#include "math/adamw.h"\n',
    "clip.cu": "",
}


class Real:
    """Four sources, some with headers, and the real C++ compiler for all of them."""

    def __init__(self, root, monkeypatch, capfd):
        self.capfd, self.monkeypatch = capfd, monkeypatch
        (root / "math").mkdir()
        for name, text in FOUR_SOURCES.items():
            (root / name).write_text(text)
        self.move(root)

    def move(self, root):
        self.root = root
        self.monkeypatch.setattr(ninja_build, "ROOT", root)

    def compiled(self, *flags, version="1.0"):
        """Build: the sources that were compiled."""
        command = [*cuda_shim.compiler(), "-fPIC", *flags, "-x", "c++"]
        linker = [*cuda_shim.compiler(), "-shared"]
        names = sorted(path.name for path in self.root.iterdir() if path.suffix in (".cpp", ".cu"))
        compilers = {".cpp": command, ".cu": command}
        ninja_build.build_module(Path("build/module.so"), names, compilers, linker, [], version)
        assert (self.root / "build" / "module.so").exists()
        return compiled(self.capfd.readouterr().err)


@pytest.fixture
def real(tmp_path, monkeypatch, capfd):
    (tmp_path / "tree").mkdir()
    return Real(tmp_path / "tree", monkeypatch, capfd)


EVERYTHING = ["adamw.cpp", "adamw.cu", "clip.cu", "ema.cpp"]


@needs_compiler
def test_what_is_compiled_again(real):
    assert real.compiled() == EVERYTHING
    assert real.compiled() == []
    (real.root / "math" / "adamw.h").touch()
    assert real.compiled() == ["adamw.cpp", "adamw.cu"]
    (real.root / "math" / "ema.h").touch()
    assert real.compiled() == ["adamw.cpp", "adamw.cu", "ema.cpp"]
    (real.root / "clip.cu").touch()
    assert real.compiled() == ["clip.cu"]
    assert real.compiled("-O1") == EVERYTHING
    assert real.compiled("-O1", version="2.0 ($x)") == EVERYTHING
    assert real.compiled("-O1", version="2.0 ($x)") == []


@needs_compiler
def test_a_flag_reaches_the_compiler_as_it_is(real):
    text = "a $b $$" + 200 * " "
    (real.root / "clip.cu").write_text(f"static_assert(sizeof(TEXT) == {len(text) + 1});\n")
    assert real.compiled("-std=c++17", f'-DTEXT="{text}"') == EVERYTHING


@needs_compiler
def test_a_copy_of_a_built_tree_is_up_to_date(real, tmp_path):
    assert real.compiled() == EVERYTHING
    assert {path.name for path in real.root.iterdir()} == {*EVERYTHING, "math", "build"}  # ninja's log is in build
    shutil.copytree(real.root, tmp_path / "copy")  # with times, as `cp -a`
    shutil.rmtree(real.root)
    real.move(tmp_path / "copy")
    assert real.compiled() == []
    (real.root / "math" / "adamw.h").touch()
    assert real.compiled() == ["adamw.cpp", "adamw.cu"]


def included(source):
    """The files that a source includes with quotes, and those that they include."""
    found = {source}
    for name in re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE):
        found |= included((source.parent / name).resolve())
    return found


def ninja(folder, *arguments):
    command = [Path(ninja_build.ninja.BIN_DIR, "ninja"), "-f", folder / "build.ninja", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


MODULES = {
    "cuda_shim": ("csrc/cuda/*.cpp", "csrc/cuda/*.cu", "tests/cuda_shim/*.cpp"),
    "_core": ("csrc/core/*.cpp",),
    "_cpu": ("csrc/cpu/*.cpp",),
    "_cuda": ("csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
}


@pytest.mark.parametrize("module", MODULES)
def test_the_sources_headers_are_known(module):
    """What ninja was told by g++ and by nvcc is what the sources say."""
    if module == "cuda_shim":
        if SHIM is None:
            pytest.skip("the CUDA kernels are not compiled for the CPU")
        folder = SHIM.path.parent
    else:
        built = json.loads((ROOT / "trainops" / "_build.json").read_text())[module.removeprefix("_")]
        if "reason" in built:
            pytest.skip(built["reason"])
        folder = ROOT / "build" / "ninja" / Path(f"{module}{SUFFIX}").stem
    assert folder.exists(), "it was not built here: run `make build`"
    assert "no work to do" in ninja(folder, "-n"), "its sources have changed: run `make build`"
    blocks = [block.splitlines() for block in ninja(folder, "-t", "deps").strip().split("\n\n")]
    assert {ROOT / block[1].strip() for block in blocks} == {x for files in MODULES[module] for x in ROOT.glob(files)}
    for _, source, *dependencies in blocks:
        paths = {(ROOT / path.strip()).resolve() for path in (source, *dependencies)}
        ours = {path for path in paths if path.is_relative_to(ROOT / "csrc")}
        expected = {path for path in included(ROOT / source.strip()) if path.is_relative_to(ROOT / "csrc")}
        assert ours == expected, source


@pytest.mark.parametrize(("variable", "jobs"), [("3", "3"), ("0", str(os.cpu_count())), (None, str(os.cpu_count()))])
def test_max_jobs_reaches_ninja(real, tmp_path, monkeypatch, variable, jobs):
    program = tmp_path / "ninja"
    program.write_text(f'#!/bin/sh\necho "$@" > {shlex.quote(str(tmp_path / "arguments"))}\n')
    program.chmod(0o755)
    monkeypatch.setattr(ninja_build.ninja, "BIN_DIR", str(tmp_path))
    monkeypatch.delenv("MAX_JOBS", raising=False)
    if variable is not None:
        monkeypatch.setenv("MAX_JOBS", variable)
    ninja_build.build_module(Path("build/module.so"), [], {}, [], [], "")
    assert f"-j {jobs} " in (tmp_path / "arguments").read_text()
