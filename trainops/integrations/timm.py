"""timm: optimizers of trainops under names that timm's factory finds.

timm reads the part of a name before an underscore as a prefix, so these have none: ``trainopsadamw``. A training
script needs one more line, ``register()``. Then ``--opt trainopsadamw --opt-kwargs max_grad_norm=1.0`` clips inside
the step, in place of ``--clip-grad 1.0``.
"""

import dataclasses

import trainops

from ..optimizer import FusedOptimizer
from ._unwrap import framework

framework("timm")
from timm.optim._optim_factory import default_registry  # noqa: E402 (after the clear error)


def register() -> list[str]:
    """Register every optimizer of trainops with timm's factory, each with the settings of timm's own of that name.

    Equivalent to::

        default_registry.register(timm.optim.OptimInfo("trainopsadamw", trainops.AdamW, has_betas=True))

    Calling it again changes nothing.

    Returns:
        The names, for ``timm.optim.create_optimizer_v2(model, "trainopsadamw")`` and ``--opt``.
    """
    names = []
    for name in trainops.__all__:
        kind = getattr(trainops, name)
        if not (isinstance(kind, type) and issubclass(kind, FusedOptimizer)):
            continue
        names.append(f"trainops{name.lower()}")
        if names[-1] not in default_registry._optimizers:
            timms = default_registry.get_optimizer_info(name)
            description = f"trainops.{name}: {name} with clipping and an average inside the step"
            default_registry.register(
                dataclasses.replace(timms, name=names[-1], opt_class=kind, description=description)
            )
    return names
