"""8-bit integer products: rows of codes, accumulators, expansion of packed weights; torch and Triton."""

import numpy as np
import pytest
import torch
from torch import Tensor

from flux_quant.codecs.int8 import quantize_rows, unpack_rows
from flux_quant.codecs.planar import FIELDS, to_planar
from flux_quant.formats import FORMATS
from flux_quant.kernels import int8_torch

ROWS = (0, 1, 2, 7, 16, 17, 33)
BLOCKS = [name for name, fmt in FORMATS.items() if fmt.block > 1]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def integers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def accumulators(a: Tensor, w: Tensor) -> np.ndarray:
    return a.cpu().numpy().astype(np.int64) @ w.cpu().numpy().astype(np.int64).T


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


STRANGE = {"zero": 0.0, "tiny": 1e-35, "large": 3e38}
LOST = {"nan": torch.nan, "infinite": torch.inf, "minus infinite": -torch.inf}


def strange_rows() -> Tensor:
    """Ordinary rows with, between them, a row of each strange value and a row with one lost value."""
    x = random(2 * (len(STRANGE) + len(LOST)) + 1, 256)
    for i, value in enumerate((*STRANGE.values(), *LOST.values())):
        x[2 * i + 1, 3 if i >= len(STRANGE) else slice(None)] = value
    return x


def check_strange_rows(codes: Tensor, scale: Tensor) -> None:
    """Of strange_rows without rotation: only the rows with lost values are lost, and they show."""
    codes, scale = codes.cpu(), scale.cpu()
    lost = torch.zeros(len(scale), dtype=torch.bool)
    lost[2 * len(STRANGE) + 1 :: 2] = True
    assert torch.equal(scale[:, 0].isnan(), lost)
    expected_codes, expected_scale = quantize_rows(random(*codes.shape), 1)
    assert torch.equal(codes[::2], expected_codes[::2]) and torch.equal(scale[::2], expected_scale[::2])
    assert codes[1].eq(0).all() and codes[3].eq(0).all() and codes[5].eq(127).all()
    w, w_scale = integers(8, 256), torch.ones(8)
    y = int8_torch.int_mm(codes, scale, w, w_scale, None, torch.float32)
    assert torch.equal(y.isnan().all(dim=1), lost) and torch.equal(y.isnan().any(dim=1), lost)
    assert y[1].abs().max() < 1e-20


def test_strange_rows():
    check_strange_rows(*quantize_rows(strange_rows(), 1))


@pytest.mark.parametrize("columns", [1, 40, 136])
@pytest.mark.parametrize("rows", ROWS)
def test_int_mm_accumulates_exactly(rows, columns, monkeypatch):
    monkeypatch.setattr(int8_torch, "SLICE_BYTES", 4 * 33 * 16)  # several slices of columns
    for channels in (32, 96, 1024):
        a, w = integers(rows, channels), integers(columns, channels)
        y = int8_torch.int_mm(a, torch.ones(rows, 1), w, torch.ones(columns), None, torch.float32)
        assert np.array_equal(y.numpy(), accumulators(a, w))  # below 2**24, so float32 holds them


