"""The pages and the docstrings about frameworks: their code runs where the frameworks are."""

import docstrings
import pytest
import torch
from documentation import ROOT, blocks, run, surroundings

import trainops

PAGES = {page.stem: page for page in sorted((ROOT / "docs" / "frameworks").glob("*.md"))}
NEEDED = {stem: sorted({block.needs for block in blocks(page)} - {""}) for stem, page in PAGES.items()}


def of_hf_trainer(folder):
    import transformers

    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64, n_positions=16, **rates)
    tokens = torch.randint(0, 64, (16, 16))
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
    return {
        "transformers": transformers,
        "model": transformers.GPT2LMHeadModel(config),
        "data": [{"input_ids": x, "labels": x} for x in tokens],
        "args": transformers.TrainingArguments(str(folder / "out"), **options),
    }


def of_accelerate(folder):
    import accelerate

    made = surroundings()
    scheduler = torch.optim.lr_scheduler.LinearLR(made["optimizer"])
    return {"accelerator": accelerate.Accelerator(cpu=True), "scheduler": scheduler}


def of_lightning(folder):
    dataset = torch.utils.data.TensorDataset(torch.randn(16, 16), torch.randint(4, (16,)))
    return {"loader": torch.utils.data.DataLoader(dataset, batch_size=8)}


GIVEN = {"hf-trainer": of_hf_trainer, "accelerate": of_accelerate, "lightning": of_lightning}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("stem", PAGES)
def test_code_runs(stem, tmp_path, monkeypatch):
    for name in NEEDED[stem]:
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    namespace = surroundings() | GIVEN.get(stem, lambda folder: {})(tmp_path)
    for block in blocks(PAGES[stem]):
        run(PAGES[stem], block, namespace)


def test_every_page_says_what_it_needs():
    assert NEEDED == {
        "accelerate": ["accelerate"],
        "hf-trainer": ["transformers"],
        "lightning": ["lightning"],
        "patch": [],
        "timm": ["timm"],
    }
    assert set(GIVEN) <= set(PAGES)


@pytest.mark.parametrize("package", ["timm", "diffusers"])
def test_the_classes_that_an_average_is_equivalent_to(package):
    pytest.importorskip(package)
    docstrings.average("EMA", docstrings.snippets(trainops.EMA)[0], of=package)


def test_what_lightnings_classes_are_equivalent_to(tmp_path):
    lightning = pytest.importorskip("lightning")
    from trainops.integrations.lightning import ClipInStep, EMACallback

    (clip,), (average,) = docstrings.snippets(ClipInStep), docstrings.snippets(EMACallback)
    assert eval(clip, {"Trainer": lightning.Trainer}).gradient_clip_val == 1.0
    assert isinstance(eval(average, {"lightning": lightning, "decay": 0.9}), lightning.Callback)


def test_what_register_is_equivalent_to():
    timm = pytest.importorskip("timm")
    from timm.optim._optim_factory import default_registry

    from trainops.integrations.timm import register

    register()
    ours = default_registry.get_optimizer_info("trainopsadamw")
    (code,) = docstrings.snippets(register)
    default_registry._optimizers.pop("trainopsadamw")
    try:
        eval(code, {"default_registry": default_registry, "timm": timm, "trainops": trainops})
        theirs = default_registry.get_optimizer_info("trainopsadamw")
    finally:
        default_registry._optimizers["trainopsadamw"] = ours
    assert (theirs.opt_class, theirs.has_betas) == (ours.opt_class, ours.has_betas) == (trainops.AdamW, True)
