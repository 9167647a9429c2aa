"""Linear layers in one kernel, `matmul` and `vector`, against float64 products with the codec's weights.

On CUDA the real compiler, elsewhere the interpreter (without bfloat16, in which it is wrong): see `kernel_device`.
"""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from blocks import HALVES, hard_blocks
from flux_quant.codecs import planar
from flux_quant.formats import FORMATS

pytest.importorskip("triton")

from flux_quant.kernels import matmul, vector  # noqa: E402 - needs triton
from flux_quant.kernels.planes import LAYOUTS, Rows  # noqa: E402
from flux_quant.kernels.products import parts_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, where float16 ends

WORST = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 2e-5}  # relative Frobenius errors
DTYPES = {matmul: [torch.float16, torch.bfloat16], vector: [torch.float32, torch.float16, torch.bfloat16]}
ORDERS = [(name, order) for name in LAYOUTS for order in ["native"] + ["planar"] * (name in planar.FIELDS)]
SMALL = {matmul: matmul.CONFIGS[0], vector: vector.CONFIGS[1]}
CARDS = [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)]
LARGEST_SCALE = {"q6_k": 128, "q5_k": 63, "q4_k": 63, "q3_k": 32, "q2_k": 15, "iq4_xs": 32}  # integer scales of a group
GUARD = 64

orders = pytest.mark.parametrize(("name", "order"), ORDERS, ids=[f"{name}-{order}" for name, order in ORDERS])
kernels = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [(kernel, dtype) for kernel, dtypes in DTYPES.items() for dtype in dtypes],
    ids=lambda value: value.__name__.rsplit(".")[-1] if isinstance(value, ModuleType) else str(value)[6:],
)


@pytest.fixture(autouse=True)
def without_bfloat16(request: pytest.FixtureRequest, kernel_device: str) -> None:
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if kernel_device == "cpu" and values.get("dtype") is torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")


def columns_of(name: str, supers: int) -> int:
    """K of `supers` blocks of 256; for formats of 32 an odd number of blocks."""
    return 256 * supers if FORMATS[name].block == 256 else 32 * (2 * supers + 1)


