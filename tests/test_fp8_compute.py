"""FP8 products: codes and scales, torch._scaled_mm against its emulation, the probe."""

import pytest
import torch
from torch import Tensor

from flux_quant.formats import FORMATS
from flux_quant.kernels import fp8, int8_torch

ways = pytest.mark.parametrize("way", fp8.WAYS)
VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # of the codes from 0 up, no NaN


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def order(codes: Tensor) -> Tensor:
    """Codes as integers in the order of their values."""
    bits = codes.cpu().view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


@ways
def test_codes_are_the_nearest_values(way):
    x = random(17, 96) * torch.logspace(-3, 3, 17)[:, None]
    codes, scale = fp8.quantize(x, way)
    assert scale.shape == ((17, 1) if way == "row" else ())
    largest = x.abs().amax(dim=1, keepdim=True) if way == "row" else x.abs().amax()
    torch.testing.assert_close(scale, largest / 448)
    wanted = (x / scale).abs()
    nearest = (wanted[..., None] - VALUES).abs().amin(dim=-1)
    assert torch.equal((codes.float().abs() - wanted).abs(), nearest)
    assert torch.equal(codes.float().sign() * x.sign() < 0, torch.zeros(17, 96, dtype=torch.bool))


def test_lost_rows_show():
    x = random(5, 32)
    x[1, 3], x[3, 7], x[4] = torch.nan, torch.inf, 0
    w, w_scale = fp8.quantize(random(16, 32), "row")
    y = fp8.emulate(*fp8.quantize(x, "row"), w, w_scale, None, torch.float32)
    assert y.isnan().all(dim=1).tolist() == y.isnan().any(dim=1).tolist() == [False, True, False, True, False]
    assert y[4].eq(0).all()
    assert fp8.quantize(x, "tensor")[1].isnan()
    assert fp8.quantize(x[2:3] * 1e9, "tensor", torch.ones(()))[0].float().abs().max() == 448
    assert fp8.quantize(x, "tensor", torch.ones(()))[0].float().isnan().nonzero().tolist() == [[1, 3]]


@ways
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_weights_of_every_format(fmt, way, monkeypatch):
    parts = fmt.pack(random(48, 256) / 20)
    weight = fmt.unpack(*parts)
    codes, scale = fp8.fp8_rows(fmt, parts, way)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == ((48,) if way == "row" else ())
    error = relative(codes.float() * scale.reshape(-1, 1), weight)
    if fmt.name.startswith("fp8"):
        assert codes is parts[0] and error == 0
    else:
        assert error < 0.03
    monkeypatch.setattr(int8_torch, "SLICE_BYTES", 5 * 256 * 4)
    sliced = fp8.fp8_rows(fmt, parts, way)
    assert torch.equal(sliced[0].view(torch.uint8), codes.view(torch.uint8)) and torch.equal(sliced[1], scale)


