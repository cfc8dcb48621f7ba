"""Every other AdamW, each as its documentation recommends. All are given the same settings, none its own defaults."""

import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from .runner import NotHere
from .work import BETAS, EPS, LR, WEIGHT_DECAY, Work

Optimizer = torch.optim.Optimizer

SETTINGS: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}


def peer(module: str) -> Any:
    """Import another project, which may print and warn as it likes; NotHere if it cannot be."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise NotHere(f"{module.partition('.')[0]} is not installed")
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception as reason:
        raise NotHere(f"{module} cannot be imported: {reason}".splitlines()[0]) from reason


@cache
def timm_module(path: str) -> Any:
    """One of timm's files by itself: its package imports torchvision, which is not at hand for every torch."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        raise NotHere("timm is not installed")
    file = Path(spec.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(f"_timm_{file.stem}", file)
    if spec is None or spec.loader is None or not file.exists():
        raise NotHere(f"this timm has no {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as reason:
        raise NotHere(f"this timm's {path} cannot be imported by itself: {reason}".splitlines()[0]) from reason
    return module


def on(work: Work, *devices: str) -> None:
    """NotHere unless the work is on one of these devices."""
    if work.device not in devices:
        raise NotHere(f"takes {' and '.join(devices)} tensors alone")


def torch_adamw(work: Work, **options: Any) -> Optimizer:
    """PyTorch's own."""
    return torch.optim.AdamW(work.params, **SETTINGS, **options)


def deepspeed_cpu(work: Work, fp32_optimizer_states: bool = True) -> Optimizer:
    """DeepSpeed's for parameters that are offloaded to the CPU, by default with moments in float32."""
    on(work, "cpu")
    if not fp32_optimizer_states and work.dtype == torch.float32:
        raise NotHere("differs for 16-bit parameters alone")
    adam = peer("deepspeed.ops.adam")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()):
        return adam.DeepSpeedCPUAdam(
            work.params, **SETTINGS, adamw_mode=True, fp32_optimizer_states=fp32_optimizer_states
        )


def deepspeed_fused(work: Work) -> Optimizer:
    """DeepSpeed's for GPUs."""
    on(work, "cuda")
    return peer("deepspeed.ops.adam").FusedAdam(work.params, **SETTINGS, adam_w_mode=True)


def apex_fused(work: Work) -> Optimizer:
    """Apex's multi-tensor one."""
    on(work, "cuda")
    return peer("apex.optimizers").FusedAdam(work.params, **SETTINGS, adam_w_mode=True)


def optimi(work: Work) -> Optimizer:
    """optimi's, which chooses between Triton and a loop itself."""
    return peer("optimi").AdamW(work.params, **SETTINGS)


def bitsandbytes(work: Work) -> Optimizer:
    """The one of 32 bits: the others compute something else. On the CPU there is no kernel of it."""
    on(work, "cuda")
    return peer("bitsandbytes.optim").AdamW32bit(work.params, **SETTINGS)


ADAMW: dict[str, Callable[[Work], Optimizer]] = {
    "torch loop": lambda work: torch_adamw(work, foreach=False),
    "torch foreach": lambda work: torch_adamw(work, foreach=True),
    "torch fused": lambda work: torch_adamw(work, fused=True),
    "DeepSpeed CPUAdam": deepspeed_cpu,
    "DeepSpeed CPUAdam, bf16 moments": partial(deepspeed_cpu, fp32_optimizer_states=False),
    "DeepSpeed FusedAdam": deepspeed_fused,
    "Apex FusedAdam": apex_fused,
    "optimi": optimi,
    "bitsandbytes": bitsandbytes,
}


def compiled_adamw(work: Work) -> Optimizer:
    """For a step to be compiled: on a GPU with the step counts there, as PyTorch's recipe says."""
    return torch_adamw(work, foreach=True, capturable=work.device == "cuda")
