"""Muon: momentum whose update matrix is replaced by the nearest orthogonal one (Jordan et al. 2024).

torch.optim.Muon does the same in bfloat16, which processors without a bfloat16 unit compute slowly; this is in float32.
Updates are scaled to the size of Adam's (Liu et al. 2025: 0.2 sqrt(max(rows, columns))), so both share a learning rate.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, Jordan et al.
STEPS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """(rows, columns) -> about U V^T of its singular value decomposition, singular values within 0.7 to 1.2."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """For the matrices of linear layers; everything else belongs to Adam."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(average, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonalise_all(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(n, rows, columns) -> `orthogonalise` of each, in the dtype that its products are to be in."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)).to(dtype or x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class BatchedMuon:
    """The same updates with a few products for all matrices of one shape: a GPU waits for launches, not for these.

    Its learning rate may be a number or a tensor on the device, which a recorded step reads anew.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.momentum, self.weight_decay, self.dtype = momentum, weight_decay, dtype
        self.parameters = list(parameters)
        self.groups: dict[torch.Size, list[nn.Parameter]] = {}
        self.averages: dict[torch.Size, Tensor] = {}

    def begin(self) -> None:
        """Parameters that the first step finds without a gradient have none later: they stay as they are."""
        for p in self.parameters:
            if p.grad is not None:
                self.groups.setdefault(p.shape, []).append(p)
        self.averages = {shape: torch.zeros_like(torch.stack(group)) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, lr: float | Tensor) -> None:
        if not self.groups:
            self.begin()
        for shape, group in self.groups.items():
            gradient = torch.stack([p.grad for p in group])
            average = self.averages[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonalise_all(gradient.lerp_(average, self.momentum), self.dtype)
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_sub_(group, list((update * (lr * 0.2 * max(shape) ** 0.5)).unbind()))
