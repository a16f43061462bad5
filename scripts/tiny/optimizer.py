"""Muon for the matrices, AdamW for the rest, under one learning-rate schedule.

Muon replaces the momentum of a matrix by its nearest orthogonal matrix (five Newton-Schulz steps),
so that all directions learn at the same pace. Each expert is a matrix of its own.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

# quintic iteration that brings singular values near 1 in five steps
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(batch_BMN: Tensor) -> Tensor:
    """Return matrices with the singular vectors of ``batch_BMN`` and singular values near 1."""
    a, b, c = _COEFFICIENTS
    x: Tensor = batch_BMN.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon:
    """Momentum and decoupled weight decay; matrices of equal shape are stepped as one batch."""

    def __init__(self, matrices: list[nn.Parameter], *, momentum: float, decay: float) -> None:
        self.momentum, self.decay = momentum, decay
        self.momenta = [torch.zeros_like(matrix) for matrix in matrices]
        self.matrices: list[Tensor] = list(matrices)
        self.groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, matrix in enumerate(matrices):
            rows, columns = sorted(matrix.shape[-2:])
            self.groups[rows, columns].append(index)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move every matrix by ``rate`` times its orthogonal step."""
        gradients = [matrix.grad for matrix in self.matrices if matrix.grad is not None]
        assert len(gradients) == len(self.matrices)
        torch._foreach_lerp_(self.momenta, gradients, 1 - self.momentum)
        ahead = list(torch._foreach_lerp(gradients, self.momenta, self.momentum))
        torch._foreach_mul_(self.matrices, 1 - rate * self.decay)
        for indices in self.groups.values():
            self._step_group(indices, ahead, rate)

    def _step_group(self, indices: list[int], ahead: list[Tensor], rate: float) -> None:
        wide = [_as_wide_batch(ahead[index]) for index in indices]
        moved = torch.split(orthogonalise(torch.cat(wide)), [len(part) for part in wide])
        for index, part in zip(indices, moved, strict=True):
            matrix = self.matrices[index]
            rows, columns = matrix.shape[-2:]
            step = part if rows <= columns else part.mT
            scale = max(1.0, rows / columns) ** 0.5
            matrix.sub_(step.reshape(matrix.shape).to(matrix.dtype), alpha=rate * scale)


def _as_wide_batch(matrix: Tensor) -> Tensor:
    batch = matrix if matrix.dim() == 3 else matrix[None]
    return batch if batch.shape[1] <= batch.shape[2] else batch.mT


class Optimizer:
    """Both optimizers; ``step(scale)`` uses the peak rates times ``scale``."""

    def __init__(self, model: nn.Module, *, matrix_rate: float = 0.02, rate: float = 3e-3) -> None:
        named = dict(model.named_parameters())
        routers = [p for name, p in named.items() if name.endswith("router")]
        vectors = [p for name, p in named.items() if p.dim() == 1 or name == "embed"]
        others = {id(p) for p in routers + vectors}
        matrices = [p for p in named.values() if id(p) not in others]
        self.matrix_rate = matrix_rate
        self.muon = Muon(matrices, momentum=0.95, decay=0.05)
        # a slower router leaves the experts time to become worth choosing
        groups = [{"params": vectors, "peak": rate}, {"params": routers, "peak": rate / 3}]
        self.adam = torch.optim.AdamW(
            groups, betas=(0.9, 0.98), weight_decay=0.0, fused=matrices[0].is_cuda
        )

    def step(self, scale: float) -> None:
        """Step all parameters and clear the gradients."""
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * scale
        self.adam.step()
        self.muon.step(self.matrix_rate * scale)
        self.adam.zero_grad(set_to_none=True)
        for matrix in self.muon.matrices:
            matrix.grad = None
