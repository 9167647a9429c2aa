"""Unpacking on a CUDA device by our kernels, at the speed of its memory.

For a product in two passes the weight goes into a scratch, one buffer per stream of fixed size: a wide weight passes
through it slice by slice.
"""

from collections.abc import Iterator, Sequence
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from flux_quant.formats import QuantFormat
from flux_quant.kernels import dequant, passes, tables
from flux_quant.kernels.packed import row_slices, weight_shape
from flux_quant.kernels.planes import LAYOUTS, Rows

NATIVE_E4M3 = (8, 9)  # from this compute capability on the hardware converts FP8
TENSOR_CORES = (8, 0)  # where Triton uses them from
UNSOUND = 10  # major capability on which several tl.dot into one sum in a loop are wrong: triton-lang/triton#10821
MOST_ROWS = 8  # of the vector kernel
FP8 = "fp8"  # the layout of every FP8 format
TILE_ROWS = 256  # slices are multiples of it: whole tiles of cuBLAS
SMALL, LARGE = 32 << 20, 132 << 20  # bytes of scratch; 132 MB hold FLUX.1's widest weight, 21504 x 3072, in 16 bits
SHARE = 128  # of the device's memory

_scratch: dict[tuple[torch.device, int], Tensor] = {}


def kernel_rows(fmt: QuantFormat, columns: int) -> Rows:
    """What the kernels over planes are compiled for."""
    return Rows(file_format(fmt), columns, bool(fmt.native))


def file_format(fmt: QuantFormat) -> str:
    """The name of the format whose blocks these are, in whatever order."""
    return fmt.native or fmt.base or fmt.name


def obstacle(fmt: QuantFormat, parts: Sequence[Tensor]) -> str | None:
    """None if the unpack kernels can read this weight, else the reason."""
    shape = weight_shape(fmt, parts)
    if not supported(fmt):
        return f"no kernel for {fmt.name}"
    if max(prod(shape), parts[0].nbytes) >= dequant.MAX_OFFSET:  # Q8_0 has more bytes
        return f"{prod(shape)} weights in {parts[0].nbytes} bytes are beyond the kernels' 32-bit offsets"
    if not all(part.is_contiguous() for part in parts):
        return "the weight is not contiguous"
    if parts[0].data_ptr() % alignment(fmt, shape[-1]):
        return f"the weight starts at an address that is no multiple of {alignment(fmt, shape[-1])}"
    return None


def supported(fmt: QuantFormat) -> bool:
    return file_format(fmt) in LAYOUTS or fmt.parts[0].dtype == torch.float8_e4m3fn


def alignment(fmt: QuantFormat, columns: int) -> int:
    """Bytes that the address of a weight must be a multiple of."""
    if fmt.block == 1:
        return 1
    return 4 if kernel_rows(fmt, columns).wide else 2


def dequantize(fmt: QuantFormat, parts: Sequence[Tensor], out: Tensor, first_row: int = 0) -> Tensor:
    """Rows of a weight (N, ..., K), counted over all leading axes, from `first_row` on -> out (n, K), contiguous."""
    if fmt.block == 1:
        native = torch.cuda.get_device_capability(out.device) >= NATIVE_E4M3
        scale = parts[1] if len(parts) > 1 else None
        return dequant.fp8_to_dense(parts[0], scale, out, first_row, native)
    return dequant.blocks_to_dense(parts[0], kernel_rows(fmt, out.shape[-1]), out, first_row)


def pieces(fmt: QuantFormat, parts: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight (N, K) in `dtype`, for `passes`: each overwrites the one before. Hold `passes.SCRATCH`."""
    n, k = weight_shape(fmt, parts)
    scratch = scratch_for(parts[0].device, dtype)
    for rows in row_slices((n, k), scratch.nbytes, dtype.itemsize, TILE_ROWS):
        count = rows.stop - rows.start
        if count * k > scratch.numel():  # a single row is wider than the scratch
            scratch = scratch.new_empty(count * k)
        yield rows, dequantize(fmt, parts, scratch[: count * k].view(count, k), rows.start)


def scratch_for(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The scratch of the current stream, as a flat tensor. While a CUDA graph is captured, one from the graph's pool:
    the graph keeps it for its replays."""
    nbytes = scratch_bytes(device)
    if torch.cuda.is_current_stream_capturing():
        return torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _scratch:
        _scratch[key] = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return _scratch[key].view(dtype)


def scratch_bytes(device: torch.device) -> int:
    """A 128th of the device's memory, 64 MiB of 8 GiB, within 32 MiB and 132 MiB."""
    share = torch.cuda.get_device_properties(device).total_memory // SHARE
    return max(SMALL, min(LARGE, share)) // TILE_ROWS * TILE_ROWS


def free_scratch() -> None:
    """Give the scratch of every stream back to torch's allocator."""
    _scratch.clear()


def refusal(
    path: str, fmt: QuantFormat, rows: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> str | None:
    """None if a product of `rows` rows in `dtype` with a weight of `shape` (N, K) can go this path, else the reason."""
    if path == tables.TWO_PASS:
        return None
    layout = Rows(layout_name(fmt), shape[1]).layout
    if shape[1] % layout.block:
        return f"{shape[1]} inputs are no multiple of {layout.block}"
    if path == tables.VECTOR:
        return None if rows <= MOST_ROWS else f"{rows} rows; the vector kernel is for {MOST_ROWS} at most"
    capability = torch.cuda.get_device_capability(device)
    if capability < TENSOR_CORES:
        return f"Triton has no tensor cores on sm_{capability[0]}{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"tensor cores take no {dtype}"
    if capability[0] == UNSOUND and layout.planes > 1:
        return f"Triton adds products up wrongly on sm_{capability[0]}{capability[1]}"
    return None if candidates(path, fmt, rows, shape, device) else "no tile of the fused kernel fits this card"


def candidates(path: str, fmt: QuantFormat, rows: int, shape: tuple[int, int], device: torch.device) -> list[int]:
    """Numbers of the configurations that are worth a try, in the table of the kernel."""
    kernel, capability = kernel_of(path), torch.cuda.get_device_capability(device)
    return [kernel.CONFIGS.index(config) for config in kernel.candidates(capability, layout_name(fmt), rows, *shape)]


def run(
    path: str, x: Tensor, fmt: QuantFormat, parts: Sequence[Tensor], bias: Tensor | None, config: int | None
) -> Tensor:
    """x (M, K), weight (N, K), bias (N) -> (M, N), by this path; `config` is a number from `candidates`."""
    n, k = weight_shape(fmt, parts)
    if path == tables.TWO_PASS:
        with passes.SCRATCH:
            return passes.multiply(x, pieces(fmt, parts, x.dtype), n, bias)
    kernel, layout = kernel_of(path), layout_name(fmt)
    rows = Rows(layout, k, bool(fmt.native))
    scale = parts[1] if layout == FP8 and len(parts) > 1 else None
    tile = None if config is None else kernel.CONFIGS[config]
    if x.stride(1) != 1:
        x = x.contiguous()
    return kernel.linear(x, parts[0], rows, bias, tile, scale=scale)


def kernel_of(path: str) -> ModuleType:
    from flux_quant.kernels import matmul, vector

    return {tables.VECTOR: vector, tables.FUSED: matmul}[path]


def layout_name(fmt: QuantFormat) -> str:
    return FP8 if fmt.parts[0].dtype == torch.float8_e4m3fn else file_format(fmt)
