"""Work that a thread of its own does beside training."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

_executor: ThreadPoolExecutor | None = None
_unfinished: set[Future[None]] = set()  # also what nobody will wait for


class Later:
    """Work that is done in its turn, after what was given before it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._future = _worker().submit(work)
        _unfinished.add(self._future)
        self._future.add_done_callback(_unfinished.discard)

    def finish(self) -> None:
        """Wait until it is done. Raises what it raised."""
        self._future.result()


def _worker() -> ThreadPoolExecutor:
    global _executor
    if _executor is None:
        _executor = ThreadPoolExecutor(1, "trainops")
    return _executor


def _before_fork() -> None:
    """A child has no thread that would go on with it."""
    for future in list(_unfinished):
        future.exception()


def _after_fork_in_child() -> None:
    global _executor
    _executor = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
