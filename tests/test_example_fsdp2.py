"""The example of FSDP2: a run that is resumed has the bits of one that is not."""

import importlib
import subprocess
import sys
from pathlib import Path

import torch
from contract import same_bits
from process_groups import forks, on_ranks
from sharded_models import memory
from targets import thorough

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


@thorough(lambda: True)
def test_torchrun_trains_on_two_ranks_and_resumes_on_one(tmp_path):
    def run(ranks, *arguments):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command = [*launch, EXAMPLES / "train_fsdp2.py", "--checkpoints", tmp_path, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    said = run(2, "--steps", "2")
    assert "2 ranks on" in said
    assert "step    2" in said
    said = run(1, "--steps", "3", "--resume")
    assert f"resumed from {tmp_path / 'step-000002'}" in said
    assert "step    3" in said
