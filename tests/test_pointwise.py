"""The fused pointwise kernels against float64.

On CUDA the real compiler, elsewhere the interpreter (without bfloat16, in which it is wrong): see `kernel_device`.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flux_quant.kernels import fused

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, at 2^128, which is infinite

pointwise = fused.pointwise()

EPS = fused.EPS
GUARD = 5  # values before and after every row of an output, which must stay as they are
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}  # of one value, with float32 math before
SHAPES = [(1, 1, 1), (2, 3, 8), (1, 5, 72), (3, 2, 129), (1, 1, 3072), (2, 1, 4099)]  # (B, L, N)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest, kernel_device: str) -> torch.dtype:
    if request.param is torch.bfloat16 and kernel_device == "cpu":
        pytest.skip("the interpreter has no bfloat16")
    return request.param


@pytest.fixture
def random(dtype: torch.dtype, kernel_device: str):
    """random(*shape): normal values in `dtype`, the same in every run, wherever they are needed."""
    generator = torch.Generator().manual_seed(7)
    return lambda *shape: torch.randn(shape, generator=generator).to(kernel_device, dtype)


def spaced(x: Tensor) -> Tensor:
    """The values of x (B, L, N) as part of a wider tensor: gaps between rows and between batches."""
    batch, tokens, width = x.shape
    wide = x.new_full((batch, tokens + 2, width + 2 * GUARD), torch.nan)
    wide[:, 1:-1, GUARD:-GUARD] = x
    return wide[:, 1:-1, GUARD:-GUARD]


def poisoned(x: Tensor) -> tuple[Tensor, Tensor]:
    """(the whole, an output like x within it): the output is NaN, everything around it 77."""
    part = spaced(x)
    whole = part._base.fill_(77)
    part.fill_(torch.nan)
    return whole, part


def assert_close(got: Tensor, expected: Tensor, size: Tensor | float = 1.0) -> None:
    """got in its dtype against float64: off by its rounding of `size` (or of the value itself) at most."""
    assert got.shape == expected.shape
    error = (got.double() - expected).abs() / (expected.abs() + size)
    assert error.max() <= ROUNDING[got.dtype], error.max()


def assert_untouched(whole: Tensor, part: Tensor) -> None:
    """Every value of the output is written, nothing around it."""
    assert not part.isnan().any()
    part.fill_(77)
    assert (whole == 77).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steering", ["per sample", "for all"])
def test_modulated_norm(shape, steering, random):
    x, mod = 3 * random(*shape) + 1, random(shape[0] if steering == "per sample" else 1, 1, 3 * shape[2])
    shift, scale, _ = mod.chunk(3, dim=-1)
    whole, out = poisoned(x)
    pointwise.modulated_norm(spaced(x), shift, scale, EPS, out)
    expected = F.layer_norm(x.double(), shape[2:], eps=EPS) * (1 + scale.double()) + shift.double()
    assert_close(out, expected)
    assert_untouched(whole, out)


def test_norm_of_a_row_far_from_zero(random):
    """The mean is taken off before squares are summed: E[x^2] - E[x]^2 would lose all digits here."""
    x, zero = 1000 + random(1, 2, 320), random(1, 1, 320) * 0
    out = torch.empty_like(x)
    pointwise.modulated_norm(x, zero, zero, EPS, out)
    expected = F.layer_norm(x.double(), (320,), eps=EPS)
    assert (out.double() - expected).abs().max() < (1e-3 if x.dtype == torch.float32 else 3e-2)  # rounding of 4


def rotary(rows: int, channels: int, device: str) -> tuple[Tensor, Tensor]:
    angles = torch.linspace(-3, 50, rows * (channels // 2), device=device).view(rows, channels // 2)
    return angles.cos(), angles.sin()


def expected_heads(x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, L, H, C) -> the same in float64, by complex numbers: another way than the kernel's and the twin's."""
    x = x.double()
    x = x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * scale.double()
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turns = torch.complex(cos.double(), sin.double())[:, None]
    return torch.view_as_real(pairs * turns).flatten(-2)


@pytest.mark.parametrize(("heads", "channels"), [(1, 2), (3, 16), (2, 24), (9, 128), (24, 128)])
@pytest.mark.parametrize("copy_v", [True, False], ids=["joint", "single"])
def test_heads(heads, channels, copy_v, random, kernel_device):
    """Two streams into one tensor; what is rows 0 and 1 to the one is rows 2 to 4 to the other. Row 5 stays."""
    lengths, hidden = (2, 3), heads * channels
    cos, sin = rotary(sum(lengths) + 1, channels, kernel_device)
    streams = [random(2, length, 3 * hidden + 7) for length in lengths]
    scales = [[random(channels) for _ in range(2)] for _ in lengths]
    q, k, v = streams[0].new_full((3, 2, sum(lengths) + 1, heads, channels), torch.nan)
    first = 0
    for x, scale in zip(streams, scales, strict=True):
        x = x[..., 3 : 3 + 3 * hidden]
        pointwise.heads(x, scale, (cos, sin), first, EPS, q, k, v if copy_v else None)
        rows = slice(first, first + x.shape[1])
        expected_q, expected_k, expected_v = x.unflatten(-1, (3, heads, channels)).unbind(2)
        for got, raw, weight in ((q, expected_q, scale[0]), (k, expected_k, scale[1])):
            assert_close(got[:, rows], expected_heads(raw, weight, cos[rows], sin[rows]))
        assert torch.equal(v[:, rows], expected_v) if copy_v else v.isnan().all()
        first = rows.stop
        assert all(out[:, first:].isnan().all() for out in (q, k, v))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("place", ["elsewhere", "in place"])
