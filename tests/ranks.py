"""Runs a function in several processes that form a gloo process group, as `torchrun` would start them."""

import os
import sys

import pytest
import torch.multiprocessing as mp

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)


def on_ranks(ranks, function, store, *args, start_method="spawn"):
    """Call ``function(rank, *args)`` on each rank. An error on one of them is raised here.

    ``store``: a path where there is no file yet, by which the ranks find each other. Among several tries in a test,
    each needs its own.
    """
    mp.start_processes(
        _on_rank, (ranks, function, str(store), args), nprocs=ranks, join=True, start_method=start_method
    )


def _on_rank(rank, ranks, function, store, args):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    function(rank, *args)
    distributed.barrier()
    distributed.destroy_process_group()
    # Without the interpreter's last steps: threads of gloo may still run then, which aborts a process that is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
