"""The tail of a step under HF Trainer, from the end of backward to the end of the optimizer's step.

    python benchmarks/hf_trainer.py [--steps N] [--rounds N]

PyTorch's AdamW and its fused one under the stock Trainer, and trainops under its own, with clipping, on a GPT-2 of
23 M parameters. They take turns in rounds; medians, and the ratio to the stock Trainer with fused AdamW.
It needs the environment of `make test-integrations`.
"""

import argparse
import os
import statistics
import tempfile
import time

import torch
import transformers

from trainops.integrations import hf


def timed(kind):
    """A Trainer of a kind that notes when backward and step have ended."""

    class Timed(kind):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.began = time.perf_counter()
            return loss

    return Timed


class Clock(transformers.TrainerCallback):
    """Milliseconds of each tail after the first two steps."""

    def __init__(self):
        self.trainer, self.times = None, []

    def on_optimizer_step(self, args, state, control, **kwargs):
        """The step has ended."""
        if state.global_step >= 2:
            self.times.append(1e3 * (time.perf_counter() - self.trainer.began))


def measure(kind, optim, steps):
    """The tails of some steps of a fresh model."""
    transformers.set_seed(0)
    config = transformers.GPT2Config(n_layer=6, n_head=8, n_embd=512, vocab_size=8000, n_positions=64)
    model = transformers.GPT2LMHeadModel(config)
    data = [{"input_ids": x, "labels": x} for x in torch.randint(0, 8000, (64, 16))]
    args = transformers.TrainingArguments(
        tempfile.mkdtemp(),
        optim=optim,
        max_steps=steps + 2,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    clock = Clock()
    clock.trainer = timed(kind)(model, args, train_dataset=data, callbacks=[clock])
    clock.trainer.train()
    return sum(p.numel() for p in model.parameters()), clock.times


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="steps of each in a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    providers = {
        "stock, AdamW": (transformers.Trainer, "adamw_torch"),
        "stock, fused AdamW": (transformers.Trainer, "adamw_torch_fused"),
        "trainops": (hf.Trainer, "adamw_torch_fused"),
    }
    rounds = {name: [] for name in providers}
    for _ in range(options.rounds):
        for name, provider in providers.items():
            parameters, times = measure(*provider, options.steps)
            rounds[name].append(statistics.median(times))
    print(f"{parameters / 1e6:.1f} M parameters, {torch.get_num_threads()} threads, load {os.getloadavg()}")
    for name, times in rounds.items():
        ratios = [a / b for a, b in zip(times, rounds["stock, fused AdamW"], strict=True)]
        print(f"{name:20} {statistics.median(times):7.1f} ms   {statistics.median(ratios):5.2f}")


if __name__ == "__main__":
    main()