def operands(rows: int, way: str, columns: int = 48, channels: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, its scale, bias."""
    w = random(columns, channels) * torch.logspace(-1, 1, columns)[:, None]
    return random(rows, channels), *fp8.fp8_rows(FORMATS["f32"], (w,), way), random(columns)


@ways
def test_emulation_against_float64(way):
    x, w, w_scale, bias = operands(7, way)
    codes, scale = fp8.quantize(x, way)
    exact = (codes.double() * scale) @ (w.double() * w_scale.reshape(-1, 1)).t() + bias
    assert relative(fp8.emulate(codes, scale, w, w_scale, bias, torch.float32), exact) < 1e-6
    assert relative(exact, x.double() @ (w.double() * w_scale.reshape(-1, 1)).t() + bias) < 0.03


def offered(way: str, device: str, dtype: torch.dtype) -> None:
    if way not in fp8.fp8_ways(device, dtype):
        pytest.skip(f"torch {torch.__version__} has no product by {way} in {dtype} on {device}")


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 16, 17, 33])
def test_products_on_the_cpu(rows, dtype, way):
    offered(way, "cpu", dtype)
    x, w, w_scale, bias = operands(rows, way)
    for b in (None, bias.to(dtype)):
        y = fp8.fp8_linear(x.to(dtype), w, w_scale, b, dtype, way)
        assert y.shape == (rows, 48) and y.dtype == dtype
        if rows:
            expected = fp8.emulate(*fp8.quantize(x.to(dtype), way), w, w_scale, b, torch.float32)
            assert relative(y, expected) < 2 * torch.finfo(dtype).eps


def test_static_and_shared_scales_on_the_cpu():
    offered("tensor", "cpu", torch.float32)
    x, w, w_scale, bias = operands(7, "tensor")
    static = torch.tensor(0.5)
    y = fp8.fp8_linear(1000 * x, w, w_scale, bias, torch.float32, "tensor", input_scale=static)
    codes = (2000 * x).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert relative(y, fp8.emulate(codes, static, w, w_scale, bias, torch.float32)) < 1e-6
    offered("row", "cpu", torch.float32)
    y = fp8.fp8_linear(x, w, w_scale, None, torch.float32, "row")  # one scale for all rows of the weight
    assert relative(y, fp8.emulate(*fp8.quantize(x, "row"), w, w_scale, None, torch.float32)) < 1e-6


def test_operands_are_checked():
    x, w, w_scale, bias = operands(3, "row")
    one = torch.ones(())
    for wrong, words in (
        ((x, w, w_scale, bias, torch.float32, "block"), "use one of tensor, row"),
        ((x[:, :32], w, w_scale, bias, torch.float32, "row"), r"\(3, 32\)"),
        ((x, w.float(), w_scale, bias, torch.float32, "row"), "float8_e4m3fn"),
        ((x, w[:40], w_scale[:40], None, torch.float32, "row"), "multiples of 16; the weight is 40 x 64"),
        ((x, w, w_scale, bias, torch.float32, "tensor"), "requantize it"),
        ((x, w, w_scale.half(), bias, torch.float32, "row"), "float16"),
        ((x, w, w_scale, bias[:5], torch.float32, "row"), "bias of 48"),
        ((x, w, w_scale, bias, torch.float32, "row", one), "static scale"),
        ((x, w, one, bias, torch.float32, "tensor", w_scale), "static scale"),
        ((x, w, one, bias, torch.float32, "tensor", one.half()), "one float32"),
        ((x, w, w_scale, bias.to("meta"), torch.float32, "row"), "bias is on meta"),
    ):
        with pytest.raises(ValueError, match=words):
            fp8.fp8_linear(*wrong)


@pytest.fixture
def fresh_probe():
    fp8.works.cache_clear()
    yield
    fp8.works.cache_clear()


@pytest.mark.usefixtures("fresh_probe")
def test_probe(monkeypatch):
    """Only what runs and is right is offered, and it is tried once."""
    calls = []

    def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor, **how: object) -> Tensor:
        calls.append(scale_a.shape)
        return (a.float() * scale_a @ (b.float() * scale_b) + bias).to(how["out_dtype"])

    def no_rows(a: Tensor, b: Tensor, scale_a: Tensor, **how: object) -> Tensor:
        if scale_a.numel() > 1:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return product(a, b, scale_a, **how)

    def wrong_rows(a: Tensor, b: Tensor, scale_a: Tensor, **how: object) -> Tensor:
        return product(a, b, scale_a.flip(0), **how)

    def no_bias(a: Tensor, b: Tensor, bias: Tensor, **how: object) -> Tensor:
        return product(a, b, bias=torch.zeros_like(bias), **how)

    def lost(*operands: Tensor, **how: object) -> Tensor:
        return product(*operands, **how) * torch.nan

    for replacement, expected in (
        (product, ("tensor", "row")),
        (no_rows, ("tensor",)),
        (wrong_rows, ("tensor",)),
        (no_bias, ()),
        (lost, ()),
    ):
        fp8.works.cache_clear()
        monkeypatch.setattr(torch, "_scaled_mm", replacement)
        assert fp8.fp8_ways("cpu") == expected, replacement.__name__
        tried = len(calls)
        assert fp8.fp8_ways("cpu") == expected and len(calls) == tried


@pytest.mark.usefixtures("fresh_probe")
def test_probe_of_cards_without_fp8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert fp8.fp8_ways("cuda") == ()


@ways
def test_triton_codes(way, kernel_device):
    """Of values that e4m3 holds: the interpreter of Triton 3.6 does not round to it as GPUs do."""
    from flux_quant.kernels import rows8

    for columns in (256, 768, 200):
        picks = torch.randint(0, 127, (5, columns), generator=torch.Generator().manual_seed(columns))
        picks[:, 3] = 126  # the largest
        sizes = 2.0 ** (torch.arange(5.0)[:, None] if way == "row" else torch.full((5, 1), -3.0))
        x = VALUES[picks] * random(5, columns).sign() * sizes
        codes, scale = rows8.quantize_fp8(x.to(kernel_device), way)
        assert torch.equal(scale.cpu(), sizes if way == "row" else sizes[0, 0])
        assert torch.equal(codes.cpu().float() * sizes, x)
        assert rows8.quantize_fp8(x[:0].to(kernel_device), way)[0].shape == (0, columns)
    static = torch.tensor(0.0625, device=kernel_device)
    codes, scale = rows8.quantize_fp8(x.to(kernel_device), "tensor", static)
    assert scale is static and torch.equal(codes.cpu().float(), (x * 16).clamp(-448, 448))


def check_rounding(way: str, device: str, apart: float) -> None:
    """No code is further off than one; at most this share of them is off at all."""
    from flux_quant.kernels import rows8

    for dtype in (torch.float32, torch.bfloat16):
        x = (random(65, 3072) * torch.logspace(-2, 2, 65)[:, None]).to(device, dtype)
        x[3, 5] = torch.nan if way == "row" else 0
        expected_codes, expected_scale = fp8.quantize(x, way)
        codes, scale = rows8.quantize_fp8(x, way)
        torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0, equal_nan=True)
        sound = scale.isfinite().expand(65, 1).flatten()
        off = (order(codes[sound]) - order(expected_codes[sound])).abs()
        assert off.max() <= 1 and off.float().mean() < apart


@pytest.mark.gpu
@ways
def test_rounding_on_the_device(way):
    """Ada's code goes through float16 cut towards zero, by which ties are made: 0.6 % of these codes."""
    check_rounding(way, "cuda", 8e-3 if torch.cuda.get_device_capability() == (8, 9) else 1e-3)


@ways
def test_rounding_but_for_the_conversion(way, monkeypatch):
    """The interpreter's own conversion to e4m3 loses what is carried into the exponent: torch's in its place."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted here")
    convert = interpreter._convert_float

    def converted(values, source, target, rounding):
        if str(target) != "fp8e4nv":
            return convert(values, source, target, rounding)
        codes = torch.from_numpy(values.copy()).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", converted)
    check_rounding(way, "cpu", 1e-3)


@pytest.mark.gpu
@ways
def test_on_the_device(way):
    from flux_quant.kernels import rows8

    offered(way, "cuda", torch.bfloat16)
    for rows, columns, channels in ((1, 3072, 3072), (77, 9216, 3072), (4608, 3072, 15360)):
        x, weight, bias = random(rows, channels), random(columns, channels), random(columns)
        x, weight, bias = (tensor.to("cuda", torch.bfloat16) for tensor in (x, weight, bias))
        w, w_scale = fp8.fp8_rows(FORMATS["bf16"], (weight,), way)
        y = fp8.fp8_linear(x, w, w_scale, bias, torch.bfloat16, way, quantizer=rows8.quantize_fp8)
        expected = fp8.emulate(*fp8.quantize(x, way), w, w_scale, bias, torch.float32)
        # Hopper's tensor cores cut FP8 sums to 13 bits behind the point every 32 channels: 1.2 % of 15360 channels.
        assert relative(y, expected) < 0.005 + 1e-6 * channels
        exact = fp8.fp8_linear(x, w, w_scale, bias, torch.bfloat16, way, quantizer=rows8.quantize_fp8, fast=False)
        assert relative(exact, expected) < 0.006
        assert relative(y, torch.nn.functional.linear(x.float(), weight.float(), bias.float())) < 0.05
