"""Train a small GPT whose weights, moments and average are spread over ranks by PyTorch's FSDP2.

    torchrun --nproc-per-node 2 examples/train_fsdp2.py [--steps 200] [--checkpoints outputs/fsdp2] [--resume]

The same command trains on GPUs, where there are some, and else on the CPU. The GPT predicts characters of a text that
is at hand, the source of torch.nn.functional; nothing is downloaded.

- The model is made on the meta device, sharded, and filled shard by shard: no rank ever holds all of it.
- Forward and backward compute in bfloat16. Weights, moments, and the average of the weights are float32.
- One call, ``optimizer.step()``, measures the norm over all ranks (one all-reduce), clips, skips what is not finite,
  updates, and moves the average of this rank's shards.
- ``torch.distributed.checkpoint`` saves all of that, each rank its part. ``--resume`` goes on with the same bits, and
  on another number of ranks with the same weights.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import trainops

CONTEXT, BATCH, WIDTH, HEADS, BLOCKS, CHARACTERS = 64, 16, 128, 4, 3, 128


class Block(nn.Module):
    """Attention and an MLP, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """From and to (batch, characters, width)."""
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Predicts each next character."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        """From (batch, characters) to (batch * characters, logits)."""
        places = torch.arange(text.shape[1], device=text.device)
        x = self.blocks(self.characters(text) + self.positions(places))
        return self.head(self.norm(x).flatten(0, 1))

    @torch.no_grad()
    def fill(self) -> None:
        """Begin with random weights, in this rank's shards alone."""
        for name, p in self.named_parameters():
            shard = p.to_local()
            if p.dim() > 1:
                shard.normal_(std=0.05)
            else:
                shard.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


class Run:
    """What is trained, and what a checkpoint holds of it."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(dist.get_rank())
        with torch.device("meta"):
            self.model = GPT()
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in (*self.model.blocks, self.model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        self.model.to_empty(device=device)
        self.model.fill()
        self.ema = trainops.EMA(self.model, 0.98)
        self.optimizer = trainops.AdamW(
            self.model.parameters(), lr=1e-3, max_grad_norm=1.0, skip_nonfinite=True, ema=self.ema
        )
        self.steps, self.device = 0, device
        text = Path(nn.functional.__file__).read_bytes()
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).clamp(max=CHARACTERS - 1).long()

    def state(self) -> dict[str, Any]:
        """All of it, each rank its own shards."""
        self.optimizer.init_state()  # else reading the state of a new optimizer would take a step
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "ema": self.ema.state_dict(), "steps": self.steps}

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, on as many ranks as there are now."""
        state = self.state()
        dcp.load(state, checkpoint_id=checkpoint)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.ema.load_state_dict(state["ema"])
        self.steps = state["steps"]

    def loss(self, seed: int) -> Tensor:
        """The mean loss of this rank's batch, which the seed draws."""
        generator = torch.Generator().manual_seed(seed * dist.get_world_size() + dist.get_rank())
        begins = torch.randint(len(self.text) - CONTEXT, (BATCH,), generator=generator)
        batch = torch.stack([self.text[i : i + CONTEXT + 1] for i in begins]).to(self.device)
        return nn.functional.cross_entropy(self.model(batch[:, :-1]).float(), batch[:, 1:].flatten())

    def step(self) -> Tensor:
        """One step of training; returns the loss over all ranks."""
        self.optimizer.zero_grad()
        loss = self.loss(self.steps)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.steps += 1
        return mean(loss)


def mean(x: Tensor) -> Tensor:
    """Over all ranks."""
    x = x.detach() / dist.get_world_size()
    dist.all_reduce(x)
    return x


def train(device: torch.device, steps: int, folder: Path, resume: bool) -> Run:
    """Train up to that many steps, evaluate, save, export. The first rank says so."""
    say = print if dist.get_rank() == 0 else lambda *_: None
    run = Run(device)
    held = sum(p.to_local().numel() for p in run.ema.module.parameters())
    of = sum(p.numel() for p in run.model.parameters())
    say(f"{dist.get_world_size()} ranks on {device.type}: this one holds {held:,} of {of:,} averages")
    if resume:
        run.load(checkpoint := max(folder.glob("step-*")))
        say(f"resumed from {checkpoint}")
    while run.steps < steps:
        loss = run.step()
        if run.steps % 20 == 0 or run.steps == steps:
            say(f"step {run.steps:4}   loss {loss:.4f}   norm before clipping {run.optimizer.grad_norm:.3f}")
    with torch.no_grad():
        own = mean(run.loss(-1))
        with run.ema.swap():
            averaged = mean(run.loss(-1))
    say(f"another batch: loss {own:.4f}, of the averaged weights {averaged:.4f}")
    dcp.save(run.state(), checkpoint_id=(checkpoint := folder / f"step-{run.steps:06}"))
    say(f"saved {checkpoint}: model, optimizer and average, of each rank its shards")
    weights = run.ema.full_state_dict()
    if dist.get_rank() == 0:
        GPT().load_state_dict(weights)
        torch.save(weights, folder / "averaged.pt")
    say(f"exported {folder / 'averaged.pt'}: the averaged weights, whole, for a model on one process")
    return run


def main(arguments: list[str] | None = None) -> None:
    """Begin on the ranks that torchrun has started."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoints", default="outputs/fsdp2")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it by torchrun --nproc-per-node 2 examples/train_fsdp2.py")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(device, options.steps, Path(options.checkpoints), options.resume)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
