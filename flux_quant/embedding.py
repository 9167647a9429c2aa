"""A table of vectors that stays packed: only the rows that are asked for are unpacked.

T5-XXL's has 32,128 rows of 4,096, which are 526 MB in float32; a prompt reads 512 of them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flux_quant.formats import QuantFormat
from flux_quant.kernels.packed import check_parts
from flux_quant.linear import keep_dtype


class QuantEmbedding(nn.Module):
    """ids (...) -> vectors (..., K), float32, from a table (N, K) stored in `fmt`.

    Buffers are the parts of the format, as in `QuantLinear`: moved with the module, never cast. With `follows`, vectors
    have the dtype that the module was cast to last.
    """

    def __init__(self, fmt: QuantFormat, parts: Sequence[Tensor], follows: bool = False) -> None:
        super().__init__()
        self.fmt, self.follows, self.dtype = fmt, follows, torch.float32
        self.num_embeddings, self.embedding_dim = check_parts(fmt, parts)
        for part, tensor in zip(fmt.parts, parts, strict=True):
            self.register_buffer(part.suffix, tensor)

    def forward(self, ids: Tensor) -> Tensor:
        parts = (self._buffers[part.suffix] for part in self.fmt.parts)
        rows = self.fmt.unpack(*(gathered(part, ids.reshape(-1)) for part in parts))
        return rows.view(*ids.shape, self.embedding_dim).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.fmt.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantEmbedding":
        if self.follows:
            self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(keep_dtype(fn), recurse)


def gathered(part: Tensor, ids: Tensor) -> Tensor:
    """Rows of a part; one scale for the whole table belongs to all of them. FP8 has no indexing of its own."""
    if part.ndim == 0:
        return part
    return part.view(torch.uint8)[ids].view(part.dtype) if part.itemsize == 1 else part[ids]
