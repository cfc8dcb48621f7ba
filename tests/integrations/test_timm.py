"""timm: names that its factory finds, its models with our DropPath, and its train.py."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import trainops
from trainops.integrations import patch

timm = pytest.importorskip("timm")
feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
integration = pytest.importorskip("trainops.integrations.timm")

# Small models of different families, with DropPath in residual branches, and a node of a block in each.
MODELS = {
    "vit_tiny_patch16_224": ("blocks.1", {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}),
    "convnext_atto": ("stages.1", {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)}),
    "swin_tiny_patch4_window7_224": (
        "layers.1",
        {"img_size": 56, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)},
    ),
    "efficientnet_lite0": ("blocks.3", {}),
    "resnet10t": ("layer2", {}),
}


def build(name, inside):
    """A model of timm's, with our DropPath or theirs."""
    torch.manual_seed(0)
    options = {"drop_path_rate": 0.5, "num_classes": 5, **MODELS[name][1]}
    if not inside:
        return timm.create_model(name, **options)
    with patch():
        model = timm.create_model(name, **options)
    assert any(isinstance(module, trainops.DropPath) for module in model.modules())
    return model


def image(model, batch=4):
    size = model.default_cfg["input_size"]
    size = MODELS[model.default_cfg["architecture"]][1].get("img_size", min(size[-1], 64))
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def seeded(model, x):
    torch.manual_seed(7)
    return model(x)


both = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
models = pytest.mark.parametrize("name", MODELS)


@both
@models
def test_models_with_our_drop_path_are_timms(name, training):
    ours, theirs = (build(name, inside).train(training) for inside in (True, False))
    theirs.load_state_dict(ours.state_dict())
    for x in (image(ours), image(ours)):
        outs = [seeded(model, x) for model in (ours, theirs)]
        assert torch.equal(*outs)
        for model, out in zip((ours, theirs), outs, strict=True):
            model.zero_grad()
            out.square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert repr(ours) == repr(theirs)


@both
@models
def test_feature_extractors_of_torchvision_and_timm(name, training):
    model, node = build(name, True).train(training), MODELS[name][0]
    x = image(model)
    extractor = feature_extraction.create_feature_extractor(model, {node: "block"}).train(training)
    features = []
    handle = model.get_submodule(node).register_forward_hook(lambda *call: features.append(call[-1]))
    seeded(model, x)
    handle.remove()
    torch.testing.assert_close(seeded(extractor, x)["block"], features[0])
    timms = timm.models._features_fx.create_feature_extractor(model, {node: "block"})
    assert seeded(timms.train(training), x)["block"].shape == features[0].shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@models
def test_torchscript(name):
    model = build(name, True).eval()
    x = image(model)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_patch_reaches_every_module_of_timm_and_puts_it_back():
    def holders():
        return {
            name: vars(module)["DropPath"]
            for name, module in sys.modules.items()
            if name.startswith("timm") and isinstance(vars(module).get("DropPath"), type)
        }

    before = holders()
    adamw = timm.optim.get_optimizer_info("adamw")
    assert len(before) > 20
    with patch() as handle:
        assert "DropPath in " in repr(handle)
        assert len(repr(handle)) < 300
        replaced = [name for name, kind in holders().items() if kind is trainops.DropPath]
        assert len(replaced) == len(before) - 1  # but where it is defined
        assert timm.layers.DropPath is timm.models.vision_transformer.DropPath is trainops.DropPath
        assert timm.layers.drop_path is trainops.drop_path
        optimizer = timm.optim.create_optimizer_v2(nn.Linear(2, 2), "adamw", lr=0.1)
        assert isinstance(optimizer, trainops.AdamW)
        fresh = sys.modules.pop("timm.models.vision_transformer")
        try:
            late = importlib.import_module("timm.models.vision_transformer")
            assert late.DropPath is trainops.DropPath
        finally:
            sys.modules["timm.models.vision_transformer"] = fresh
            sys.modules["timm.models.late"] = late
            late.__name__ = "timm.models.late"
    assert sys.modules.pop("timm.models.late").DropPath is timm.layers.DropPath
    assert holders() == before
    assert timm.optim.get_optimizer_info("adamw") is adamw


