"""The tail of a PyTorch training step, fused: clip-grad-norm, AdamW, Adam, SGD, EMA and DropPath."""

from .adam import Adam
from .adamw import AdamW
from .adapters import Backend, backends
from .clip_grad import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .drop_path import DropPath, DropPathAdd, drop_path, drop_path_add
from .ema import EMA
from .ema_schedule import DiffusersDecay, EMAPytorchDecay
from .ema_update import ema_update_, get_ema_multi_avg_fn
from .lr_finder import lr_finder
from .lr_finder_result import LRFinderResult
from .monitor import Monitor
from .sgd import SGD
from .spike_guard import SpikeGuard
from .statistics import TensorStats, tensor_stats
from .step_stats import StepStats
from .stochastic_depth import StochasticDepth, stochastic_depth

__all__ = [
    "EMA",
    "SGD",
    "Adam",
    "AdamW",
    "Backend",
    "DiffusersDecay",
    "DropPath",
    "DropPathAdd",
    "EMAPytorchDecay",
    "LRFinderResult",
    "Monitor",
    "SpikeGuard",
    "StepStats",
    "StochasticDepth",
    "TensorStats",
    "backends",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "drop_path",
    "drop_path_add",
    "ema_update_",
    "get_ema_multi_avg_fn",
    "get_total_norm",
    "lr_finder",
    "stochastic_depth",
    "tensor_stats",
]

__version__ = "0.2.0"
