"""One module for each framework, which imports that framework: import it where you use it.

::

    from trainops.integrations import accelerate, hf, lightning, timm  # any of them

``unwrap`` and ``patch`` need no framework.
"""

from ..wrappers import unwrap
from ._patch import Patch, patch

__all__ = ["Patch", "patch", "unwrap"]
