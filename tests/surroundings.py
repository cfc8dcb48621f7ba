"""Tensors in the middle of memory whose rest is watched."""

import torch
from contract import same_bits

MARGIN = 16  # elements in front, where they keep what is aligned as it is, and behind


class Surrounded:
    """A copy of a tensor, with another number in all the memory around it."""

    def __init__(self, x, offset=MARGIN, outside=-3.0):
        end = offset + x.numel()
        self.memory = torch.full((end + MARGIN,), outside, dtype=x.dtype, device=x.device)
        self.tensor = self.memory[offset:end].view(x.shape)
        self.tensor.copy_(x)
        self._around = [self.memory[:offset], self.memory[end:]]
        self._before = [part.clone() for part in self._around]

    def is_whole(self):
        """Whether nothing was written around the tensor."""
        return all(map(same_bits, self._around, self._before))
