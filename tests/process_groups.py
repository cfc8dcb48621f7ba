"""Process groups of several ranks on this machine."""

import importlib
import os
import sys

import pytest
import torch
import torch.multiprocessing as mp

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)


forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def on_ranks(ranks, tmp_path, function, *args):
    """Call ``function(rank, *args)`` on each rank of a gloo group. An error on one of them is raised here."""
    # Forked processes import nothing again. PyTorch's autograd cannot be forked where there are CUDA devices.
    for module in ("tensor", "fsdp", "device_mesh", "checkpoint.state_dict"):
        importlib.import_module(f"torch.distributed.{module}")
    method = "fork" if "fork" in mp.get_all_start_methods() and not torch.cuda.is_available() else "spawn"
    store = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
    mp.start_processes(_on_rank, (ranks, store, function, args), nprocs=ranks, start_method=method)


def _on_rank(rank, ranks, store, function, args):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    function(rank, *args)
    distributed.barrier()
    distributed.destroy_process_group()
    # Without the interpreter's last steps: threads of gloo may still run then, which aborts a process that is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def assert_same_on_all_ranks(x):
    """Bit for bit."""
    found = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, x.detach().cpu().reshape(-1).view(torch.uint8).tolist())
    assert all(y == found[0] for y in found), found
