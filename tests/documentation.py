"""The README and the documentation as tests see them: code blocks, links, and what a page may lean on.

The blocks of a page share a namespace, which begins with `surroundings`. A comment directly above a block says what
it needs: ``<!-- needs: timm -->`` a package, ``<!-- gpu -->`` a GPU.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?:<!-- (gpu|needs: \w+) -->\n)?(`{3,})(\w*).*?\n(.*?)^\2$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """Code of a page: what it needs, where it begins, and its text after as many empty lines."""

    needs: str
    line: int
    code: str


def name_of(page: Path) -> str:
    """A page, as tests are named."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The Python blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        if fence[3] == "python":
            line = text.count("\n", 0, fence.start(4)) + 1
            needs = (fence[1] or "").removeprefix("needs: ")
            found.append(Block(needs, line, fence[4]))
    return found


def run(page: Path, block: Block, namespace: dict) -> None:
    """Run a block; errors show the line of the page."""
    exec(compile("\n" * (block.line - 1) + block.code, name_of(page), "exec"), namespace)


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = [re.sub(r"[`*]", "", title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def surroundings() -> dict:
    """What the pages take for granted: a small model, batches of data for it, a loss, an evaluation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    inputs, targets = torch.randn(32, 16), torch.randint(4, (32,))

    def loss_of(model):
        return nn.functional.cross_entropy(model(inputs), targets)

    def evaluate(model):
        with torch.no_grad():
            return float((model(inputs).argmax(1) == targets).float().mean())

    import trainops

    ema = trainops.EMA(model, 0.999)
    return {
        "__name__": "documentation",
        "torch": torch,
        "trainops": trainops,
        "model": model,
        "inputs": inputs,
        "targets": targets,
        "batches": list(zip(inputs.split(8), targets.split(8), strict=True)),
        "loss_fn": nn.functional.cross_entropy,
        "loss_of": loss_of,
        "evaluate": evaluate,
        "ema": ema,
        "optimizer": trainops.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0, ema=ema),
    }
