"""AdamW whose step also unscales, clips, skips and averages, in two passes over memory."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .adam import Betas, WithMoments
from .ema import EMA
from .optimizer import Params
from .ranks import NormGroup
from .spike_guard import SpikeGuard
from .storage import StateDtype

_TorchAdamW = torch.optim.AdamW  # the name may stand for another class later: `integrations.patch()`


class AdamW(WithMoments, _TorchAdamW):
    """:class:`torch.optim.AdamW` with the rest of the training step fused into it.

    Equivalent to::

        norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm)    # with max_grad_norm
        if norm.isfinite():                                             # with skip_nonfinite
            optimizer.step()                                            # of torch.optim.AdamW
            ema.update()                                                # with ema

    in one pass over the gradients for their norm and one over everything for the rest, without waiting for the
    device. ``isinstance(opt, torch.optim.AdamW)`` holds, and a ``state_dict`` of one loads into the other.

    PyTorch has no functional version of this class: ``as_functional_optim`` and
    ``ZeroRedundancyOptimizer(overlap_with_ddp=True)`` raise, unless
    ``torch.distributed.optim.utils.register_functional_optim`` has given it that of PyTorch's.

    Args:
        params: parameters, named parameters or parameter groups, as in torch.
        lr: learning rate, a float or a one-element tensor. On a GPU, no step waits for it.
        betas: decay of the two moments, each in [0, 1); as ``lr``.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, times the learning rate per step.
        amsgrad: use the largest second moment so far (arXiv:1904.09237).
        maximize: ascend.
        foreach: accepted for compatibility.
        capturable: accepted for compatibility; step counts are float32 on their parameter's device anyway. A
            ``torch.optim.AdamW`` that loads them from a GPU reads each back to the host, unless ``capturable`` or
            ``fused`` is set in the loaded groups. Before a CUDA graph's capture, warm up as with torch:
            :meth:`prepare_capture`.
        differentiable: run PyTorch's own step, with autograd.
        fused: with a GradScaler, unscale and skip inside ``step()``, and leave unscaled gradients behind, as the
            fused step of PyTorch does. Otherwise accepted for compatibility.
        max_grad_norm: clip the gradients of all groups together to this norm, a number or a one-element tensor (on a
            GPU, as ``lr``, and not checked). They are read, not rewritten: the
            coefficient is applied inside the update; 0 takes them as zero. With a GradScaler, ``step()`` unscales in
            the same pass, and the gradients stay scaled. The norm is that of the gradients this optimizer holds, all
            shards of DTensors included, and the same on all ranks; see ``norm_group``. Where
            ``trainops.clip_grad_norm_`` clips them before, a warning says so once.
        skip_nonfinite: leave everything bit for bit as it was when the norm of the gradients is infinite or NaN. A
            GradScaler's scale is dealt with as by ``max_grad_norm``. PyTorch's schedulers do not see that a step was
            skipped: compare ``skipped_steps``. On a CPU, a warning says so once.
        spike_guard: leave out steps whose gradients' norm is a spike, as by ``skip_nonfinite``: a
            :class:`trainops.SpikeGuard`, or the number of deviations from the running mean of log-norms at which one
            begins (6.0 is a good start). It is judged on the device, by the norm of unscaled gradients before
            clipping, and the same on all ranks; CUDA graphs may capture it. What it has learned is saved in
            ``param_groups[0]["trainops"]``. An attribute; may be changed between steps.
        norm_group: the process group over which the norm is taken, or its name (``"world"``: the default one), where
            each of its ranks has other parameters: FSDP1, ZeroRedundancyOptimizer (give it a name: it copies its
            arguments), stages of a pipeline. Plain parameters are then each rank's own, and DTensors are, too, whose
            mesh has a single rank in the group. Without one, plain parameters beside DTensors are copies on the ranks
            of the mesh, and plain parameters alone, as under DDP, have the rank's norm. All ranks of the group and of
            the meshes must take the step. An attribute; may be changed between steps.
        ema: an average to update in the same pass, instead of calling ``ema.update()`` after each step, which is then
            an error. Or a list of averages, such as ``[EMA(m, 0.999), EMA(m, 0.9999, dtype=torch.float32)]``, of the
            model or of parts of it: four move in the one pass, further ones after it. With compiled kernels, so do
            buffers. One optimizer has an average: the last that it was given to, so give it to the one that steps
            last. A skipped step leaves the averages alone and counts as an update in their warm-up. Every call of
            ``step()`` is an update, also those of tools that call it to make the state
            (``torch.distributed.checkpoint``): load the averages after the optimizer. Each has a state of its own.
        master: keep 16-bit parameters in full: the parameter is the rounded weight, and steps update the weight, bit
            for bit as that of a float32 parameter. ``"split"`` is for bfloat16 and keeps the 16 bits that rounding
            takes, as int16: 2 bytes per parameter. ``"float32"`` keeps the weight, for bfloat16 and float16: 4 bytes.
            Both are ``state["master"]``, and round bfloat16 to nearest, ties away from zero. float32 and float64
            parameters have none. ``ema`` follows the weight in full. A parameter that others write between steps
            (``model.load_state_dict``) wins: with ``"float32"`` it is the weight from then on; with ``"split"`` its
            old remainder stays, which moves the weight by at most half of the parameter's last place. See
            :meth:`load_float32_state_dict`, which loads weights in full.
        state_dtype: dtype of the moments, ``torch.float32``, ``torch.bfloat16`` or ``"int8"``, or a pair: of
            ``exp_avg``, and of ``exp_avg_sq`` with ``max_exp_avg_sq``. Default: their parameter's, as in torch.
            ``load_state_dict`` converts the moments of a checkpoint to it. ``"int8"`` takes 33/32 bytes for each
            moment: a floating-point number of 8 bits for each element, and a scale for each 32 elements that follow
            each other in memory. A stored moment is off by less than an eighth of itself; where it is smaller than
            2**-14 (``exp_avg``) or 2**-30 (``exp_avg_sq``) of the largest of its block, by less than that share of
            the largest. It is rounded stochastically, by ``seed``, so that its mean is right. ``state`` has codes
            under keys of their own, ``exp_avg_codes``; a ``state_dict`` has bfloat16 moments, which hold the values
            exactly: training resumes bit for bit. Blocks of a DTensor's shard begin with the shard. Change a model's
            memory format before the first step. float64 parameters have no 8-bit state.
        stochastic_rounding: round bfloat16 parameters without a master up or down at random, so that small updates
            count in the mean, where rounding to nearest loses them. It costs no memory; ``master`` loses nothing.
            float32 and float64 parameters are rounded to nearest.
        seed: of the random bits, also of 8-bit state, from 0 to 2**63 - 1; default: 0. They depend on it, on a
            parameter's own step count and its place in ``param_groups``, on an element's index in the whole
            parameter, and on nothing else: they are the same on every backend, on resuming, for replicas of DDP and
            for shards (DTensors, by their first dimension). It is saved in ``param_groups[0]["trainops"]``, and a
            loaded one holds.
        stats: collect statistics of the gradients (before clipping, unscaled), the weights and the updates of a
            step: ``"norms"`` has norms, extremes, means and counts (:class:`trainops.TensorStats`), ``"full"`` also
            histograms, and the share of updates that rounding loses, which takes several steps' time. Steps that
            collect keep a copy of the weights meanwhile (of 16-bit weights, in float32). An attribute, ``collects``.
        stats_every: collect at every so many calls of ``step()``, which checkpoints count on. Between these, it costs
            nothing. A CUDA graph collects at each replay, or never, as it was at its capture.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Attributes:
        stats: the last statistics, a :class:`trainops.StepStats` on the device; None before the first.
        grad_norm: norm of all gradients before clipping, divided by a GradScaler's scale; 0-dim, on the device of
            the first parameter. None until a step measures it (``max_grad_norm``, ``skip_nonfinite`` or
            ``spike_guard``); 0.0 where no parameter has a gradient.
        grad_norms: the same for each parameter that had a gradient, 1-D, in group order.
        skipped_steps: how many steps ``step()`` has skipped; 0-dim int64, on the device of the first parameter. (With
            PyTorch's arguments alone, a GradScaler leaves out the call.)

    Raises:
        TypeError: ``max_grad_norm``, ``norm_group``, ``ema``, ``stochastic_rounding`` or ``seed`` is of another type.
        ValueError: an argument is out of range, there is no such backend, ``master`` or ``state_dtype``, a parameter
            is complex beside a ``state_dtype``, no parameter can have a ``master`` or be rounded stochastically, one
            is float16 beside a split master or stochastic rounding, both are asked for, or ``ema`` follows another
            model.
        RuntimeError: the backend is not available; in ``step()``, a gradient is sparse. Nothing has been changed.

    Source: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101.
    """

    rule = "adamw"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | Tensor | None = None,
        skip_nonfinite: bool = False,
        spike_guard: SpikeGuard | float | None = None,
        norm_group: NormGroup = None,
        ema: EMA | Sequence[EMA] | None = None,
        master: Literal["split", "float32"] | None = None,
        state_dtype: StateDtype = None,
        stochastic_rounding: bool = False,
        seed: int | None = None,
        stats: Literal["norms", "full"] | None = None,
        stats_every: int = 1,
        backend: str | None = None,
    ) -> None:
        torchs: dict[str, Any] = {
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        if not isinstance(self, AdamW):
            # Under `integrations.patch()`, a subclass of PyTorch's calls `torch.optim.AdamW.__init__(self, ...)`.
            _TorchAdamW.__init__(self, params, lr, betas, eps, weight_decay, amsgrad, **torchs)
            return
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            **torchs,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            spike_guard=spike_guard,
            norm_group=norm_group,
            ema=ema,
            master=master,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            stats=stats,
            stats_every=stats_every,
            backend=backend,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in torch.

        Raises:
            ValueError: the group asks for ``decoupled_weight_decay=False``, which is :class:`trainops.Adam`, or has a
                setting that all groups share.
        """
        if isinstance(param_group, dict) and not param_group.get("decoupled_weight_decay", True):
            raise ValueError("decoupled_weight_decay=False is Adam: AdamW's decay is decoupled")
        super().add_param_group(param_group)
