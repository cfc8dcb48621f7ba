"""Steps of AdamW on numbers that training may meet late, or with tiny, large or broken gradients."""

import pytest
import torch
from contract import assert_contract, exact
from controls import STEP_CONTROLS, must_fail, of_groups, truncated
from exact import adamw_step
from targets import INTERPRETER, REFERENCE, over_kernels, thorough
from training import STATES

import trainops

NAN, INF = float("nan"), float("inf")
FLOAT16 = torch.float16
NUMEL = 73  # a whole block of vectors, and a tail
OPTIONS = {"lr": 0.05, "betas": (0.9, 0.999), "weight_decay": 0.3}

STEPS = [0, 1, 10, 100_000]
SCALES = [1e-25, 1e-12, 1e-6, 1.0, 1e15]
# float16 holds neither the squares of other gradients nor what is made of them.
CASES = [(dtype, scale) for dtype in DTYPES for scale in SCALES if dtype != FLOAT16 or scale == 1.0]
