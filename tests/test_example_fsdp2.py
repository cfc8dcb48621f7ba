"""The example of FSDP2: a run that is resumed has the bits of one that is not."""

import importlib
from pathlib import Path

import torch
from contract import same_bits
from process_groups import forks, on_ranks
from sharded_models import memory

EXAMPLES = Path(__file__).parent.parent / "examples"


def check(rank, example, folder):
    device = torch.device("cpu")
    whole = example.train(device, 4, folder / "whole", resume=False)
    example.train(device, 2, folder / "resumed", resume=False)
    resumed = example.train(device, 4, folder / "resumed", resume=True)
    assert resumed.steps == resumed.ema.step == 4
    for a, b in ((whole.model, resumed.model), (whole.ema.module, resumed.ema.module)):
        assert all(map(same_bits, map(memory, a.parameters()), map(memory, b.parameters())))
    assert not any(map(same_bits, map(memory, whole.model.parameters()), map(memory, whole.ema.module.parameters())))
    assert whole.step() < 0.9 * torch.tensor(example.CHARACTERS).log()


@forks
def test_fsdp2_is_resumed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("train_fsdp2")
    monkeypatch.setattr(example, "BLOCKS", 1)
    monkeypatch.setattr(example, "BATCH", 4)
    on_ranks(2, tmp_path, check, example, tmp_path)
    exported = torch.load(tmp_path / "whole" / "averaged.pt")
    assert exported.keys() == example.GPT().state_dict().keys()