def test_register_finds_the_optimizer_under_its_name():
    assert "trainopsadamw" in integration.register()
    assert "trainopsadamw" in timm.optim.list_optimizers()
    registered = timm.optim.get_optimizer_info("trainopsadamw")
    integration.register()
    assert timm.optim.get_optimizer_info("trainopsadamw") is registered
    model = nn.Linear(2, 2)
    optimizer = timm.optim.create_optimizer_v2(
        model, "trainopsadamw", lr=0.1, weight_decay=0.05, betas=(0.8, 0.9), max_grad_norm=1.0
    )
    assert type(optimizer) is trainops.AdamW
    assert optimizer.max_grad_norm == 1.0
    torchs = timm.optim.create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05, betas=(0.8, 0.9))
    for ours, theirs in zip(optimizer.param_groups, torchs.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}


@pytest.mark.parametrize("clip", ["outside", "inside"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_steps_of_timms_own_training(clip, scaled):
    """Its factory, scaler and clipping, as its train.py puts them together, with one line of ours before."""
    losses = []
    for kind in ("stock", clip):
        handle = patch() if kind == "outside" else None
        opt, options = ("trainopsadamw", {"max_grad_norm": 0.1}) if kind == "inside" else ("adamw", {})
        integration.register()
        torch.manual_seed(0)
        model = build("vit_tiny_patch16_224", inside=False)  # under a patch with our DropPath all the same
        optimizer = timm.optim.create_optimizer_v2(model, opt, lr=1e-3, weight_decay=0.05, **options)
        assert isinstance(optimizer, trainops.AdamW) == (kind != "stock")
        scaler = timm.utils.NativeScaler("cpu")
        scaler._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        losses.append([])
        for _ in range(4):
            loss = model(image(model)).square().mean()
            losses[-1].append(loss.item())
            clip_grad = None if options else 0.1
            optimizer.zero_grad()
            if scaled:
                scaler(loss, optimizer, clip_grad=clip_grad, parameters=model.parameters())
            else:
                loss.backward()
                if clip_grad is not None:
                    timm.utils.dispatch_clip_grad(model.parameters(), clip_grad)
                optimizer.step()
        if handle is not None:
            handle.undo()
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert abs(losses[0][-1] - losses[0][0]) > 0.01 * losses[0][0]


TRAIN = os.environ.get("TIMM_TRAIN", "")


@pytest.mark.skipif(not TRAIN, reason="timm's wheel has no train.py: set TIMM_TRAIN to that of pytorch-image-models")
@pytest.mark.parametrize("line", ["register", "patch"])
def test_train_py_with_one_more_line(tmp_path, line):
    images(tmp_path / "data")
    source = Path(TRAIN).read_text()
    ours = {
        "register": "from trainops.integrations.timm import register; register()",
        "patch": "from trainops.integrations import patch; patch()",
    }[line]
    imported, logger, rest = source.partition("_logger = logging.getLogger('train')\n")
    (tmp_path / "edited.py").write_text(f"{imported}{logger}{ours}\n{rest}")
    (tmp_path / "stock.py").write_text(source)
    inside, outside = ["--opt", "trainopsadamw", "--opt-kwargs", "max_grad_norm=0.5"], ["--clip-grad", "0.5"]
    outside = ["--opt", "adamw", *outside]
    losses = [
        run(tmp_path, "edited.py", inside if line == "register" else outside),
        run(tmp_path, "stock.py", outside),
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def images(path):
    from PIL import Image

    for split in ("train", "validation"):
        for i, color in enumerate(("red", "blue")):
            (path / split / color).mkdir(parents=True)
            for j in range(8):
                Image.new("RGB", (32, 32), (200 * (1 - i), 20 * j, 200 * i)).save(path / split / color / f"{j}.png")


def run(path, script, options):
    """The losses of two epochs, as train.py writes them."""
    command = [sys.executable, script, "--data-dir", "data", "--model", "resnet10t", "--img-size", "32"]
    command += ["--num-classes", "2", "-b", "4", "--epochs", "2", "--warmup-epochs", "0", "--lr", "0.001"]
    command += ["--device", "cpu", "--workers", "0", "--no-aug", "--drop-path", "0.2", "--experiment", script]
    command += ["--output", "out", "--log-interval", "1", *options]
    subprocess.run(command, cwd=path, check=True, capture_output=True, text=True)
    summary = (path / "out" / script / "summary.csv").read_text().splitlines()
    return [float(x) for row in summary[1:] for x in row.split(",")[:3]]
