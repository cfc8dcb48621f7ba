"""The pages about frameworks: their code runs where the frameworks are."""


import pytest
import torch
from documentation import ROOT, blocks, run, surroundings

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