def sound_blocks(name: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random codes and integer scales; scales of a block in size like those of a trained weight, some negative."""
    data = hard_blocks(name, rows, columns, seed)
    fmt = FORMATS[name]
    blocks = data.view(-1, fmt.parts[0].shape((fmt.block,))[0])
    generator = torch.Generator().manual_seed(seed)
    for offset in HALVES[name]:
        sizes = torch.randn(len(blocks), 1, generator=generator) / 1000
        blocks[:, offset : offset + 2] = sizes.half().view(torch.uint8).view(-1, 2)
    return data


def strided(m: int, k: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """(m, k) whose rows are further apart than k."""
    wide = torch.randn(m, k + 24, generator=torch.Generator().manual_seed(seed))
    return wide.to(device, dtype)[:, 8 : 8 + k]


def run(kernel: ModuleType, x: Tensor, data: Tensor, rows: Rows, bias: Tensor | None, **options: object) -> Tensor:
    """Into the middle of a larger tensor full of 77, itself full of NaN: it must be written, all else not."""
    m, n = len(x), len(data)
    whole = torch.full((m + 2, n + GUARD), 77, dtype=x.dtype, device=x.device)
    out = whole[1 : m + 1, :n]
    out.fill_(torch.nan)
    y = kernel.linear(x, data, rows, bias, out=out, **{"config": SMALL[kernel], **options})
    assert y is out
    result = out.clone()
    out.fill_(77)
    assert (whole == 77).all()
    return result


def assert_close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    expected = x.double().cpu() @ weight.double().T + (0 if bias is None else bias.double().cpu())
    assert (y.double().cpu() - expected).norm() <= WORST[x.dtype] * expected.norm()


@orders
@kernels
def test_every_format(kernel, dtype, name, order, kernel_device):
    columns = columns_of(name, 1)
    data = sound_blocks(name, 9, columns)
    stored = planar.to_planar(name, data) if order == "planar" else data
    m = 17 if kernel is matmul else 1
    x, bias = strided(m, columns, dtype, kernel_device), torch.randn(9).to(kernel_device, dtype)
    y = run(kernel, x, stored.to(kernel_device), Rows(name, columns, order == "planar"), bias)
    assert_close(y, x, FORMATS[name].unpack(data), bias)


@kernels
@pytest.mark.parametrize("name", ["q4_k", "q5_0", "q8_0"])
@pytest.mark.parametrize(("m", "n", "supers"), [(1, 1, 1), (2, 65, 1), (7, 8, 3), (8, 1, 1), (9, 17, 2), (33, 8, 1)])
def test_odd_sizes(kernel, dtype, name, m, n, supers, kernel_device):
    columns = columns_of(name, supers)
    data = sound_blocks(name, n, columns, seed=m)
    x = strided(m, columns, dtype, kernel_device, seed=n)
    y = run(kernel, x, data.to(kernel_device), Rows(name, columns), None)
    assert_close(y, x, FORMATS[name].unpack(data), None)


@kernels
@pytest.mark.parametrize(("name", "columns"), [("q4_k", 256 * 3), ("q8_0", 32 * 13), ("fp8", 32 * 13)])
def test_split_sums_are_reproducible(kernel, dtype, name, columns, kernel_device):
    data = weights8(5, columns) if name == "fp8" else sound_blocks(name, 5, columns)
    weight = data.float() if name == "fp8" else FORMATS[name].unpack(data)
    x, bias = strided(3, columns, dtype, kernel_device), torch.randn(5).to(kernel_device, dtype)
    rows, data = Rows(name, columns), data.to(kernel_device)
    whole = run(kernel, x, data, rows, bias, split=1)
    for split in (2, 3):
        parts = [run(kernel, x, data, rows, bias, split=split) for _ in range(2)]
        assert torch.equal(*parts)
        assert_close(parts[0], x, weight, bias)
        assert (parts[0].double() - whole.double()).norm() <= WORST[dtype] * whole.double().norm()


@orders
@pytest.mark.parametrize(
    ("kernel", "dtype"), [(matmul, torch.float16), (vector, torch.float32)], ids=["matmul", "vector"]
)
def test_hard_blocks(kernel, dtype, name, order, kernel_device):
    """Negative, subnormal and zero scales, the largest integer scales, codes all zeros and all ones. Rows of x that are
    zero but for one element show each weight by itself, rounded to 16 bits where tensor cores take it. Scales of 65504
    are left out: their weights have no place in float16."""
    columns = columns_of(name, 1)
    data = hard_blocks(name, 6, columns, seed=3)
    blocks = data.view(-1, FORMATS[name].parts[0].shape((FORMATS[name].block,))[0])
    for offset in HALVES[name]:
        halves = blocks[:, offset : offset + 2].contiguous().view(torch.float16)
        blocks[:, offset : offset + 2] = halves.clamp(-4, 4).view(torch.uint8)
    weight = FORMATS[name].unpack(data)
    m = 16 if kernel is matmul else 2
    chosen = torch.randint(columns, (m,), generator=torch.Generator().manual_seed(5))
    x = torch.zeros(m, columns).scatter_(1, chosen[:, None], 1).to(kernel_device, dtype)
    stored = planar.to_planar(name, data) if order == "planar" else data
    y = run(kernel, x, stored.to(kernel_device), Rows(name, columns, order == "planar"), None).float().cpu()
    expected = weight[:, chosen].T
    # Without fused multiply-adds, as in the interpreter, codes are off by 2**-16 of the power of two that biases them.
    halves = (
        data.view(6, -1, blocks.shape[1])[:, :, HALVES[name][0] :][:, :, :2].contiguous().view(torch.float16)[:, :, 0]
    )
    step = halves.float().abs()[:, chosen // FORMATS[name].block].T * LARGEST_SCALE.get(name, 1)
    slack = step * LAYOUTS[name].bias * 2**-23 + 1e-7
    assert ((y - expected).abs() <= expected.abs() * WORST[dtype] + slack).all()


def weights8(n: int, columns: int) -> Tensor:
    codes = torch.randint(256, (n, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    codes[codes & 0x7F == 0x7F] = 1  # NaN
    return codes.view(torch.float8_e4m3fn)


@kernels
@pytest.mark.parametrize("scales", ["none", "tensor", "rows"])
def test_fp8(kernel, dtype, scales, kernel_device):
    data = weights8(9, 224)
    scale = {"none": None, "tensor": torch.tensor(0.004), "rows": torch.rand(9, 1) / 100}[scales]
    m = 9 if kernel is matmul else 1
    x, bias = strided(m, 224, dtype, kernel_device) / 100, torch.randn(9).to(kernel_device, dtype)
    given = None if scale is None else scale.to(kernel_device)
    y = run(kernel, x, data.to(kernel_device), Rows("fp8", 224), bias, scale=given)
    assert_close(y, x, data.float() * (1 if scale is None else scale), bias)


@kernels
def test_every_code_of_fp8(kernel, dtype, kernel_device):
    """One element of x is 1, so each output is a weight: exact in all three dtypes, NaN where the code is."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 32).view(torch.float8_e4m3fn)
    x = torch.zeros(1, 32)
    x[0, 5] = 1
    config = matmul.CONFIGS[1] if kernel is matmul else vector.CONFIGS[0]
    y = run(kernel, x.to(kernel_device, dtype), codes[:, :32].to(kernel_device), Rows("fp8", 32), None, config=config)
    expected = codes[:, 5].float()
    sound = expected.isfinite()
    assert torch.equal(y[0].float().cpu()[sound], expected[sound])
    assert y[0].cpu()[~sound].isnan().all()


@kernels
@pytest.mark.parametrize(("m", "n"), [(0, 8), (3, 0)])
def test_nothing_to_do(kernel, dtype, m, n, kernel_device):
    x = torch.zeros(m, 256, dtype=dtype, device=kernel_device)
    data = torch.zeros(n, 144, dtype=torch.uint8, device=kernel_device)
    assert kernel.linear(x, data, Rows("q4_k", 256)).shape == (m, n)


REFUSED: list[tuple[str, Callable[[Tensor, Tensor], dict], str]] = [
    ("columns of x", lambda x, data: {"x": x[:, :-1]}, r"\(2, 511\)"),
    ("order of x", lambda x, data: {"x": x.T.contiguous().T}, "apart"),
    ("bytes of data", lambda x, data: {"data": data[:, :-1]}, "288"),
    ("steps in data", lambda x, data: {"data": data[:, ::2].repeat(1, 2)[:, ::1].T.contiguous().T}, "288"),
    ("length of bias", lambda x, data: {"bias": x[0, :4]}, r"\(4,\)"),
    ("shape of out", lambda x, data: {"out": x.new_empty(2, 4)}, r"\(2, 4\)"),
    ("dtype of out", lambda x, data: {"out": torch.empty(2, 5, dtype=torch.int8)}, "int8"),
    ("scale without fp8", lambda x, data: {"scale": torch.ones(())}, "q4_k"),
]


@pytest.mark.parametrize("kernel", [matmul, vector], ids=["matmul", "vector"])
@pytest.mark.parametrize(("change", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refusals(kernel, change, said):
    x, data = torch.zeros(2, 512, dtype=torch.float16), torch.zeros(5, 288, dtype=torch.uint8)
    with pytest.raises(ValueError, match=said):
        kernel.linear(**{"x": x, "data": data, "rows": Rows("q4_k", 512), **change(x, data)})


def test_tensor_cores_take_16_bits():
    with pytest.raises(TypeError, match="float32"):
        matmul.linear(torch.zeros(1, 256), torch.zeros(1, 144, dtype=torch.uint8), Rows("q4_k", 256))


@pytest.mark.parametrize("kernel", [matmul, vector], ids=["matmul", "vector"])
@pytest.mark.parametrize("name", [*LAYOUTS, "fp8"])
@pytest.mark.parametrize("card", CARDS, ids=str)
def test_configurations(kernel, name, card):
    """The default is one of the candidates, these are few, and depend on the rows of x by size alone."""
    for m in (1, 2, 8, 9, 17, 64, 77, 512, 4608):
        tried = kernel.candidates(card, name, m, 3072, 3072)
        assert kernel.default_config(card, name, m, 3072, 3072) in tried
        assert len(set(tried)) == len(tried) <= 12
    assert kernel.candidates(card, name, 65, 3072, 3072) == kernel.candidates(card, name, 127, 3072, 3072)


@pytest.mark.parametrize(
    ("programs", "places", "steps", "most", "parts"),
    [
        (144, 528, 12, 8, 3),  # at once: a third takes 4 steps, 1.5 for writing and 2 for adding
        (96, 132, 12, 8, 1),  # two halves have no room beside each other
        (288, 264, 12, 8, 1),
        (1, 264, 7, 8, 7),
        (1, 264, 7, 6, 1),  # 7 has no other divisor
        (1, 264, 2, 8, 1),
    ],
)
def test_parts_along_k(programs, places, steps, most, parts):
    assert parts_of(programs, places, steps, most) == parts


@orders
@pytest.mark.parametrize("kernel", [matmul, vector], ids=["matmul", "vector"])
def test_defaults(kernel, name, order, kernel_device):
    """Nothing given but the operands; native blocks that are not aligned get tiles of their own."""
    columns = columns_of(name, 1)
    data = sound_blocks(name, 3, columns)
    stored = planar.to_planar(name, data) if order == "planar" else data
    x = strided(2, columns, torch.float16, kernel_device)
    y = kernel.linear(x, stored.to(kernel_device), Rows(name, columns, order == "planar"))
    assert_close(y, x, FORMATS[name].unpack(data), None)


@pytest.mark.parametrize("name", planar.FIELDS)
def test_narrow_loads_take_registers(name):
    assert Rows(name, 256).narrow and not Rows(name, 256, planar=True).narrow
    wide, narrow = (matmul.default_config((9, 0), name, 512, 3072, 3072, narrow) for narrow in (False, True))
    assert narrow.warps == 8 >= wide.warps
