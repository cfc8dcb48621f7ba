"""Tensors in the middle of memory whose rest is watched."""

import torch
from contract import same_bits

MARGIN = 16  # elements in front, where they keep what is aligned as it is, and behind


class Surrounded:
    """A copy of a dense tensor, with another number in all the memory around it.

    With gaps, its elements are ``step`` apart and the number is between them, too.
    """

    def __init__(self, x, offset=MARGIN, outside=-3.0, step=1):
        memory = torch.full((offset + step * x.numel() + MARGIN,), outside, dtype=x.dtype, device=x.device)
        place = x.shape, [step * stride for stride in x.stride()], offset
        self._memory, self._around = memory, torch.ones_like(memory, dtype=torch.bool)
        self._around.as_strided(*place).fill_(False)
        self._before = memory[self._around]
        self.tensor = memory.as_strided(*place)
        self.tensor.copy_(x)

    def is_whole(self):
        """Whether nothing was written around the tensor."""
        return same_bits(self._memory[self._around], self._before)
