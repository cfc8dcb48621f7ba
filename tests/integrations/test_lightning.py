"""Lightning: clipping by and without the Trainer in every precision, and an average that only training moves."""

import pytest
import torch
from torch import nn

import trainops
from trainops.integrations import unwrap

pl = pytest.importorskip("lightning.pytorch")
integration = pytest.importorskip("trainops.integrations.lightning")

PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"]


class Module(pl.LightningModule):
    def __init__(self, make=trainops.AdamW, lr=0.1, overflow_at=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.lr = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2)), lr
        self.make, self.options, self.overflow_at = make, options, overflow_at
        self.after, self.losses, self.seen, self.watch = [], [], [], lambda: None

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0].to(self.net[0].weight.dtype)).square().sum()
        return loss * float("inf") if batch_idx == self.overflow_at else loss

    def validation_step(self, batch, batch_idx):
        self.losses.append(self.net(batch[0]).square().sum().item())

    test_step = validation_step

    def on_train_batch_end(self, *_):
        self.after.append([p.detach().clone() for p in self.net.parameters()])
        self.seen.append(self.watch())

    def configure_optimizers(self):
        return self.make(self.net.parameters(), lr=self.lr, **self.options)


class ClippingModule(integration.ClipInStep, Module):
    pass


def data(batches=5):
    x = torch.randn(4 * batches, 4, generator=torch.Generator().manual_seed(3))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)


def make_trainer(path, precision="32-true", callbacks=(), **options):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    if precision == "16-mixed":  # by its name, Trainer would take bf16-mixed on a CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        options["plugins"] = [pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)]
    else:
        options["precision"] = precision
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=str(path),
        callbacks=list(callbacks),
        **{"max_epochs": 1, **quiet, **options},
    )


