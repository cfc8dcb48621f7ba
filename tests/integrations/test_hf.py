"""HF Trainer: the same training with clipping inside, and an average."""

import pytest
import torch
from torch import nn

import trainops
from trainops.integrations import unwrap

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("trainops.integrations.hf")

DATA = [
    {"input_ids": x, "labels": x} for x in torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(1))
]


def make(kind, output_dir, callbacks=(), **options):
    options = {"max_steps": 6, "max_grad_norm": 0.5, "save_strategy": "no", "learning_rate": 1e-2, **options}
    args = transformers.TrainingArguments(
        str(output_dir),
        per_device_train_batch_size=4,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    torch.manual_seed(0)
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=16, **rates)
    model = transformers.GPT2LMHeadModel(config)
    return kind(model, args, train_dataset=DATA, eval_dataset=DATA[:8], callbacks=list(callbacks))


def train(*args, resume=None, **options):
    trainer = make(*args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def no_clip_from_outside(monkeypatch):
    """Nothing but the step may read the gradients for their norm."""

    def fail(*args, **kwargs):
        raise AssertionError("a second pass over the gradients")

    for name in ("clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_"):
        monkeypatch.setattr(torch.nn.utils, name, fail)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
def test_trains_and_logs_as_the_stock_trainer(tmp_path, request, max_grad_norm, options):
    stock = train(transformers.Trainer, tmp_path, max_grad_norm=max_grad_norm, **options)
    request.getfixturevalue("no_clip_from_outside")
    ours = train(hf.Trainer, tmp_path, max_grad_norm=max_grad_norm, **options)
    assert type(unwrap(ours.optimizer)) is trainops.AdamW
    assert len(logged(ours, "grad_norm")) == 6
    assert max(logged(ours, "grad_norm")) > 0.6  # clipping matters
    for key in ("loss", "grad_norm", "learning_rate"):
        assert logged(ours, key) == pytest.approx(logged(stock, key), rel=1e-5 if not options.get("bf16") else 1e-2)


def test_other_optimizers_are_clipped_as_ever(tmp_path):
    stock, ours = (train(kind, tmp_path, optim="sgd") for kind in (transformers.Trainer, hf.Trainer))
    assert logged(ours, "grad_norm") == logged(stock, "grad_norm")
    assert logged(ours, "loss") == logged(stock, "loss")


class Overflow(transformers.TrainerCallback):
    """An infinite gradient in the second step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            next(kwargs["model"].parameters()).grad.fill_(float("inf"))


def test_a_skipped_step_holds_back_the_schedule(tmp_path):
    rates = []
    for callbacks in ([], [Overflow()]):
        trainer = make(hf.Trainer, tmp_path, callbacks)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # what fp16 has on a GPU
        trainer.train()
        rates.append(trainer.lr_scheduler.get_last_lr())
    assert int(unwrap(trainer.optimizer).skipped_steps) == 1
    assert rates == [[0.0] * 2, pytest.approx([1e-2 / 6] * 2)]


class Record(transformers.TrainerCallback):
    """An average by its formula, of the weights after each step."""

    def __init__(self, decay):
        self.decay, self.average = decay, None

    def on_step_end(self, args, state, control, **kwargs):
        new = weights(kwargs["model"])
        old = self.average or new
        self.average = {name: old[name] * self.decay + p * (1 - self.decay) for name, p in new.items()}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_the_average_follows_and_evaluates(tmp_path, optim):
    callback, record = hf.EMACallback(0.8), Record(0.8)
    trainer = train(hf.Trainer, tmp_path, [callback, record], optim=optim, learning_rate=0.1)
    assert callback.ema.step == 6
    for name, p in record.average.items():
        torch.testing.assert_close(callback.ema.module.get_parameter(name), p)
    assert (unwrap(trainer.optimizer) is callback.ema.optimizer) == (optim != "sgd")
    own = weights(trainer.model)
    loss = trainer.evaluate()["eval_loss"]
    assert all(torch.equal(p, own[name]) for name, p in trainer.model.named_parameters())
    callback.evaluate = False
    own_loss = trainer.evaluate()["eval_loss"]
    trainer.model.load_state_dict(callback.ema.module.state_dict())
    assert loss == trainer.evaluate()["eval_loss"] != own_loss


@pytest.mark.parametrize("kind", [hf.Trainer, transformers.Trainer])
def test_the_average_is_saved_and_resumed(tmp_path, kind):
    options = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    whole, resumed = hf.EMACallback(0.8, evaluate=False), hf.EMACallback(0.8, evaluate=False)
    train(kind, tmp_path, [whole], **options)
    train(kind, tmp_path, [resumed], resume=str(tmp_path / "checkpoint-3"), **options)
    assert resumed.ema.step == 6
    for name, p in weights(whole.ema.module).items():
        assert torch.equal(p, resumed.ema.module.get_parameter(name))


def test_a_checkpoint_elsewhere_is_found_and_one_without_an_average_is_named(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    train(hf.Trainer, tmp_path / "a", [hf.EMACallback(0.8)], **options)
    checkpoint = tmp_path / "a" / "checkpoint-3"
    callback = hf.EMACallback(0.8)
    train(hf.Trainer, tmp_path / "b", [callback], resume=str(checkpoint), **options)
    assert callback.ema.step == 6
    (checkpoint / hf.EMA_FILE).unlink()
    with pytest.warns(UserWarning, match=r"ema\.pt: the average begins anew"):
        train(hf.Trainer, tmp_path / "c", [callback := hf.EMACallback(0.8)], resume=str(checkpoint), **options)
    assert callback.ema.step == 3


def test_the_average_of_the_best_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # the first
    callback = hf.EMACallback(0.5)
    trainer = train(hf.Trainer, tmp_path, [callback], **options, **best)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert callback.ema.step == 3


def test_export(tmp_path):
    callback = hf.EMACallback(0.8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="before training"):
        callback.export(str(tmp_path))
    train(hf.Trainer, tmp_path, [callback])
    callback.export(str(tmp_path / "average"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "average", dtype=torch.float64)
    assert all(torch.equal(p, callback.ema.module.get_parameter(name)) for name, p in loaded.named_parameters())


def test_the_stock_trainer_cannot_evaluate_with_the_average_and_is_told_so(tmp_path):
    with pytest.warns(UserWarning, match="evaluates the model's own weights"):
        train(transformers.Trainer, tmp_path, [hf.EMACallback(0.8)])


def test_an_average_put_on_the_wrapper_moves_as_one_put_on_what_is_inside_it(tmp_path):
    trainer = train(hf.Trainer, tmp_path)
    ema = trainops.EMA(trainer.model, 0.5)
    for steps, target in enumerate((trainer.optimizer, unwrap(trainer.optimizer)), start=1):
        target.ema = ema
        trainer.optimizer.step()
        assert ema.step == steps


def test_unwrap_leaves_an_optimizer_alone():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    assert unwrap(optimizer) is optimizer
