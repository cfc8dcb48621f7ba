"""Pages and pictures whose home is elsewhere in the repository, such as the benchmarks' report."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
MEASURED = ROOT / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Add them under the names by which the pages link them."""
    for path in sorted([*MEASURED.glob("*/*.png"), *MEASURED.glob("*/report.md")]):
        name = path.relative_to(MEASURED).as_posix()
        files.append(File.generated(config, f"measured/{name}", abs_src_path=str(path)))
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        files.append(File.generated(config, name.lower(), abs_src_path=str(ROOT / name)))
    return files


def on_post_page(output: str, page: Any, config: Any) -> str:
    """A page that loads something from the network is an error."""
    loaded = re.findall(r'<(?!a )\w+[^>]* (?:src|href)="((?:https?:)?//[^"]*)"', output)
    if foreign := [address for address in loaded if page.canonical_url != address]:
        raise PluginError(f"{page.file.src_uri} loads {', '.join(foreign)} from the network")
    return output