def fit(path, module, *args, ckpt_path=None, val=None, **options):
    trainer = make_trainer(path, *args, **options)
    trainer.fit(module, data(), val, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradient_clip_val_with_pytorchs_arguments(tmp_path, precision, options, algorithm):
    clip = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}
    ours, torchs = (Module(make, **options) for make in (trainops.AdamW, torch.optim.AdamW))
    for module in (ours, torchs):
        fit(tmp_path, module, precision, **clip)
    check_close(ours, torchs, precision)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_gradient_clip_val_after_a_checkpoint_was_loaded(tmp_path, precision):
    trainer = fit(tmp_path, Module(), precision, gradient_clip_val=0.05)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    module = Module()
    fit(tmp_path, module, precision, gradient_clip_val=0.05, max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
    assert len(module.after) == 5


@pytest.mark.parametrize("in_constructor", [False, True], ids=["gradient_clip_val", "max_grad_norm"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_clipping_inside_the_step(tmp_path, monkeypatch, precision, in_constructor):
    torchs = Module(torch.optim.AdamW)
    fit(tmp_path, torchs, precision, gradient_clip_val=0.05)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", None)  # nobody else reads the gradients
    if in_constructor:
        ours = Module(max_grad_norm=0.05)
        trainer = fit(tmp_path, ours, precision)
    else:
        ours = ClippingModule()
        trainer = fit(tmp_path, ours, precision, gradient_clip_val=0.05)
    assert unwrap(trainer.optimizers[0]).grad_norm > 0.05
    assert unwrap(ours.optimizers()) is trainer.optimizers[0]
    check_close(ours, torchs, precision)


TOLERANCES = {"32-true": 1e-4, "64-true": 1e-12, "bf16-true": 0.02, "bf16-mixed": 0.01, "16-mixed": 0.005}


def check_close(ours, torchs, precision):
    """After five steps at a learning rate of 0.1."""
    assert len(ours.after) == len(torchs.after) == 5
    for p, q in zip(ours.after[-1], torchs.after[-1], strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=TOLERANCES[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_check_notices_that_nothing_was_clipped(tmp_path, precision):
    modules = [Module(torch.optim.AdamW) for _ in range(2)]
    for module, clips in zip(modules, ({"gradient_clip_val": 0.05}, {}), strict=True):
        fit(tmp_path, module, precision, **clips)
    with pytest.raises(AssertionError, match="not close"):
        check_close(*modules, precision)


@pytest.mark.parametrize("kind", ["value", "sgd"])
def test_what_cannot_be_clipped_inside_is_left_to_lightning(tmp_path, kind):
    options = {"make": torch.optim.SGD} if kind == "sgd" else {}
    clip = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value" if kind == "value" else "norm"}
    modules = [ClippingModule(**options), Module(**options), Module(**options)]
    for module, clips in zip(modules, (clip, clip, {}), strict=True):
        fit(tmp_path, module, **clips)
    assert all(map(torch.equal, modules[0].after[-1], modules[1].after[-1]))
    assert not all(map(torch.equal, modules[0].after[-1], modules[2].after[-1]))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1e6}, {"make": torch.optim.AdamW}], ids=str)
def test_the_average_follows_every_step(tmp_path, options, precision):
    callback = integration.EMACallback(0.5, average_buffers=False)
    module = Module(**options)
    fit(tmp_path, module, precision, [callback])
    average = [p.clone() for p in module.after[0]]
    for weights in module.after[1:]:
        for p, q in zip(average, weights, strict=True):
            p.lerp_(q, 0.5)
    assert callback.ema.step == 5
    for p, q in zip(callback.ema.module.net.parameters(), average, strict=True):
        torch.testing.assert_close(p, q)
    assert all(map(torch.equal, module.net.parameters(), module.after[-1]))
    assert torch.equal(callback.ema.module.net[1].running_mean, module.net[1].running_mean)


def test_with_accumulated_gradients_the_average_moves_at_steps_alone(tmp_path):
    for options in ({}, {"make": torch.optim.AdamW}):
        callback = integration.EMACallback(0.5)
        fit(tmp_path, Module(**options), callbacks=[callback], accumulate_grad_batches=2)
        assert callback.ema.step == 3


def test_a_step_that_the_scaler_leaves_out_does_not_move_the_average(tmp_path):
    callback = integration.EMACallback(0.5)
    fit(tmp_path, Module(overflow_at=2), "16-mixed", [callback])
    assert callback.ema.step == 4


class LaterFinder(pl.callbacks.LearningRateFinder):
    """Looks for a learning rate before the second epoch."""

    def on_fit_start(self, *_):
        pass

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, module)


@pytest.mark.parametrize("finder", [pl.callbacks.LearningRateFinder, LaterFinder])
@pytest.mark.parametrize("first", [False, True], ids=["finder_first", "average_first"])
def test_finders_do_not_move_the_average(tmp_path, finder, first):
    callback = integration.EMACallback(0.5)
    find = finder(num_training_steps=30, update_attr=False, early_stop_threshold=None)
    module = Module()
    module.watch = lambda: 0 if callback.ema is None else callback.ema.step
    epochs = 9
    fit(tmp_path, module, callbacks=[callback, find] if first else [find, callback], max_epochs=epochs)
    assert len(find.optimal_lr.results["lr"]) == 30
    assert callback.ema.step == 5 * epochs
    before = 5 if finder is LaterFinder else 0
    assert module.seen[before : before + 30] == [before] * 30  # not even until the finder puts things back
    steps = (
        module.after[:5] + module.after[-5 * (epochs - 1) :] if finder is LaterFinder else module.after[-5 * epochs :]
    )
    average = [p.clone() for p in steps[0]]
    for weights in steps[1:]:
        for p, q in zip(average, weights, strict=True):
            p.lerp_(q, 0.5)
    for p, q in zip(callback.ema.module.net.parameters(), average, strict=True):
        torch.testing.assert_close(p, q)


def test_a_checkpoint_resumes_the_average(tmp_path):
    whole, first, second = (integration.EMACallback(0.5) for _ in range(3))
    fit(tmp_path, Module(), callbacks=[whole], max_epochs=2)
    fit(tmp_path, Module(), callbacks=[first]).save_checkpoint(tmp_path / "x.ckpt")
    module = Module()
    fit(tmp_path, module, callbacks=[second], max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
    assert whole.ema.step == second.ema.step == 10
    assert all(map(torch.equal, whole.ema.module.parameters(), second.ema.module.parameters()))
    assert not any(map(torch.equal, first.ema.module.parameters(), second.ema.module.parameters()))


@pytest.mark.parametrize("evaluate", [True, False])
def test_validation_and_tests_use_the_average(tmp_path, evaluate):
    callback = integration.EMACallback(0.5, evaluate=evaluate)
    module = Module()
    trainer = fit(tmp_path, module, callbacks=[callback], val=data(1), num_sanity_val_steps=0)
    used = callback.ema.module if evaluate else module
    x = next(iter(data(1)))[0]
    expected = used.eval().net(x).square().sum().item()
    assert module.losses == [pytest.approx(expected)]
    assert all(map(torch.equal, module.net.parameters(), module.after[-1]))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = Module()  # in another process: the average of the checkpoint
    make_trainer(tmp_path, callbacks=[integration.EMACallback(0.5, evaluate=evaluate)]).test(
        other, data(1), ckpt_path=tmp_path / "x.ckpt"
    )
    assert other.losses == [pytest.approx(expected)]


def test_an_exception_in_validation_puts_the_weights_back(tmp_path):
    class Fails(Module):
        def validation_step(self, batch, batch_idx):
            raise KeyError

    module, callback = Fails(), integration.EMACallback(0.5)
    with pytest.raises(KeyError):
        fit(tmp_path, module, callbacks=[callback], val=data(1), num_sanity_val_steps=0)
    assert all(map(torch.equal, module.net.parameters(), module.after[-1]))
    callback.ema.update()


def test_several_optimizers(tmp_path):
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.net(batch[0]).square().sum())
                optimizer.step()

        def configure_optimizers(self):
            return [self.make(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

    callback = integration.EMACallback(0.5)
    fit(tmp_path, Two(), callbacks=[callback])
    assert callback.ema.step == 5
