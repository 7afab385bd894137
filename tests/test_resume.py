from pathlib import Path

import torch
from torch import nn

from dydit_core.train.resume import resume, save


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        model(torch.full((2, 3), float(step))).square().sum().backward()
        optimizer.step()


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), 0.1)


def test_a_training_that_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, again = fresh(), fresh()
    steps(*whole, 0, 5)
    assert resume(tmp_path / "training.pt", *again) == 0
    steps(*again, 0, 3)
    save(tmp_path / "training.pt", *again, 3)
    again = fresh()
    first = resume(tmp_path / "training.pt", *again)
    assert first == 3
    steps(*again, first, 5)
    assert torch.equal(again[0].weight, whole[0].weight) and torch.equal(again[0].bias, whole[0].bias)
    assert [path.name for path in tmp_path.iterdir()] == ["training.pt"]
