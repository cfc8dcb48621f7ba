"""What was found in machine code before, kept by the hash of everything that it depends on."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "build" / "inspect"


def key_of(*parts: Any) -> str:
    """A hash of values, and of what is in files."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else repr(part).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:32]


def recall(key: str) -> Any:
    """What was kept; None where there is nothing, or nothing that can be read."""
    try:
        return json.loads((FOLDER / f"{key}.json").read_text())
    except (OSError, ValueError):
        return None


def keep(key: str, found: Any) -> None:
    """Keep it, all or nothing: a run may be interrupted."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    unfinished = FOLDER / f"{key}.{os.getpid()}"
    unfinished.write_text(json.dumps(found))
    unfinished.replace(FOLDER / f"{key}.json")


def remembered(key: str, find: Callable[[], Any]) -> Any:
    """What was found before, or else is found now."""
    found = recall(key)
    if found is None:
        found = find()
        keep(key, found)
    return found
