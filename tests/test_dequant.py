"""The Triton kernels that unpack weights, against the codec: bit for bit in float32, rounded in 16 bits.

On CUDA the real compiler, elsewhere the interpreter (without bfloat16, in which it is wrong): see `kernel_device`.
"""

from math import prod

import pytest
import torch
from torch import Tensor

from blocks import HALVES, hard_blocks
from flux_quant.codecs import planar
from flux_quant.formats import FORMATS

pytest.importorskip("triton")

from flux_quant.kernels import dequant  # noqa: E402 - needs triton
from flux_quant.kernels.planes import LAYOUTS, Rows  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, where float16 ends

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ORDERS = [(name, order) for name in HALVES for order in ["native"] + ["planar"] * (name in planar.FIELDS)]
SHAPES = [(1, 1, 0, 1), (5, 3, 1, 3), (7, 2, 0, 7), (3, 12, 2, 1), (4, 5, 3, 0)]  # rows, blocks of 256, first, count
GUARD = 64

orders = pytest.mark.parametrize(("name", "order"), ORDERS, ids=[f"{name}-{order}" for name, order in ORDERS])


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest, kernel_device: str) -> torch.dtype:
    if request.param is torch.bfloat16 and kernel_device == "cpu":
        pytest.skip("the interpreter has no bfloat16")
    return request.param


def guarded_output(rows: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """(the whole, its middle): the middle is NaN, what is around it 77."""
    whole = torch.full((rows * columns + 2 * GUARD,), 77, dtype=dtype, device=device)
    middle = whole[GUARD : GUARD + rows * columns].view(rows, columns)
    middle.fill_(torch.nan)
    return whole, middle


def assert_written(whole: Tensor, middle: Tensor, expected: Tensor) -> None:
    assert torch.equal(middle.cpu(), expected.to(middle.dtype).cpu())
    middle.fill_(77)
    assert (whole == 77).all()


def test_every_layout_has_a_kernel():
    blocks = set(LAYOUTS) - {"fp8"}
    assert blocks == set(HALVES) == {name for name, fmt in FORMATS.items() if fmt.block > 1}
    for name in blocks:
        fmt, layout = FORMATS[name], LAYOUTS[name]
        assert (layout.block, layout.nbytes) == (fmt.block, fmt.parts[0].shape((fmt.block,))[0])
        assert layout.planes * layout.groups * layout.width == layout.block


@orders
@pytest.mark.parametrize(("rows", "supers", "first", "count"), SHAPES)
def test_every_format_and_row_range(name, order, rows, supers, first, count, dtype, kernel_device):
    columns = 256 * supers if FORMATS[name].block == 256 else 32 * (2 * supers + 1)
    data = hard_blocks(name, rows, columns, seed=rows)
    expected = FORMATS[name].unpack(data)[first : first + count]
    stored = planar.to_planar(name, data) if order == "planar" else data
    whole, out = guarded_output(count, columns, dtype, kernel_device)
    dequant.blocks_to_dense(stored.to(kernel_device), Rows(name, columns, order == "planar"), out, first)
    assert_written(whole, out, expected)


@pytest.mark.parametrize("name", planar.FIELDS)
@pytest.mark.parametrize("shape", [(1, 256), (5, 768), (2, 3, 512), (0, 256)], ids=str)
def test_planar_rows_hold_the_same_bytes(name, shape):
    *leading, columns = shape
    data = hard_blocks(name, prod(leading) or 1, columns)
    data = data.view(*leading, data.shape[-1]) if prod(leading) else data[:0]
    order = planar.to_planar(name, data)
    assert order.shape == data.shape and torch.equal(planar.to_native(name, order), data)
    for row, old in zip(order.flatten(0, -2), data.flatten(0, -2), strict=True):
        assert torch.equal(row.sort().values, old.sort().values)


@pytest.mark.parametrize("scales", ["none", "tensor", "row"])
@pytest.mark.parametrize(("rows", "columns", "first"), [(1, 1, 0), (2, 128, 0), (7, 1000, 3), (3, 8193, 1)])
def test_fp8(scales, rows, columns, first, dtype, kernel_device):
    codes = torch.arange(rows * columns) % 256 if rows * columns < 300 else torch.randint(256, (rows * columns,))
    data = codes.to(torch.uint8).view(rows, columns).view(torch.float8_e4m3fn)
    scale = {"none": None, "tensor": torch.tensor(0.37), "row": torch.rand(rows, 1) - 0.5}[scales]
    values = (data.float() if scale is None else data.float() * scale)[first:]
    whole, out = guarded_output(rows - first, columns, dtype, kernel_device)
    place = data.to(kernel_device), None if scale is None else scale.to(kernel_device)
    dequant.fp8_to_dense(*place, out, first)
    rounded = values.to(dtype)
    assert torch.equal(out.isnan().cpu(), rounded.isnan())  # the two codes without a value
    assert_written(whole, out.nan_to_num_(0), rounded.nan_to_num(0))


def test_all_finite_fp8_codes_from_integers(kernel_device):
    data = torch.arange(256, dtype=torch.uint8).view(1, 256).view(torch.float8_e4m3fn).to(kernel_device)
    out = torch.empty(1, 256, device=kernel_device)
    dequant.fp8_to_dense(data, None, out, native=False)
    finite = data.float().isfinite()
    assert finite.sum() == 254 and torch.equal(out[finite], data.float()[finite]) and out[~finite].isnan().all()


@pytest.mark.gpu
def test_fp8_codes_by_hardware(kernel_device):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("converts e4m3 from sm_89 on")
    data = torch.arange(256, dtype=torch.uint8).view(1, 256).view(torch.float8_e4m3fn).to(kernel_device)
    out = torch.empty(1, 256, device=kernel_device)
    dequant.fp8_to_dense(data, None, out, native=True)
    assert torch.equal(out.nan_to_num(7), data.float().nan_to_num(7))
