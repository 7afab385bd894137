"""Muon: momentum whose matrix updates are orthogonalised, so that every direction learns at the same pace.

Jordan et al. 2024 (quintic Newton–Schulz), with the update scale of Moonshot AI's "Muon is scalable", which lets
one learning rate serve both Muon and Adam.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# Root mean square of an Adam update, measured by Moonshot AI.
UPDATE_RMS = 0.2


def orthogonalize(matrix: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix to `matrix` [rows, columns], roughly: singular values end in 0.7 … 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """For 2-D weights only; give embeddings, biases, norms and output layers to Adam."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
                buffer.mul_(group["momentum"]).add_(param.grad)
                nesterov = param.grad.add(buffer, alpha=group["momentum"])
                scale = UPDATE_RMS * max(param.shape) ** 0.5
                param.add_(orthogonalize(nesterov), alpha=-group["lr"] * scale)
