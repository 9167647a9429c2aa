"""Finite numbers and checksums: what `verify` finds in single weights."""

from hashlib import sha256

import pytest
import torch
from torch import Tensor

from flux_quant.converters import checksums, gguf_io, safetensors_io
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.soundness import SCALES, all_finite, first_bad_row
from flux_quant.formats import FORMATS


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(5, 33, generator=generator) for name in ("a.weight", "b.weight", 'a "name" \\')}


@pytest.mark.parametrize("format_name", SCALES)
def test_scales_of_random_blocks(format_name):
    """Read from their bytes alone, they tell the same as unpacking every value."""
    fmt = FORMATS[format_name]
    nbytes = fmt.parts[0].shape((fmt.block,))[0]
    blocks = torch.randint(0, 256, (2000, nbytes), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    finite = torch.isfinite(fmt.unpack(blocks)).all(1)
    assert 0.5 < finite.float().mean() < 1
    assert [all_finite(fmt, (block[None],)) for block in blocks] == finite.tolist()
    assert first_bad_row(fmt, (blocks,), (2000, fmt.block)) == finite.tolist().index(False)
    assert first_bad_row(fmt, (blocks[finite],), (int(finite.sum()), fmt.block)) is None


def test_scales_of_every_layout_are_known():
    assert set(SCALES) == {name for name, fmt in FORMATS.items() if fmt.block > 1}


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none(format_name, value):
    fmt = FORMATS[format_name]
    weight = torch.randn(9, 2 * fmt.block, generator=torch.Generator().manual_seed(2))
    parts = fmt.pack(weight)
    assert first_bad_row(fmt, parts, tuple(weight.shape)) is None
    if fmt.is_plain:
        parts[0][6, -1] = value
    elif fmt.block == 1:
        parts[0].view(torch.uint8)[6, 0] = 0xFF  # E4M3FN has one NaN of either sign and nothing infinite
    else:
        scale = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
        begin = SCALES[format_name][-1] + parts[0].shape[1] // 2
        parts[0][6, begin : begin + 2] = scale
    assert first_bad_row(fmt, parts, tuple(weight.shape)) == 6
    if len(parts) > 1:
        assert first_bad_row(fmt, (fmt.pack(weight)[0], torch.tensor(value)), tuple(weight.shape)) == 0


def test_empty_weight_is_finite():
    assert first_bad_row(FORMATS["f32"], (torch.ones(0, 4),), (0, 4)) is None


@pytest.mark.parametrize("container", [gguf_io, safetensors_io])
def test_header_has_its_length_before_the_sums_are_known(weights, container):
    infos = [TensorInfo(name, tuple(tensor.shape), "f32") for name, tensor in weights.items()]
    pending = container.layout(infos, checksums.entry(dict.fromkeys(weights, checksums.PENDING)))
    known = container.layout(infos, checksums.entry({name: checksums.checksum((weights[name],)) for name in weights}))
    assert len(pending.header) == len(known.header) and pending.header != known.header
    assert pending.places == known.places


def test_checksum_is_that_of_the_bytes(weights):
    data, scale = FORMATS["fp8"].pack(weights["a.weight"])
    expected = sha256(data.view(torch.uint8).numpy().tobytes() + scale.numpy().tobytes()).hexdigest()
    assert checksums.checksum((data, scale)) == expected
