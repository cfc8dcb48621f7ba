"""EMA in lockstep with the classes that people come from, and inside the wrappers that frameworks make."""

import copy

import pytest
import torch
from torch import nn

import trainops

STEPS = 200


def make():
    """A model with averaged buffers and counted ones, in float64: what differs is the rounding of schedules alone."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()


def train(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(6, 7, dtype=torch.float64)).square().mean().backward()
    optimizer.step()


def of_module(module):
    return [*module.parameters(), *module.buffers()]


def lockstep(model, ema, theirs, update, averages, fused, rtol=1e-12):
    """Train with both averages; ``averages`` are of theirs, in the order of the parameters and then the buffers."""
    optimizer = trainops.AdamW(model.parameters(), 0.01)
    if fused:
        ema.attach(optimizer)
    for step in range(1, STEPS + 1):
        train(model, optimizer)
        if not fused:
            ema.update()
        update(theirs, step)
        for x, y in zip(of_module(ema.module), averages(theirs), strict=False):
            if x.is_floating_point():
                # Relative to the largest element: others pass through zero.
                torch.testing.assert_close(x.detach(), y.detach(), rtol=0, atol=rtol * y.abs().max().item())
    assert ema.step == STEPS
    moved = [not torch.equal(x, y) for x, y in zip(ema.module.parameters(), model.parameters(), strict=True)]
    assert all(moved)


over_fused = pytest.mark.parametrize("fused", [False, True], ids=["update", "step"])

TIMM = {
    "constant": ({"decay": 0.9}, {"decay": 0.9}),
    "warmup": ({"decay": 0.95, "use_warmup": True}, {"decay": 0.95, "warmup": True}),
    "late": (
        {"decay": 0.95, "use_warmup": True, "update_after_step": 20, "min_decay": 0.3, "warmup_gamma": 5.0},
        {"decay": 0.95, "warmup": True, "update_after_step": 20, "min_decay": 0.3, "warmup_gamma": 5.0},
    ),
    "parameters": ({"decay": 0.9, "exclude_buffers": True}, {"decay": 0.9, "average_buffers": False}),
}


@over_fused
@pytest.mark.parametrize("name", TIMM)
def test_in_lockstep_with_timm(name, fused):
    utils = pytest.importorskip("timm.utils")
    model, (options, own) = make(), TIMM[name]
    theirs = utils.ModelEmaV3(model, **options)
    lockstep(
        model,
        trainops.EMA(model, **own),
        theirs,
        lambda x, step: x.update(model, step),
        lambda x: of_module(x.module),
        fused,
    )


def test_in_lockstep_with_timm_without_a_step():
    utils = pytest.importorskip("timm.utils")
    model = make()
    theirs = utils.ModelEmaV3(model, decay=0.9)
    ema = trainops.EMA(model, lambda step: 0.9)
    lockstep(model, ema, theirs, lambda x, step: x.update(model), lambda x: of_module(x.module), False)


@over_fused
@pytest.mark.parametrize("buffers", [False, True])
def test_in_lockstep_with_torch(buffers, fused):
    swa_utils = torch.optim.swa_utils
    model = make()
    theirs = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=buffers)
    ema = trainops.EMA(model, 0.9, average_buffers=buffers)
    lockstep(model, ema, theirs, lambda x, step: x.update_parameters(model), lambda x: of_module(x.module), fused)


DIFFUSERS = {
    "default": {},
    "warmup": {"use_ema_warmup": True, "decay": 0.95, "inv_gamma": 2.0, "power": 0.75},
    "late": {"update_after_step": 30, "decay": 0.8, "min_decay": 0.4},
}


@over_fused
@pytest.mark.parametrize("options", DIFFUSERS.values(), ids=DIFFUSERS)
def test_in_lockstep_with_diffusers(options, fused):
    training_utils = pytest.importorskip("diffusers.training_utils")
    model = make()
    theirs = training_utils.EMAModel(model.parameters(), **options)
    ema = trainops.EMA(model.parameters(), trainops.DiffusersDecay(**options))
    # theirs is s - (1 - decay) * (s - p), whose terms are rounded where they are larger than their difference
    lockstep(
        model, ema, theirs, lambda x, step: x.step(model.parameters()), lambda x: x.shadow_params, fused, rtol=1e-11
    )
    other = trainops.EMA(make().parameters(), trainops.DiffusersDecay(**options))
    other.load_state_dict(theirs.state_dict())
    assert other.step == STEPS
    assert all(map(torch.equal, other.shadow_params, theirs.shadow_params))
    theirs.load_state_dict(ema.state_dict(form="diffusers"))
    assert theirs.optimization_step == STEPS
    assert all(map(torch.equal, ema.shadow_params, theirs.shadow_params))


def test_stored_as_diffusers_does():
    training_utils = pytest.importorskip("diffusers.training_utils")
    models = make(), make()
    theirs = training_utils.EMAModel(models[0].parameters(), decay=0.5)
    ours = trainops.EMA(models[1].parameters(), trainops.DiffusersDecay(decay=0.5))
    for model, ema, step in ((models[0], theirs, theirs.step), (models[1], ours, ours.update)):
        for i in range(3):
            for p in model.parameters():
                p.detach().add_(i)
            step(model.parameters())
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    before = [p.detach().clone() for p in models[0].parameters()]
    assert all(map(torch.allclose, before, models[1].parameters()))
    theirs.restore(models[0].parameters())
    ours.restore(models[1].parameters())
    assert all(map(torch.equal, *(model.parameters() for model in models)))
    assert not any(map(torch.equal, before, models[1].parameters()))


EMA_PYTORCH = {
    "default": {},
    "every": {"update_every": 3, "update_after_step": 20, "beta": 0.9},
    "all": {"update_every": 1, "update_after_step": 0, "inv_gamma": 3.0, "power": 0.8, "min_value": 0.2},
    "frozen": {"beta": 1.0, "update_every": 2, "update_after_step": 10},
}


@over_fused
@pytest.mark.parametrize("options", EMA_PYTORCH.values(), ids=EMA_PYTORCH)
def test_in_lockstep_with_ema_pytorch(options, fused):
    ema_pytorch = pytest.importorskip("ema_pytorch")
    model = make()
    theirs = ema_pytorch.EMA(model, **options)
    ema = trainops.EMA(model, trainops.EMAPytorchDecay(**options))
    # its schedule is computed in float32
    lockstep(model, ema, theirs, lambda x, step: x.update(), lambda x: of_module(x.ema_model), fused, rtol=1e-5)
    other = trainops.EMA(make(), trainops.EMAPytorchDecay(**options))
    other.load_state_dict(theirs.state_dict())
    assert other.step == STEPS
    pairs = zip(of_module(other.module), of_module(theirs.ema_model), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_a_lockstep_notices_another_decay():
    utils = pytest.importorskip("timm.utils")
    model = make()
    theirs = utils.ModelEmaV3(model, decay=0.9)
    with pytest.raises(AssertionError, match="not close"):
        lockstep(
            model,
            trainops.EMA(model, 0.9001),
            theirs,
            lambda x, step: x.update(model, step),
            lambda x: of_module(x.module),
            False,
        )


def test_timm_and_trainops_load_from_each_other():
    utils = pytest.importorskip("timm.utils")
    model = make()
    theirs, ema = utils.ModelEmaV3(model, decay=0.9), trainops.EMA(model, 0.9)
    optimizer = trainops.AdamW(model.parameters(), 0.01, ema=ema)
    for _ in range(5):
        train(model, optimizer)
    theirs.load_state_dict(ema.state_dict(form="timm"))
    assert all(map(torch.equal, of_module(theirs.module), of_module(ema.module)))
    train(model, optimizer)
    ema.load_state_dict(theirs.state_dict())
    assert all(map(torch.equal, of_module(theirs.module), of_module(ema.module)))
    assert ema.step == 6


# The wrappers of frameworks.


def accelerates(model, optimizer):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(model, optimizer)[1]


def accelerates_that_sees(model, optimizer):
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    integration = pytest.importorskip("trainops.integrations.accelerate")
    wrapper = accelerator.prepare(model, optimizer)[1]
    integration.see_skipped_steps(accelerator)
    return wrapper


def fabrics(model, optimizer):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    return fabric.setup(model, optimizer)[1]


def lightnings(model, optimizer):
    return pytest.importorskip("lightning.pytorch.core.optimizer").LightningOptimizer(optimizer)


FRAMEWORKS = [accelerates, accelerates_that_sees, fabrics, lightnings]


@pytest.mark.parametrize("wrap", FRAMEWORKS)
def test_attach_finds_the_optimizer_in_the_wrapper(wrap):
    model = make()
    optimizer, ema = trainops.AdamW(model.parameters()), trainops.EMA(model)
    ema.attach(wrap(model, optimizer))
    train(model, optimizer)
    assert (ema.optimizer, ema.step) == (optimizer, 1)


@pytest.mark.parametrize("wrap", FRAMEWORKS[1:])
def test_an_average_set_on_a_wrapper_moves(wrap):
    model = make()
    optimizer, ema = trainops.AdamW(model.parameters()), trainops.EMA(model)
    wrapper = wrap(model, optimizer)
    wrapper.ema = ema
    assert wrapper.ema is ema
    train(model, optimizer)
    assert (ema.optimizer, ema.step) == (optimizer, 1)


def test_attach_takes_a_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = make()
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    optimizer, ema = trainops.AdamW(model.parameters()), trainops.EMA(model)
    trainer = transformers.Trainer(model, args, optimizers=(optimizer, None))
    assert ema.attach(trainer) is optimizer
    trainer.optimizer = trainer.accelerator.prepare(optimizer)
    assert ema.attach(trainer) is optimizer


def test_lightnings_learning_rate_finder_leaves_no_trace(tmp_path):
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.lr = make().float(), 1e-3
            self.ema = None

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            self.average = trainops.EMA(self.net, 0.99)
            return trainops.AdamW(self.net.parameters(), self.lr, ema=self.average)

    averages = []
    for finds in (False, True):
        torch.manual_seed(1)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(320, 7)), batch_size=4)
        module = Module()
        finder = pl.callbacks.LearningRateFinder(num_training_steps=30, early_stop_threshold=None, update_attr=False)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=5,
            default_root_dir=str(tmp_path),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[finder] if finds else [],
        )
        trainer.fit(module, loader)
        if finds:
            assert finder.optimal_lr is not None
        averages.append((copy.deepcopy(module.average.module), module.average.step))
    assert averages[0][1] == averages[1][1] == 5
    assert all(map(torch.equal, averages[0][0].parameters(), averages[1][0].parameters()))
