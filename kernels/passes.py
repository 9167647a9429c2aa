"""The matrix product in two passes: some rows of the weight are unpacked, torch multiplies, the next rows follow.

With many rows of input the product is bound by arithmetic, and no fused kernel that anybody published reaches cuBLAS.
Who unpacks is the caller's choice: `pieces` yields (rows, weight (n, K) in the dtype of the product), and a piece may
lie in a scratch that the next one overwrites.
"""

import threading
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from flux_quant.kernels.packed import Rows

Pieces = Iterable[tuple[Rows, Tensor]]

# Held from the launch that unpacks into a scratch to the launch that has read it: threads that share a stream share its
# scratch, and the stream runs launches in the order in which they came.
SCRATCH = threading.RLock()


def multiply(x: Tensor, pieces: Pieces, outputs: int, bias: Tensor | None) -> Tensor:
    """x (M, K), bias (N) in x's dtype -> x @ weight.T + bias (M, N)."""
    out = None
    for rows, weight in pieces:
        if weight.shape[0] == outputs:
            return F.linear(x, weight, bias)
        if out is None:
            out = x.new_empty(x.shape[0], outputs)
        if bias is None:
            torch.mm(x, weight.t(), out=out[:, rows])
        else:
            torch.addmm(bias[rows], x, weight.t(), out=out[:, rows])
    return x.new_empty(x.shape[0], 0) if out is None else out


def input_gradient(grad: Tensor, pieces: Pieces, inputs: int) -> Tensor:
    """grad (M, N) -> grad @ weight (M, K), summed over the pieces in float32."""
    total = None
    for rows, weight in pieces:
        part = grad[:, rows] @ weight
        if weight.shape[0] == grad.shape[1]:
            return part
        total = part.float() if total is None else total.add_(part)
    return grad.new_zeros(grad.shape[0], inputs) if total is None else total.to(grad.dtype)
