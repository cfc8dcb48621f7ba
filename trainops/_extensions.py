"""Loads the compiled modules, and reads what ``setup.py`` recorded about them."""

import importlib
import json
import warnings
from pathlib import Path
from typing import Any


def _not_built() -> str:
    if (Path(__file__).parents[1] / "setup.py").exists():
        return (
            "not built in this source tree; run `pip install -e .` in it, or run Python in another folder, where an "
            "installed trainops is found"
        )
    return "not built; run `pip install .` in trainops' source tree"


def load(module: str, name: str) -> tuple[Any, str]:
    """The extension ``trainops.<module>`` and what it was built with, or None and why it is missing.

    One that was never built is silently absent; one that was built and does not load warns.
    """
    path = Path(__file__).parent / "_build.json"
    record = json.loads(path.read_text()).get(name, {}) if path.exists() else {}
    try:
        extension = importlib.import_module(f"trainops.{module}")
    except ImportError as error:
        if "built_with" not in record:
            return None, record.get("reason", _not_built())
        reason = f"it was built but does not load: {error}"
        warnings.warn(f"trainops runs without its {name} module: {reason}", RuntimeWarning, stacklevel=2)
        return None, reason
    return extension, record.get("built_with", "built by an unknown compiler")
