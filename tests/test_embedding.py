"""Tables of vectors that stay packed."""

from dataclasses import replace

import pytest
import torch

from flux_quant.embedding import QuantEmbedding
from flux_quant.formats import FORMATS, QuantFormat

ROWS, WIDTH = 19, 512


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_rows_are_those_of_the_unpacked_table(fmt: QuantFormat):
    parts = fmt.pack(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)))
    unpacked = []

    def unpack(*some: torch.Tensor) -> torch.Tensor:
        unpacked.append(some[0].shape[0])
        return fmt.unpack(*some)

    table = QuantEmbedding(replace(fmt, unpack=unpack), parts)
    ids = torch.tensor([[18, 0, 3], [3, 3, 7]])
    found = table(ids)
    assert torch.equal(found, fmt.unpack(*parts)[ids]) and found.dtype == torch.float32
    assert unpacked == [6]  # and no other row
    assert (table.num_embeddings, table.embedding_dim) == (ROWS, WIDTH)
    assert torch.equal(table.to(torch.bfloat16)(ids), found)
    assert table(ids[:0]).shape == (0, 3, WIDTH)


def test_wrong_parts_are_refused():
    with pytest.raises(ValueError, match="fp8 is stored in 2 tensors"):
        QuantEmbedding(FORMATS["fp8"], (torch.zeros(3, 4),))