def test_int_mm_at_the_limit_of_int32():
    channels = int8_torch.LONGEST
    a, w = torch.full((2, channels), 127, dtype=torch.int8), torch.full((3, channels), -127, dtype=torch.int8)
    y = int8_torch.int_mm(a, torch.ones(2, 1), w, torch.ones(3), None, torch.float32)
    assert torch.equal(y, torch.full((2, 3), -float(channels * 127**2)))
    longer = torch.zeros(2, channels + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="overflow int32"):
        int8_torch.int_mm(longer, torch.ones(2, 1), longer, torch.ones(2), None, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_epilogue(dtype):
    a, w, a_scale, w_scale, bias = integers(7, 96), integers(24, 96), random(7, 1) / 1e4, random(24), random(24, seed=1)
    y = int8_torch.int_mm(a, a_scale, w, w_scale, bias.to(dtype), dtype)
    expected = torch.from_numpy(accumulators(a, w)) * a_scale.double() * w_scale.double() + bias.to(dtype).double()
    assert y.dtype == dtype and relative(y, expected) < torch.finfo(dtype).eps


OBSTACLES = [  # way, compute capability, rows, columns, channels -> words of the reason
    ("int_mm", None, 1, 3, 5, None),
    ("int_mm", (7, 5), 1, 8, 8, None),
    ("int_mm", (6, 1), 64, 8, 8, "7.5"),
    ("int_mm", (8, 0), 64, 12, 8, "12 x 8"),
    ("int_mm", (8, 0), 64, 8, 12, "8 x 12"),
    ("int_mm", (9, 0), 64, 8, 133_160, "at most 133144"),
    ("triton", (8, 0), 1, 3, 32, None),
    ("triton", (12, 0), 4608, 3072, 3072, None),
    ("triton", (7, 5), 64, 64, 64, "8.0"),
    ("triton", None, 64, 64, 64, "8.0"),
    ("triton", (9, 0), 64, 64, 40, "multiple of 16"),
    ("tma", (9, 0), 1, 3, 32, None),
    ("tma", (8, 9), 64, 64, 64, "9.0 to 9.x"),
    ("tma", (10, 0), 64, 64, 64, "9.0 to 9.x"),
    ("tma", (9, 0), 64, 64, 40, "multiple of 16"),
]


@pytest.mark.parametrize(("way", "capability", "rows", "columns", "channels", "words"), OBSTACLES)
def test_obstacles(way, capability, rows, columns, channels, words):
    reason = int8_torch.obstacle(way, capability, rows, columns, channels)
    assert reason is None if words is None else words in reason


def test_operands_are_checked():
    good = integers(5, 32), torch.ones(5, 1), integers(8, 32), torch.ones(8), torch.ones(8)
    wrong = [
        (0, integers(5, 64), r"\(5, 64\)"),
        (0, random(5, 32), "int8"),
        (1, torch.ones(5), r"a_scale must be float32 \(5, 1\)"),
        (3, torch.ones(8, dtype=torch.float16), "w_scale"),
        (4, torch.ones(5), "bias of 8"),
        (2, torch.empty(8, 32, dtype=torch.int8, device="meta"), "meta"),
    ]
    for place, tensor, words in wrong:
        operands = [tensor if i == place else other for i, other in enumerate(good)]
        with pytest.raises(ValueError, match=words):
            int8_torch.int_mm(*operands, torch.float32)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_weights_of_every_format(fmt, monkeypatch):
    parts = fmt.pack(random(21, 512) / 20)
    codes, scale = int8_torch.weight_rows(fmt, parts, 256)
    weight = fmt.unpack(*parts)
    assert codes.shape == (21, 512) and codes.dtype == torch.int8 and scale.shape == (21,)
    assert relative(unpack_rows(codes, scale, 256), weight) < 0.01
    assert (int8_torch.codes_for(weight, scale, 256) != codes).float().mean() < 1e-3  # ties of the division
    monkeypatch.setattr(int8_torch, "SLICE_BYTES", 5 * 512 * 4)
    sliced = int8_torch.weight_rows(fmt, parts, 256)
    assert torch.equal(sliced[0], codes) and torch.equal(sliced[1], scale)
    empty = int8_torch.weight_rows(fmt, [part[:0] if part.ndim else part for part in parts], 256)
    assert empty[0].shape == (0, 512) and empty[1].shape == (0,)


def product(x: Tensor, w: Tensor, group: int) -> Tensor:
    return int8_torch.int_mm(
        *quantize_rows(x, group),
        *int8_torch.weight_rows(FORMATS["f32"], (w,), group),
        None,
        torch.float32,
    )


def test_an_outlier_channel_spoils_the_others_unless_rotated():
    """One channel at 60 times the others, whose weights are zero: what the others lose is all the error there is."""
    x, w = random(64, 3072), random(96, 3072)
    w[:, 1000] = 0
    calm = {group: relative(product(x, w, group), x @ w.t()) for group in (0, 64, 256)}
    assert all(error < 0.014 for error in calm.values())
    x[:, 1000] *= 60
    rough = {group: relative(product(x, w, group), x @ w.t()) for group in (0, 64, 256)}
    assert rough[0] > 8 * calm[0]
    assert rough[64] < 3 * calm[64] and rough[256] < 2 * calm[256]


# Triton: in the interpreter without a CUDA device


def nearly_equal_codes(found: Tensor, expected: Tensor) -> None:
    """Sums and products in another order: a code may fall on the other side of a half, rarely."""
    apart = (found.cpu().int() - expected.cpu().int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 1e-3


@pytest.mark.parametrize("group", [0, 16, 256])
@pytest.mark.parametrize("channels", [256, 768, 1280, 1536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_rows(dtype, channels, group, kernel_device):
    from flux_quant.kernels import rows8

    x = random(5, channels).to(dtype)
    x[2] *= 100
    codes, scale = rows8.quantize_rows(x.to(kernel_device), group)
    expected_codes, expected_scale = quantize_rows(x, group)
    nearly_equal_codes(codes, expected_codes)
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=1e-6, atol=0)


def test_triton_rows_of_any_length_and_place(kernel_device):
    from flux_quant.kernels import rows8

    wide = random(7, 200).to(kernel_device)
    for x in (wide[:, 3:99], wide[1::2, 8:72], wide.t()[:64].t()[:, :48], wide[:0], wide[:, :7]):
        codes, scale = rows8.quantize_rows(x, 0)
        expected = quantize_rows(x.cpu(), 0)
        assert codes.shape == x.shape and scale.shape == (len(x), 1)
        assert torch.equal(codes.cpu(), expected[0])
        torch.testing.assert_close(scale.cpu(), expected[1], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="100 channels"):
        rows8.quantize_rows(wide[:, :100], 64)
    with pytest.raises(ValueError, match="70000 channels"):
        rows8.quantize_rows(torch.empty(1, 70_000), 0)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_triton_strange_rows(kernel_device):
    from flux_quant.kernels import rows8

    check_strange_rows(*rows8.quantize_rows(strange_rows().to(kernel_device), 1))


def small_configs() -> list:
    from flux_quant.kernels.int8 import Config

    return [Config(16, 16, 32, 1, 2), Config(16, 32, 64, 2, 3), Config(32, 64, 128, 4, 3)]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("rows", ROWS)
def test_triton_accumulates_exactly(rows, number, kernel_device):
    from flux_quant.kernels import int8

    for columns, channels in ((1, 32), (40, 96), (33, 224), (72, 1024)):
        a, w = integers(rows, channels), integers(columns, channels)
        operands = a, torch.ones(rows, 1), w, torch.ones(columns)
        operands = [tensor.to(kernel_device) for tensor in operands]
        y = int8.int8_matmul(*operands, None, torch.float32, small_configs()[number])
        assert np.array_equal(y.cpu().numpy(), accumulators(a, w))


@pytest.mark.parametrize("programs", [1, 3, 100])
@pytest.mark.parametrize("rows", ROWS)
def test_triton_programs_that_stay(rows, programs, kernel_device):
    from flux_quant.kernels import int8, int8_tma

    if kernel_device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("compute capability 9.0 only")
    config = int8.Config(16, 32, 64, 1, 2) if kernel_device == "cpu" else int8_tma.CONFIGS[-1]
    for columns, channels in ((16, 32), (40, 96), (33, 224)):
        wide = integers(rows, channels + 8).to(kernel_device)
        operands = wide[:, 3:][:, :channels], torch.ones(rows, 1), integers(columns, channels), torch.ones(columns)
        operands = [tensor.to(kernel_device) for tensor in operands]
        y = int8_tma.int8_matmul_tma(*operands, None, torch.float32, config, programs)
        assert np.array_equal(y.cpu().numpy(), accumulators(operands[0], operands[2]))


def test_triton_order_of_tiles(kernel_device):
    """More tiles than a group is high, in both directions."""
    from flux_quant.kernels import int8

    a, w = integers(16 * (int8.GROUP_M + 3), 32), integers(16 * 5, 32)
    operands = [t.to(kernel_device) for t in (a, torch.ones(len(a), 1), w, torch.ones(len(w)))]
    y = int8.int8_matmul(*operands, None, torch.float32, int8.Config(16, 16, 32, 1, 2))
    assert np.array_equal(y.cpu().numpy(), accumulators(a, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_triton_epilogues(biased, dtype, kernel_device):
    from flux_quant.kernels import int8

    wide = integers(18, 128).to(kernel_device)
    a, w = wide[::2, 32:], integers(48, 96).to(kernel_device)  # rows of a lie apart
    a_scale, w_scale, bias = (
        t.to(kernel_device) for t in (random(9, 1) / 1e4, random(48), random(48, seed=1).to(dtype))
    )
    operands = a, a_scale, w, w_scale, bias if biased else None, dtype
    expected = int8_torch.int_mm(*(t.cpu() if isinstance(t, Tensor) else t for t in operands))
    for y in (int8.int8_matmul(*operands), int8_torch.int_mm(*operands, finish=int8.finish)):
        assert y.dtype == dtype and relative(y.cpu(), expected) < torch.finfo(dtype).eps


def test_triton_configs():
    pytest.importorskip("triton")
    from flux_quant.kernels import int8

    limits = {(8, 0): 163 << 10, (8, 6): 99 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (12, 0): 99 << 10}
    assert set(int8.CONFIGS) == set(limits)
    for capability, configs in int8.CONFIGS.items():
        assert len(set(configs)) == len(configs) <= 8
        assert all(config.shared_bytes <= limits[capability] for config in configs)
        for rows in (1, 16, 77, 512, 4608):
            assert int8.configs_for(capability, rows)
    from flux_quant.kernels import int8_tma

    assert all(config.shared_bytes <= limits[9, 0] for config in int8_tma.CONFIGS)
    assert {config.bm for config in int8.configs_for((8, 9), 5)} == {16}
    assert int8.configs_for((8, 9), 4608) == int8.CONFIGS[8, 6]


@pytest.mark.parametrize("name", BLOCKS)
def test_triton_expands_every_format(name, kernel_device):
    from flux_quant.kernels import expand8
    from flux_quant.kernels.planes import Rows

    fmt = FORMATS[name]
    for rows, columns, group in ((7, 1280, 256), (3, 320, 64), (3, 256, 0)):
        if columns % fmt.block:
            continue
        parts = fmt.pack(random(rows, columns) / 20)
        codes, scale = int8_torch.weight_rows(fmt, parts, group)
        for planar in (False, True) if name in FIELDS else (False,):
            data = to_planar(name, parts[0]) if planar else parts[0]
            guarded = torch.full((rows, columns), 99, dtype=torch.int8, device=kernel_device)
            out = guarded[: rows - 1]
            place = data.to(kernel_device), Rows(name, columns, planar), scale.to(kernel_device)
            expand8.expand(*place, group, out[: rows - 2], first_row=1)
            nearly_equal_codes(out[: rows - 2], codes[1 : rows - 1])
            assert guarded[rows - 2 :].eq(99).all()


def test_triton_expansion_is_checked(kernel_device):
    from flux_quant.kernels import expand8
    from flux_quant.kernels.planes import Rows

    data, scale, rows = torch.zeros(4, 144, dtype=torch.uint8), torch.ones(4), Rows("q4_k", 256)
    out = torch.zeros(4, 256, dtype=torch.int8)
    for place, words in (
        ((data, rows, scale, 256, out, 1), "rows 1 to 5"),
        ((data[:, :100], rows, scale, 256, out), "144 bytes"),
        ((data, rows, scale[:3], 256, out), "scales of 4 rows"),
        ((data, rows, scale, 100, out), "rotation group 100"),
    ):
        with pytest.raises(ValueError, match=words):
            expand8.expand(*place)


@pytest.mark.gpu
def test_on_the_device():
    """Every configuration at FLUX's sizes, in bfloat16, against torch._int_mm."""
    from flux_quant.kernels import int8, int8_tma, rows8

    capability = torch.cuda.get_device_capability()
    for rows, columns, channels in ((16, 3072, 3072), (77, 9216, 3072), (512, 3072, 15360), (4608, 3072, 3072)):
        x, w, bias = (
            t.to("cuda", torch.bfloat16) for t in (random(rows, channels), random(columns, channels), random(columns))
        )
        codes, scale = rows8.quantize_rows(x, 256)
        expected_codes, expected_scale = quantize_rows(x, 256)
        nearly_equal_codes(codes, expected_codes)
        torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
        weight = int8_torch.weight_rows(FORMATS["bf16"], (w,), 256)
        ones = torch.ones_like(scale), weight[0], torch.ones_like(weight[1])
        exact = int8_torch.int_mm(codes, *ones, None, torch.float32)
        dense = torch.nn.functional.linear(x.float(), w.float(), bias.float())
        y = int8_torch.int_mm(codes, scale, *weight, bias, torch.bfloat16, finish=int8.finish)
        assert relative(y, dense) < 0.02
        ways = {"triton": (int8.int8_matmul, int8.configs_for(capability, rows))}
        ways |= {"tma": (int8_tma.int8_matmul_tma, int8_tma.CONFIGS)}
        for way, (multiply, configs) in ways.items():
            if int8_torch.obstacle(way, capability, rows, columns, channels):
                continue
            for config in configs:
                assert torch.equal(multiply(codes, *ones, None, torch.float32, config), exact)
                assert relative(multiply(codes, scale, *weight, bias, torch.bfloat16, config), dense) < 0.02