def test_gelu(shape, place, random):
    x = 4 * random(*shape)
    whole, out = poisoned(x)
    if place == "in place":
        out.copy_(x)
    pointwise.gelu(out if place == "in place" else spaced(x), out)
    assert_close(out, F.gelu(x.double(), approximate="tanh"), x.double().abs())
    assert_untouched(whole, out)


@pytest.mark.parametrize("hidden", [1, 24, 130, 4100])
@pytest.mark.parametrize("place", ["elsewhere", "in place"])
def test_beside_gelu(hidden, place, random):
    y, mlp = random(2, 3, hidden), 4 * random(2, 3, 4 * hidden)
    whole, out = poisoned(torch.cat([y, mlp], dim=-1))
    if place == "in place":
        out[..., hidden:] = mlp
    pointwise.beside_gelu(spaced(y), out[..., hidden:] if place == "in place" else spaced(mlp), out)
    assert torch.equal(out[..., :hidden], y)
    assert_close(out[..., hidden:], F.gelu(mlp.double(), approximate="tanh"), mlp.double().abs())
    assert_untouched(whole, out)


def test_gelu_far_out(random, dtype):
    top = torch.finfo(dtype).max
    x = random(1, 1, 8)
    x[0, 0] = torch.tensor([0.0, -0.0, 20, -20, top, -top, torch.inf, torch.nan])
    out = torch.empty_like(x)
    pointwise.gelu(x, out)
    values = out[0, 0].tolist()
    assert values[:3] == [0, 0, 20] and values[4:7] == [top, 0, torch.inf] and abs(values[3]) < 1e-12
    assert values[7] != values[7]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("place", ["elsewhere", "x", "y"])
@pytest.mark.parametrize("steering", ["per sample", "for all"])
def test_gated_sum(shape, place, steering, random):
    x, y, mod = random(*shape), random(*shape), random(shape[0] if steering == "per sample" else 1, 1, 3 * shape[2])
    gate = mod.chunk(3, dim=-1)[2]
    whole, out = poisoned(x)
    source = {"x": spaced(x), "y": y.clone()}
    if place != "elsewhere":
        source[place] = out.copy_(source[place])
    pointwise.gated_sum(source["x"], gate, source["y"], out)
    assert_close(out, x.double() + gate.double() * y.double(), (x.abs() + (gate * y).abs()).double())
    assert_untouched(whole, out)


def test_no_rows(random):
    x, mod, q = random(2, 0, 16), random(2, 1, 16), random(2, 4, 2, 8)
    pointwise.modulated_norm(x, mod, mod, EPS, x)
    pointwise.gelu(x, x)
    pointwise.beside_gelu(x[..., :5], x[..., 5:], x)
    pointwise.gated_sum(x, mod, x, x)
    before = q.clone()
    pointwise.heads(random(2, 0, 48), (q[0, 0, 0], q[0, 0, 1]), rotary(4, 8, x.device), 4, EPS, q, q, None)
    assert torch.equal(q, before)


WRONG = {
    "shapes differ": lambda t: pointwise.gelu(t(1, 2, 8), t(1, 2, 9)),
    "no batch": lambda t: pointwise.gelu(t(2, 8), t(2, 8)),
    "gaps in a row": lambda t: pointwise.gelu(t(1, 2, 16)[..., ::2], t(1, 2, 8)),
    "shift of another width": lambda t: pointwise.modulated_norm(t(1, 2, 8), t(1, 1, 9), t(1, 1, 8), EPS, t(1, 2, 8)),
    "no room for both": lambda t: pointwise.beside_gelu(t(1, 2, 8), t(1, 2, 32), t(1, 2, 41)),
    "copy into another dtype": lambda t: pointwise.beside_gelu(t(1, 2, 8).half(), t(1, 2, 32), t(1, 2, 40)),
    "gate of another batch": lambda t: pointwise.gated_sum(t(3, 2, 8), t(2, 1, 8), t(3, 2, 8), t(3, 2, 8)),
    "odd head": lambda t: heads_call(t, channels=7),
    "q too short": lambda t: heads_call(t, first=3),
    "q, k of different layout": lambda t: heads_call(t, k=t(2, 5, 8, 2).transpose(2, 3)),
    "too few angles": lambda t: heads_call(t, angles=4, first=2),
    "angles in another dtype": lambda t: heads_call(t, angle_dtype=torch.float64),
    "scale of another head": lambda t: heads_call(t, scale=t(16)),
}


def heads_call(t, channels=8, first=0, k=None, angles=5, angle_dtype=torch.float32, scale=None):
    q = t(2, 5, 2, channels)
    cos, sin = (angle.to(angle_dtype) for angle in rotary(angles, channels, q.device))
    scale = t(channels) if scale is None else scale
    pointwise.heads(t(2, 3, 6 * channels), (scale, scale), (cos, sin), first, EPS, q, q if k is None else k, None)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name, kernel_device):
    with pytest.raises(ValueError, match=r"\d"):
        WRONG[name](lambda *shape: torch.zeros(shape, device=kernel_device))
