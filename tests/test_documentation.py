"""The README and the documentation: their code runs, their links lead somewhere, and the README stays short."""

import ast
import re
import runpy
import sys
import types

import pytest
import torch
from documentation import LINK, PAGES, ROOT, Block, anchors, blocks, name_of, run, surroundings

import trainops
from benchmarks import figures

WITH_CODE = [page for page in PAGES if blocks(page)]
FRAMEWORKS = {"transformers", "accelerate", "lightning", "timm"}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Where pages save their checkpoints."""
    monkeypatch.chdir(tmp_path)


def setup_of_sharded():
    """One rank of its own, and a model that nobody has sharded."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return {"plain_model": surroundings()["model"]}


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")  # PyTorch's imports
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_runs(page, capsys):
    namespace = surroundings()
    sharded = name_of(page) == "docs/guide/sharded.md"
    if sharded:
        namespace |= setup_of_sharded()
    try:
        for block in blocks(page):
            if (block.needs == "gpu" and not torch.cuda.is_available()) or block.needs in FRAMEWORKS:
                compile(block.code, name_of(page), "exec")
            else:
                run(page, block, namespace)
    finally:
        if sharded:
            torch.distributed.destroy_process_group()


def test_a_block_is_found_with_what_it_needs_and_fails_at_its_line(tmp_path):
    text = (
        "# x\n\n<!-- gpu -->\n```python\na = 1\n```\n\n```bash\nnot python\n```\n\n```python\nraise KeyError\n```\n"
    )
    page = ROOT / "docs" / "index.md"
    other = tmp_path / "page.md"
    other.write_text(text)
    assert blocks(other) == [Block("gpu", 5, "a = 1\n"), Block("", 13, "raise KeyError\n")]
    with pytest.raises(KeyError) as raised:
        run(page, blocks(other)[1], {})
    assert raised.traceback[-1].lineno + 1 == 13


def test_every_package_that_code_needs_is_known():
    """Or its block would never run."""
    assert {block.needs for page in PAGES for block in blocks(page)} <= {"", "gpu", *FRAMEWORKS}


def test_every_python_block_of_a_page_is_found():
    for page in PAGES:
        assert len(blocks(page)) == len(re.findall(r"^```python", page.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        home = measured_or_written(page, path)
        assert home.exists(), target
        if anchor and "api" not in home.parts:  # anchors there are made of docstrings: `make docs` looks at them
            assert anchor in anchors(home), target


def measured_or_written(page, path):
    """The file that a link is about. `docs/tools/hooks.py` brings some from elsewhere into the site."""
    if not path:
        return page
    if page.is_relative_to(ROOT / "docs"):
        if path.startswith("measured/"):
            return ROOT / "benchmarks" / "results" / path.removeprefix("measured/")
        if path in ("contributing.md", "changelog.md"):
            return ROOT / path.replace("contributing", "CONTRIBUTING").replace("changelog", "CHANGELOG")
    return (page.parent / path).resolve()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation


def test_nothing_is_loaded_from_the_network():
    """Pages and pictures name no address but in links."""
    assert "font: false" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in [*PAGES, *(ROOT / "docs").rglob("*.css"), *(ROOT / "docs").rglob("*.svg")]:
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"(src=|url\(|@import|!\[[^]]*\]\()\s*[\"']?https?:", text), path


def test_reasons_why_a_backend_is_missing_are_quoted_as_they_are_given():
    """With what the program puts into them left out."""
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8").partition("## Why is a backend missing?")[2]
    folders = (("trainops", "*.py"), ("csrc/cuda", "*.c*"))
    sources = [path.read_text() for folder, names in folders for path in (ROOT / folder).rglob(names)]
    source = " ".join([*sources, (ROOT / "setup.py").read_text()]).replace("`", "")
    quoted = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(quoted) >= 10
    assert [text for text in quoted if text not in source] == []


DOCSTRING = """Move it, as :meth:`update` does.

Equivalent to::

    a = b   # c

        d

and so on.

===========  ======
one          two
===========  ======
``a``        b
             goes on
:func:`x.y`  z
===========  ======

Args:
    a: see :class:`Other`.
"""
MARKDOWN = """Move it, as [`update`][trainops.EMA.update] does.

Equivalent to:

```python
a = b   # c

    d
```

and so on.


| one | two |
| --- | --- |
| ``a`` | b goes on |
| `x.y` | z |


Args:
    a: see `Other`.
"""


def test_docstrings_become_markdown(monkeypatch):
    """The reference is made of them."""
    fake = types.SimpleNamespace(Extension=object, Module=object, Object=object, Alias=object)
    monkeypatch.setitem(sys.modules, "griffe", fake)
    markdown = runpy.run_path(str(ROOT / "docs" / "tools" / "rst.py"))["markdown"]
    assert markdown(DOCSTRING, lambda name: "trainops.EMA.update" if name == "update" else "") == MARKDOWN


def test_a_release_says_what_it_is():
    """The changelog has its version, bug reports ask for what `verify` says, and wheels are for the Pythons named."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.+?)\]", changelog, re.MULTILINE)[1] in ("Unreleased", trainops.__version__)
    template = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
    assert "python -m trainops verify" in template
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    minors = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', project)
    assert re.search(r'^build = "(.*)"$', project, re.MULTILINE)[1].split() == [f"cp3{minor}-*" for minor in minors]


# Figures: one source for all.


def test_pages_have_the_saved_figures():
    assert [page for page, _ in figures.stale()] == []


def test_other_figures_are_noticed_and_rewritten(monkeypatch, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("a\n\n<!-- figures: step_short -->\n| 9.99 |\n<!-- end of figures -->\n\nb\n")
    monkeypatch.setattr(figures, "pages", lambda: [page])
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    assert figures.main(["--check"]) == 1
    assert "9.99" in page.read_text()
    assert figures.main([]) == 0
    text = page.read_text()
    assert "9.99" not in text
    assert "| GPT-2 | 124.4 M | **1" in text
    assert (text[:2], text[-2:]) == ("a\n", "b\n")
    assert figures.main(["--check"]) == 0


def test_a_figure_says_what_cannot_be_claimed():
    """Level, and behind."""

    def case(low, median, high):
        own = {"status": "ok", "seconds": {"median": 1.0}}
        other = {**own, "relative": {"median": median, "low": low, "high": high}}
        again = {**own, "relative": {"median": 1.0, "low": 0.95, "high": 1.05}}
        return {"providers": {"trainops": own, "other": other, "trainops again": again}}

    assert figures.told(case(1.1, 1.2, 1.3)) == "**1.20**"
    assert figures.told(case(1.0, 1.2, 1.3), "other") == "1.20 (level)"
    assert figures.told(case(0.5, 0.6, 0.7)) == "0.60 (behind)"


# The page of the experiments, which `python examples/tricks/page.py --markdown docs/tricks.md` writes.


def test_the_page_of_the_experiments_is_that_of_their_texts():
    page = (ROOT / "docs" / "tricks.md").read_text(encoding="utf-8")
    folder = ROOT / "examples" / "tricks"
    names = {path.stem for path in folder.glob("*.py")} - {"experiment", "page"}
    assert {path.stem for path in (ROOT / "docs" / "tricks").iterdir()} == names
    for name in names:
        title, usage, *text = ast.get_docstring(ast.parse((folder / f"{name}.py").read_text())).split("\n\n")
        assert f"\n## {title.removesuffix('.')}\n" in page
        assert f"`{usage.strip()}`" in page
        for paragraph in text:
            assert paragraph in page, name
    assert "**does not hold**" not in page
