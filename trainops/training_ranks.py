"""The ranks that train a model together, and what they agree on."""

from typing import Any

import torch
from torch import Tensor, nn

from .ema_shards import fsdp1_modules


class TrainingRanks:
    """The ranks over which DDP, FSDP or the meshes of DTensors train a model; none where it is trained alone."""

    def __init__(self, model: nn.Module) -> None:
        groups: dict[int, Any] = {}
        replicas = [x for x in model.modules() if isinstance(x, nn.parallel.DistributedDataParallel)]
        for module in (*replicas, *fsdp1_modules(model)):
            for group in (module.process_group, getattr(module, "_inter_node_pg", None)):  # of hybrid shards
                if group is not None:
                    groups.setdefault(id(group), group)
        for param in model.parameters():
            if (mesh := getattr(param, "device_mesh", None)) is not None:
                for dim in range(mesh.ndim):
                    group = mesh.get_group(dim)
                    groups.setdefault(id(group), group)
        self.groups = list(groups.values())
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if self.groups and torch.distributed.get_backend(self.groups[0]) == "nccl":  # parameters may be offloaded
            self._device = torch.device("cuda", torch.cuda.current_device())

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a number over the ranks, all of which must call this."""
        for group in self.groups:
            x = x.clone()
            torch.distributed.all_reduce(x, group=group)
            x = x / torch.distributed.get_world_size(group)
        return x

    def all_have(self, has: bool) -> bool:
        """Whether ``has`` is true on all ranks. All of them must call this."""
        if not self.groups:
            return has
        lacking = torch.tensor(0.0 if has else 1.0, device=self._device)
        for group in self.groups:
            torch.distributed.all_reduce(lacking, op=torch.distributed.ReduceOp.MAX, group=group)
        return not lacking.item()
