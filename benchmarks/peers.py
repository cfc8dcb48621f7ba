"""Every other AdamW, each as its documentation recommends. All are given the same settings, none its own defaults."""

import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from .runner import NotHere
from .work import BETAS, EPS, LR, WEIGHT_DECAY, Work

Optimizer = torch.optim.Optimizer

COMPILED_TENSORS = 200  # more take the compiler minutes
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
    spec.loader.exec_module(module)
    return module


def on(work: Work, *devices: str) -> None:
    """NotHere unless the work is on one of these devices."""
    if work.device not in devices:
        raise NotHere(f"takes {' and '.join(devices)} tensors alone")


def torch_adamw(work: Work, **options: Any) -> Optimizer:
    """PyTorch's own."""
    return torch.optim.AdamW(work.params, **SETTINGS, **options)


def deepspeed_cpu(work: Work) -> Optimizer:
    """DeepSpeed's for parameters that are offloaded to the CPU."""
    on(work, "cpu")
    adam = peer("deepspeed.ops.adam")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()):
        return adam.DeepSpeedCPUAdam(work.params, **SETTINGS, adamw_mode=True)


def deepspeed_fused(work: Work) -> Optimizer:
    """DeepSpeed's for GPUs."""
    on(work, "cuda")
    return peer("deepspeed.ops.adam").FusedAdam(work.params, **SETTINGS, adam_w_mode=True)


def apex_fused(work: Work) -> Optimizer:
    """Apex's multi-tensor one."""
    on(work, "cuda")
    return peer("apex.optimizers").FusedAdam(work.params, **SETTINGS, adam_w_mode=True)


def optimi(work: Work) -> Optimizer:
    """optimi's, which chooses between Triton and foreach itself, and sums 16-bit parameters with compensation."""
    return peer("optimi").AdamW(work.params, **SETTINGS)


def bitsandbytes(work: Work) -> Optimizer:
    """The one of 32 bits: the others compute something else."""
    return peer("bitsandbytes.optim").AdamW32bit(work.params, **SETTINGS)


ADAMW: dict[str, Callable[[Work], Optimizer]] = {
    "torch loop": lambda work: torch_adamw(work, foreach=False),
    "torch foreach": lambda work: torch_adamw(work, foreach=True),
    "torch fused": lambda work: torch_adamw(work, fused=True),
    "DeepSpeed CPUAdam": deepspeed_cpu,
    "DeepSpeed FusedAdam": deepspeed_fused,
    "Apex FusedAdam": apex_fused,
    "optimi": optimi,
    "bitsandbytes": bitsandbytes,
}


def compilable(work: Any) -> Callable[..., Any]:
    """`torch.compile`; NotHere where it would take too long: on one core it takes a minute for 150 tensors."""
    if not work.compiles:
        raise NotHere("nothing is compiled in quick runs, in sweeps and with --no-compile")
    if work.dtype != torch.float32:
        raise NotHere("compiled for float32 alone, as that takes a minute each")
    if len(work.params) > COMPILED_TENSORS:
        raise NotHere(f"not compiled for more than {COMPILED_TENSORS} tensors: that takes minutes")
    torch.compiler.reset()
    return torch.compile


def compiled_adamw(work: Work) -> Optimizer:
    """For a step to be compiled: on a GPU with the step counts there, as PyTorch's recipe says."""
    return torch_adamw(work, foreach=True, capturable=work.device == "cuda")
