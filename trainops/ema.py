"""Exponential moving average of a model's weights."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, which imports no compiler until it is called

from . import advice, ema_advice
from .adapters import check
from .ema_follow import FollowsModel
from .ema_policy import AveragePolicy, Patterns
from .ema_schedule import Decay
from .ema_update import check_step, check_type, update_pairs
from .model_match import given_module
from .model_pairs import Matched
from .model_slots import averaged_module
from .parameter_list import as_model
from .reference_rounding import seed_word
from .seeds import check_bfloat16, checked_seed
from .storage import kind


class Update(NamedTuple):
    """An update of an average that is about to happen."""

    matched: Matched
    decay: float | None  # None: the average does not move
    step: int  # its number, counted from 1
    seed: int | None = None  # what random bits depend on: a word, if averages are rounded stochastically


class EMA(FollowsModel):
    """A copy of ``model`` whose weights follow those of ``model`` slowly.

    Equivalent to::

        ema = timm.utils.ModelEmaV3(model, decay)           # ema.update(model, step) after every step
        ema = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
        )                                                   # ema.update_parameters(model)
        ema = diffusers.training_utils.EMAModel(parameters) # ema.step(parameters), with DiffusersDecay()

    Call :meth:`update` after every optimizer step, or give the object to ``trainops.AdamW(..., ema=ema)`` (or the
    optimizer to :meth:`attach`) and the step updates the average in the same pass over memory. One optimizer has an
    average at a time: giving it to a second one takes it from the first. An average that is swapped in, copied or
    saved after its model was trained without it gives a warning, once.

    How an average starts. The decay is that of timm's ``ModelEmaV3`` with a ``step``: the first update copies (see
    :meth:`decay_at`). Without a ``step``, timm's class has the full decay from its first update on.

    =============================================  =================================================================
    before the first update                        then
    =============================================  =================================================================
    nothing                                        it *copies*: the first update takes the model's weights
    weights are loaded into the model              it *copies*; until then :meth:`swap`, :meth:`copy_to`, a call and
                                                   :meth:`state_dict` have the loaded weights, too
    ``module`` or a state without count is loaded  it *continues* from these weights with ``decay``; with a decay
                                                   that depends on the step, ``ema.step`` has to be set
    a state with its count is loaded               it *resumes*: the numbers of an average that was never saved
    ``ema.step = n``                               the next update has the decay of update ``n + 1``
    model and optimizer are set back to the start  it *copies*: steps of a learning rate finder are forgotten, if the
                                                   average has moved with that optimizer alone
    :meth:`reset`                                  it *copies*
    =============================================  =================================================================

    Args:
        model: the model to follow, or parameters. It is kept and read at every update.
        decay: how much of the average stays at each update, in [0, 1]; default: 0.9999. Or a function of the update's
            number, counted from 1, that returns it, or None to leave the average as it is, such as
            :class:`trainops.DiffusersDecay` and :class:`trainops.EMAPytorchDecay`.
        halflife_steps: in place of ``decay``: after how many steps the influence of a weight has halved.
        warmup: let the decay grow as ``1 - (1 + n / warmup_gamma) ** -warmup_power`` up to ``decay``.
        warmup_gamma: time scale of the warm-up, in updates.
        warmup_power: exponent of the warm-up.
        min_decay: lower limit of the decay during warm-up, in [0, 1].
        update_after_step: the average is a plain copy up to and including update ``update_after_step + 1``.
        update_every: move the average only at every ``update_every``-th update. The others are counted, too.
        dtype: dtype of the average's floating-point weights; default: the model's. Use ``torch.float32`` for a
            16-bit model: there, ``(1 - decay) * (weight - average)`` is mostly below the last place and is lost.
            Given to an optimizer with a ``master``, it follows the weights in full; :meth:`update` alone sees the 16
            bits that the model has.
            ``module`` then takes inputs of that dtype, while :meth:`swap` keeps the model's.
        device: where the average lives; default: where the model does. An average of a GPU's model on the CPU is
            copied through pinned memory on a stream of its own, and moved by another thread: no step waits for it,
            nor for the one before, unless that is still moving. The GPU needs memory for one more copy of the
            averaged tensors meanwhile; ``update_every`` makes such copies rarer. Read ``module`` anew after an
            update: that waits (see :meth:`synchronize`). A CUDA graph cannot hold such updates.
        average_buffers: ``True`` or ``"average"``: floating-point buffers are averaged; ``False`` or ``"copy"``: they
            are copied; ``"leave"``: they stay what they were. Or a dictionary from names or patterns of buffers to
            these words, of which the first that fits decides, such as ``{"initialized": "copy"}`` for a flag of 0
            or 1; other buffers are averaged. Buffers of integers, float8, sparse or quantised ones are copied. A
            copied buffer may change its shape, and any buffer may come and go.
        trainable_only: leave out parameters that are frozen (``requires_grad`` is False), as those beside adapters
            are. One that is unfrozen later is averaged from then on, beginning with the value that it has at that
            update; one that is frozen later stays averaged.
        include: names or patterns of the parameters that are averaged; default: all. A pattern is a name, the name of
            a module, a shell pattern (``"*.lora_?.*"``) or a compiled regular expression, which is searched for.
            Names are those of ``model.named_parameters()``.
        exclude: names or patterns of parameters that are left out. What is left out is shared: ``module`` holds the
            model's own tensors, in their dtype, on their device and with their ``requires_grad``. They take no
            memory, no update reads them, and :meth:`state_dict` does not have them. Frozen parameters of which there
            is no average, such as quantised weights, are always shared.
        module: a module of the user's own for the average, of the model's structure, and sharded as the model is. It
            gets the model's weights. Default: a copy of the model, but of FSDP2's modules, which cannot be copied,
            the tensors alone: such a ``module`` has no forward pass, and :meth:`swap` evaluates it.
        stochastic_rounding: round averages in bfloat16 up or down at random, so that small moves count in the mean.
            For where memory is dear: an average in float32 is exact. A CUDA graph cannot hold such updates.
        seed: of the random bits, from 0 to 2**63 - 1; default: 0. They depend on it, on ``step``, on the place of a
            tensor in the model and of an element in the tensor, and on nothing else: they are the same on every
            backend, on resuming, and for shards (of the first dimension) of a weight. :meth:`state_dict` has it.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Attributes:
        module: the averaged model, in eval mode, without gradients. ``ema(x)`` calls it; all else that a module has,
            it has alone: ``ema.module.to(...)``. Of a list of parameters, a ``torch.nn.ParameterList``. Of DTensors
            it has this rank's shards, whether the model was sharded before or after (:mod:`trainops.ema_shards`).
        step: number of updates so far: calls of :meth:`update`, and steps of the optimizer that has the average.
            Skipped steps count, and so do updates that ``update_every`` leaves out.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range, a pattern fits no name, a parameter has no shape yet, or ``module``
            does not match.

    Source: Tarvainen and Valpola, https://arxiv.org/abs/1703.01780; the warm-up is that of timm/utils/model_ema.py.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Tensor],
        decay: Decay | None = None,
        *,
        halflife_steps: float | None = None,
        warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        update_every: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        average_buffers: bool | str | Mapping[Any, str] = True,
        trainable_only: bool = False,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        module: nn.Module | None = None,
        stochastic_rounding: bool = False,
        seed: int | None = None,
        backend: str | None = None,
    ) -> None:
        seed = checked_seed(seed, stochastic_rounding)
        model = as_model(model)
        super().__init__(
            decay,
            halflife_steps=halflife_steps,
            warmup=warmup,
            warmup_gamma=warmup_gamma,
            warmup_power=warmup_power,
            min_decay=min_decay,
            update_after_step=update_after_step,
            update_every=update_every,
        )
        check_type("dtype", dtype, (torch.dtype, type(None)), "a torch.dtype")
        if dtype is not None and kind(torch.empty(0, dtype=dtype)) != "real":
            raise ValueError(f"dtype must be a floating-point type of 16 bits or more, got {dtype}")
        check(backend)
        self.model = model
        self.policy = AveragePolicy(
            model,
            dtype=dtype,
            device=device,
            average_buffers=average_buffers,
            trainable_only=trainable_only,
            include=include,
            exclude=exclude,
        )
        if module is None:
            self._module = averaged_module(model, self.policy)
        else:
            self._module = given_module(module, model, self.policy)
        averages = self.policy.averaged_parameters(self._module)
        if seed is not None:
            check_bfloat16("averages", averages)
        self.seed = seed
        self.backend = backend
        self.step = 0
        self._remember_weights()
        if module is not None:
            self._be_the_model()
        advice.average_made(self)
        if seed is None:
            ema_advice.average_stalls(self, averages)

    @_disable_dynamo  # compiled code calls it, by one graph break, and holds none of its numbers
    @torch.no_grad()
    def update(self, model: nn.Module | Iterable[Tensor] | None = None, step: int | None = None) -> None:
        """Move the average towards its model.

        Args:
            model: the model that the average follows, or a wrapper of it, as timm's and torch's classes want it; or
                the parameters, as diffusers' does. An average of a list goes on with the parameters that it is given.
            step: the number of this update, counted from 1, for whom counts them, as timm's ``train.py`` does. The
                average's own count goes on from it.

        Raises:
            TypeError: an argument is of another type.
            ValueError: this is another model, or the model's weights no longer match the average's. Nothing has been
                changed.
            RuntimeError: called inside :meth:`swap`, or an optimizer has the average: its steps update it.
        """
        if model is not None and model is not self.model:
            self._check_followed(model)
        if step is not None:
            check_step(step)
        update = self.plan_update(step=step)
        try:
            self.finish_update(update)
        except RuntimeError:
            self.check_model()
            raise
        ema_advice.updated_by_hand(self)

    def update_parameters(self, model: nn.Module | Iterable[Tensor]) -> None:
        """Move the average: :meth:`update`, under the name that torch's ``AveragedModel`` has for it."""
        self.update(model)

    def plan_update(self, optimizer: torch.optim.Optimizer | None = None, step: int | None = None) -> "Update":
        """Plan the next update, within the step of an ``optimizer`` or alone. Changes nothing.

        Raises:
            ValueError: the model's weights no longer match the average's.
            RuntimeError: called inside :meth:`swap`, or another optimizer has the average, or it would copy over
                weights that were loaded.
        """
        self._check_not_swapped("update()" if optimizer is None else "optimizer.step()")
        self._check_holder(optimizer)
        self._look_back()
        if optimizer is not None:
            self._remember_beginning()
        matched, step = self._match(), self.step + 1 if step is None else step
        decay = self.decay_at(step) if step % self.update_every == 0 else None
        if decay == 0.0 and (self._continues or not self._has_moved):
            decay = self._decay_of_start(step, decay)
        if decay is not None:
            self._check_can_move(matched)
        return Update(matched, decay, step, None if self.seed is None else seed_word(self.seed, step))

    def finish_update(self, update: "Update", done: Collection[int] = (), skip: Tensor | None = None) -> None:
        """Count the update; move what is not ``done`` (by ``id`` of the model's tensor), unless ``skip`` is true."""
        matched, decay = update.matched, update.decay
        if decay is not None:
            self.synchronize()
            self._settle(matched, skip)
            if len(done) < len(matched.pairs):
                rest = matched.without(done) if done else matched
                self._pending = update_pairs(
                    rest, self._weights(rest.sources), decay, skip, self.backend, update.seed
                )
            self._has_moved, self._seen = True, None
        self.step = update.step
        self._remember_step(matched.sources)

    def reset(self) -> None:
        """Begin anew: the average is the model as it is now, and there were no updates, as after timm's ``set``.

        Raises:
            ValueError: the model's weights no longer match the average's. Nothing has been changed.
            RuntimeError: called inside :meth:`swap`.
        """
        self._check_not_swapped("reset()")
        self.check_model()
        self._now_has(0)
        self._be_the_model()
        advice.average_made(self)

    @property
    def shadow_params(self) -> list[Tensor]:
        """The averaged parameters, under the name that diffusers' ``EMAModel`` has for them."""
        return list(self.module.parameters())

    def __repr__(self) -> str:
        names = ("decay", "warmup", "update_after_step", "update_every", "step")
        settings = "".join(f", {name}={getattr(self, name)}" for name in names)
        return f"{type(self).__name__}({type(self.model).__name__}{settings})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged model."""
        self._be_the_model()
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Whatever a module would have, under its name.
        if not name.startswith("_") and hasattr(self.__dict__.get("_module"), name):
            raise AttributeError(f"an EMA is no module and has no {name!r}: write ema.module.{name}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
