"""Find a learning rate for a small network on handwritten digits, and train with rates below, at and above it.

    python examples/find_lr.py [--output outputs/find_lr.png]

The sweep takes 100 steps and leaves no trace: every training starts from the same weights. The data are
scikit-learn's 1797 images of 8 x 8 pixels; nothing is downloaded.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import trainops

BATCH, EPOCHS = 64, 5


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Training and test images, with their digits."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16.0, y, test_size=0.25, random_state=0, stratify=y)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    train_y, test_y = (torch.tensor(part) for part in parts[2:])
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


def network() -> nn.Module:
    """Three layers, from the same seed each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """The cross-entropy of a batch."""
    images, digits = batch
    return nn.functional.cross_entropy(model(images), digits)


def accuracy_at(lr: float, train: TensorDataset, test: TensorDataset) -> float:
    """The share of the test images that are recognised after some epochs, in percent."""
    model = network()
    optimizer = trainops.AdamW(model.parameters(), lr, max_grad_norm=1.0)
    for _ in range(EPOCHS):
        for batch in DataLoader(train, BATCH, shuffle=True):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    with torch.no_grad():
        images, digits = test.tensors
        return 100.0 * (model(images).argmax(1) == digits).float().mean().item()


def main() -> None:
    """Sweep, train, print a table, save a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/find_lr.png"), help="the picture")
    args = parser.parse_args()
    train, test = datasets()
    model = network()
    optimizer = trainops.AdamW(model.parameters(), max_grad_norm=1.0)
    loader = DataLoader(train, BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))
    found = trainops.lr_finder(model, optimizer, loader, loss_of, start_lr=1e-6, end_lr=10.0, repeat=True)
    assert found.steepest is not None
    assert found.tenth_of_minimum is not None
    table = Table("learning rate", "", f"test accuracy after {EPOCHS} epochs", title="digits")
    for lr, name in (
        (found.tenth_of_minimum / 100, "far below"),
        (found.steepest, "steepest descent"),
        (found.tenth_of_minimum, "a tenth of the minimum's"),
        (found.lrs[-1], "where the sweep ended"),
    ):
        table.add_row(f"{lr:.1e}", name, f"{accuracy_at(lr, train, test):.1f} %")
    console = Console()
    console.print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    found.plot().savefig(args.output, dpi=150)
    console.print(f"saved {args.output}")


if __name__ == "__main__":
    main()
