"""Every row of FORMATS: sizes, round trip, independence of rows; the gguf package as a judge of the GGUF layouts."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from flux_quant.formats import FORMATS, QuantFormat

# Largest error of a value, as a share of the largest magnitude of its block, or of itself where there are no blocks.
ERROR_BOUNDS = {
    "f32": 0.0,
    "f16": 2**-11,
    "bf16": 2**-8,
    "fp8": 2**-4,
    "fp8_plain": 2**-4,
    "q8_0": 0.5 / 127 + 2**-11,
    "q5_1": 1 / 31 + 2**-10,  # half a step of (max - min) / 31, and max - min is up to twice the largest magnitude
    "q5_0": 1 / 16 + 2**-11,  # a whole step at the end of the range that has no code
    "q4_1": 1 / 15 + 2**-10,
    "q4_0": 1 / 8 + 2**-11,
    "q6_k": 1 / 16,  # from here on a search may cut off the ends: about two steps
    "q5_k": 1 / 8,
    "q4_k": 1 / 6,
    "q3_k": 1 / 3,
    "q2_k": 1 / 2,
    "iq4_xs": 1 / 6,
    "iq4_nl": 1 / 6,
}
SMALLEST_NORMAL = {"f16": 2**-14, "fp8": 2**-6, "fp8_plain": 2**-6}  # below it the steps no longer shrink
GGML = tuple(name for name, fmt in FORMATS.items() if fmt.block > 1)
REFERENCE = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # `pack` gives ggml's own bytes


def gaussian(rows: int, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.03


def ties() -> Tensor:
    """Blocks whose largest magnitude occurs with both signs, and values half way between two codes."""
    codes = torch.arange(-16, 16).float()
    rows = torch.stack([codes * 0.5, codes.flip(0) * 0.5, codes.sign() * 3.0, (codes + 0.5) / 8, codes / 127 * 8])
    return rows.repeat(1, 8)


INPUTS = {
    "gaussian": gaussian(64),
    "one row": gaussian(1),
    "odd rows": gaussian(17, 768),
    "zeros": torch.zeros(3, 512),
    "tiny": gaussian(5) * 1e-7,
    "below float16": gaussian(5) * 1e-25,
    "huge": gaussian(5) * 1e4,
    "beyond float16": gaussian(5) * 1e8,
    "negative": -gaussian(7).abs(),
    "positive": gaussian(7).abs() + 0.01,
    "constant": torch.full((2, 256), 0.37),
    "ties": ties(),
    "one outlier": torch.nn.functional.pad(gaussian(3, 255), (1, 0), value=-4.0),
}

formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
inputs = pytest.mark.parametrize("weight", INPUTS.values(), ids=[name.replace(" ", "-") for name in INPUTS])


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def dequantized(fmt: QuantFormat, weight: Tensor) -> Tensor:
    return fmt.unpack(*fmt.pack(weight))


@formats
@pytest.mark.parametrize("shape", [(1, 256), (5, 512), (17, 3072), (2, 3, 768)], ids=str)
def test_parts_are_what_the_row_says(fmt, shape):
    parts = fmt.pack(torch.randn(shape))
    assert fmt.fits(shape)
    assert [(p.dtype, tuple(p.shape)) for p in parts] == [(p.dtype, p.shape(shape)) for p in fmt.parts]
    assert sum(p.numel() * p.itemsize for p in parts) == fmt.nbytes(shape)
    assert fmt.parts[0].suffix == "weight"
    unpacked = fmt.unpack(*parts)
    assert unpacked.dtype == torch.float32 and unpacked.shape == shape


def test_bits_per_weight():
    bits = {name: fmt.bits_per_weight for name, fmt in FORMATS.items()}
    plain = {"f32": 32, "f16": 16, "bf16": 16, "fp8": 8, "fp8_plain": 8}
    legacy = {"q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5, "iq4_nl": 4.5}
    k_quants = {"q6_k": 6.5625, "q5_k": 5.5, "q4_k": 4.5, "q3_k": 3.4375, "q2_k": 2.625, "iq4_xs": 4.25}
    assert bits == plain | legacy | k_quants


@formats
def test_what_does_not_fit(fmt):
    assert fmt.fits((8, 33)) == fmt.fits((64,)) == fmt.fits(()) == (fmt.block == 1)


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_round_trip_error(fmt, dtype):
    weight = gaussian(64).to(dtype)
    error = (dequantized(fmt, weight) - weight.float()).abs()
    reference = weight.float().abs()
    if fmt.block > 1:
        error, reference = error.view(-1, fmt.block), reference.view(-1, fmt.block).amax(dim=1, keepdim=True)
    elif fmt.name in SMALLEST_NORMAL:
        scale = fmt.pack(weight)[1] if fmt.name == "fp8" else 1
        reference = reference.clamp(min=SMALLEST_NORMAL[fmt.name] * scale)
    assert (error <= ERROR_BOUNDS[fmt.name] * reference).all()


@formats
@pytest.mark.parametrize("magnitude", [1e-38, 1e-41, 1e-43])
def test_subnormal_weights_stay_finite(fmt, magnitude):
    values = dequantized(fmt, gaussian(4) * magnitude)
    assert values.abs().max() <= 1e-37


@formats
@inputs
def test_packing_the_unpacked_again_stays_near(fmt, weight):
    """Nothing drifts: a second round trip moves no value further than the first was allowed to."""
    if not torch.isfinite(dequantized(fmt, weight)).all():
        pytest.skip("outside the range of the format")
    once = dequantized(fmt, weight)
    twice = dequantized(fmt, once)
    assert (once - twice).abs().max() <= ERROR_BOUNDS[fmt.name] * once.abs().max()


@formats
def test_rows_are_independent(fmt):
    """Joining q, k and v along the rows commutes with packing; a format with one scale per tensor cannot promise it."""
    top, bottom = gaussian(3), gaussian(5) * 7
    if any(part.shape((8, 256)) == () for part in fmt.parts):
        pytest.skip("one scale for the whole tensor")
    pieces = zip(fmt.pack(top), fmt.pack(bottom), strict=True)
    for whole, piece in zip(fmt.pack(torch.cat([top, bottom])), pieces, strict=True):
        assert same_bytes(whole, torch.cat(piece))


@formats
def test_any_memory_layout(fmt):
    weight = gaussian(256, 512)
    for view in (weight[:, :256].T, weight[::2], weight[:, 256:]):
        assert torch.equal(dequantized(fmt, view), dequantized(fmt, view.contiguous()))
    stored = fmt.pack(weight)
    padded = torch.nn.functional.pad(stored[0].view(torch.uint8), (0, 16)).view(stored[0].dtype)
    strided = padded[:, : stored[0].shape[1]]
    assert torch.equal(fmt.unpack(strided, *stored[1:]), fmt.unpack(*stored))


@formats
def test_meta_device_gives_shapes(fmt):
    parts = fmt.pack(torch.empty(6, 256, device="meta"))
    assert fmt.unpack(*parts).shape == (6, 256)


@formats
def test_copies_share_the_row(fmt):
    assert copy.deepcopy(fmt) is fmt and pickle.loads(pickle.dumps(fmt)) is fmt


@pytest.mark.gpu
@formats
@inputs
def test_cuda_equals_cpu(fmt, weight):
    for here, there in zip(fmt.pack(weight), fmt.pack(weight.cuda()), strict=True):
        assert same_bytes(here, there.cpu())
    parts = fmt.pack(weight)
    there = fmt.unpack(*(part.cuda() for part in parts)).cpu()
    assert torch.equal(fmt.unpack(*parts).nan_to_num(1e9), there.nan_to_num(1e9))


@pytest.mark.parametrize("name", REFERENCE)
@inputs
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gguf_package_agrees(name, weight):
    """Same bytes as its quantizer (a port of ggml's reference), same values as its dequantizer."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name.upper()]
    (data,) = FORMATS[name].pack(weight)
    expected = gguf.quants.quantize(weight.numpy(), kind)
    assert np.array_equal(data.numpy(), expected)
    values = gguf.quants.dequantize(expected, kind)
    assert np.array_equal(FORMATS[name].unpack(data).numpy(), values, equal_nan=True)


@pytest.mark.parametrize("name", GGML)
@pytest.mark.parametrize("package", ["gguf", "libgguf"])
def test_other_packages_read_any_bytes_alike(name, package):
    """gguf is ggml's Python, libgguf ggml's own code."""
    judge = pytest.importorskip(package)
    fmt, kind = FORMATS[name], judge.GGMLQuantizationType[name.upper()]
    shape = fmt.parts[0].shape((64, 8 * fmt.block))
    data = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dequantize = judge.quants.dequantize if package == "gguf" else judge.dequantize_rows
    with np.errstate(all="ignore"):
        expected = dequantize(data.numpy(), kind)
    assert np.array_equal(fmt.unpack(data).numpy(), expected, equal_nan=True)
    assert (fmt.block, fmt.nbytes((1, fmt.block))) == judge.GGML_QUANT_SIZES[kind]


def e4m3fn(code: int) -> float:
    """The value of a byte by the definition of the format (OCP 8-bit floating point, E4M3)."""
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def test_all_fp8_codes():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = torch.tensor([e4m3fn(code) for code in range(256)])
    unpacked = FORMATS["fp8_plain"].unpack(codes)
    assert torch.equal(unpacked.nan_to_num(1e9), values.nan_to_num(1e9))
    finite = unpacked.isfinite()
    (again,) = FORMATS["fp8_plain"].pack(unpacked[finite])
    assert same_bytes(again, codes[finite])
    halves = FORMATS["fp8"].unpack(codes, torch.tensor(0.5))
    assert torch.equal(halves[finite], values[finite] / 2)


@pytest.mark.parametrize("value", [448.0, 464.0, 465.0, 1e30, float("inf")])
@pytest.mark.parametrize("sign", [1, -1])
def test_fp8_saturates(value, sign):
    weight = torch.tensor([[sign * value, 1.0]])
    assert dequantized(FORMATS["fp8_plain"], weight).tolist() == [[sign * 448.0, 1.0]]


def test_fp8_scale_uses_the_whole_range():
    for weight in (gaussian(9), gaussian(9) * 1e6, gaussian(9) * 1e-6):
        data, scale = FORMATS["fp8"].pack(weight)
        assert data.float().abs().max() == 448
        assert scale == weight.abs().max() / 448
    assert FORMATS["fp8"].pack(torch.zeros(2, 2))[1] == 1
