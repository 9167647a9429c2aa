"""Linear layers that multiply in 8 bits: how, where it is possible, and the steps in a row. The products: int8*, fp8.

The format of a weight says that it is to be used so (`QuantFormat.compute`). int8 weights are stored as rotated rows of
codes, or packed in fewer bits and expanded into the scratch whenever they are used. Where a device cannot do it, the
layer runs in 16 bits: `product_for` gives the reason.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from flux_quant.codecs import int8 as int8_codec
from flux_quant.codecs.rotation import group_for
from flux_quant.formats import QuantFormat, Shape
from flux_quant.kernels import fallback, fp8, int8_torch, passes, tables
from flux_quant.kernels.packed import row_slices, weight_shape

TMA, TRITON, INT_MM = "tma", "triton", "int_mm"
HOPPER = (9, 0)
FEW = 65  # rows from which on tiles of 128 are worth their memory


@dataclass(frozen=True)
class Product:
    """How a product in 8 bits is computed and why; without a way, why it has to be done in 16."""

    way: str
    why: str
    config: int | None = None  # number in the kernel's table of tiles, None for its own choice


def product_for(fmt: QuantFormat, rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Product:
    """The product of `rows` rows in `dtype` with a weight of `shape` (N, K)."""
    return int8_product(rows, shape, device) if fmt.compute == "int8" else fp8_product(fmt, shape, dtype, device)


def int8_product(rows: int, shape: Shape, device: torch.device) -> Product:
    if device.type not in ("cpu", "cuda"):
        return Product("", f"no int8 product on {device.type}")
    reasons = int8_obstacles(rows, shape, device)
    if TRITON in reasons and device.type == "cuda" and (measured := tables.found_for(device, "int8")):
        step = tables.step_for(measured[0], rows)
        if reasons.get(step.path, "") is None:
            return Product(step.path, f"int8 by {step.path}; table {measured[1]}", step.config)
    found = next((way for way, reason in reasons.items() if reason is None), "")
    return Product(found, f"int8 by {found}" if found else "; ".join(dict.fromkeys(reasons.values())))


def int8_obstacles(rows: int, shape: Shape, device: torch.device) -> dict[str, str | None]:
    """Way: None if it can be gone, else the reason; the most promising way first."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    order = [INT_MM] if fallback.triton_for(device) else [TMA, TRITON, INT_MM]
    reasons = {way: int8_torch.obstacle(way, capability, rows, *shape) for way in order}
    if capability != HOPPER or rows < FEW:
        reasons.pop(TMA, None)
    return reasons


def fp8_product(fmt: QuantFormat, shape: Shape, dtype: torch.dtype, device: torch.device) -> Product:
    if any(length % fp8.MULTIPLE for length in shape):
        return Product("", f"an FP8 product takes multiples of {fp8.MULTIPLE}; the weight is {shape[0]} x {shape[1]}")
    ways = fp8.fp8_ways(device, dtype)
    wished = ("row",) if fmt.base == "fp8_rows" else ("tensor", "row")
    found = next((way for way in wished if way in ways), "")
    return Product(
        found, f"FP8, one scale per {found}" if found else f"no FP8 product by {' or '.join(wished)} on {device}"
    )


def linear(x: Tensor, fmt: QuantFormat, parts: Sequence[Tensor], bias: Tensor | None, how: Product) -> Tensor:
    """x (M, K), weight (N, K), bias (N) in x's dtype -> (M, N) in x's dtype."""
    return (int8_linear if fmt.compute == "int8" else fp8_linear)(x, fmt, parts, bias, how)


def fp8_linear(x: Tensor, fmt: QuantFormat, parts: Sequence[Tensor], bias: Tensor | None, how: Product) -> Tensor:
    scale = parts[1] if len(parts) > 1 else torch.ones((), device=x.device)
    quantizer = fp8.quantize
    if fallback.triton_for(x.device, (8, 9)) is None:
        from flux_quant.kernels import rows8

        quantizer = rows8.quantize_fp8
    return fp8.fp8_linear(
        x, parts[0], scale.reshape(-1) if scale.ndim else scale, bias, x.dtype, how.way, None, quantizer
    )


def int8_linear(x: Tensor, fmt: QuantFormat, parts: Sequence[Tensor], bias: Tensor | None, how: Product) -> Tensor:
    codes, scale = quantized(x)
    outputs = []
    with passes.SCRATCH if fmt.base and x.is_cuda else nullcontext():
        for rows, weight, weight_scale in weights(fmt, parts):
            some = None if bias is None else bias[rows]
            outputs.append(product(codes, scale, weight, weight_scale, some, x.dtype, how))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) -> its rotated codes (M, K) int8, scale (M, 1) float32."""
    group = group_for(x.shape[1])
    if fallback.triton_for(x.device) is None:
        from flux_quant.kernels import rows8

        return rows8.quantize_rows(x, group)
    return int8_codec.quantize_rows(x, group)


def weights(fmt: QuantFormat, parts: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of the weight as (rows, codes (n, K) int8, scale (n,) float32); a piece may overwrite the one before."""
    if not fmt.base:
        yield slice(0, len(parts[0])), *parts
        return
    *packed, scale = parts
    n, k = weight_shape(fmt, parts)
    if fallback.triton_for(scale.device) is None:
        from flux_quant.kernels import expand8, triton_path

        scratch = triton_path.scratch_for(scale.device, torch.int8)
        kernel_rows = triton_path.kernel_rows(fmt, k)
        for rows in row_slices((n, k), scratch.nbytes, 1, triton_path.TILE_ROWS):
            out = scratch[: (rows.stop - rows.start) * k].view(-1, k)
            yield rows, expand8.expand(packed[0], kernel_rows, scale, group_for(k), out, rows.start), scale[rows]
        return
    for rows in row_slices((n, k), int8_torch.SLICE_BYTES, 4):
        values = fmt.unpack(packed[0][rows], scale[rows])
        yield rows, int8_torch.codes_for(values, scale[rows], group_for(k)), scale[rows]


def product(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    how: Product,
) -> Tensor:
    operands = codes, scale, weight, weight_scale, bias, dtype
    if how.way == INT_MM:
        finish = None
        if fallback.triton_for(codes.device) is None:
            from flux_quant.kernels.int8 import finish
        return int8_torch.int_mm(*operands, finish)
    from flux_quant.kernels import int8

    if how.way != TMA:
        tiles = int8.configs_of(codes.device)
        return int8.int8_matmul(*operands, None if how.config is None else tiles[how.config])
    from flux_quant.kernels import int8_tma

    def by_copy_engine() -> Tensor:
        return int8_tma.int8_matmul_tma(*operands, int8_tma.CONFIGS[how.config or 0])

    return fallback.guarded("int8 by TMA", codes.device, by_copy_engine, lambda: int8.int8_matmul(*operands))


def prepared(
    fmt: QuantFormat, parts: Sequence[Tensor], compute: str, on: torch.device | None = None
) -> tuple[str, tuple[Tensor, ...]]:
    """Parts of a weight that is computed with in 16 bits -> (name of a format with that compute, its parts).

    int8: formats below 8 bits that are used on a CUDA device stay packed and get the scales of their int8 rows;
    everything else is requantized to int8 rows. fp8: FP8 weights stay as they are, everything else is requantized with
    a scale per row. `on`: the device that the layer will run on and that does the work; the parts stay where they are.
    """
    if compute == "fp8" and fmt.parts[0].dtype == torch.float8_e4m3fn:
        return f"{fmt.name} as fp8", tuple(parts)
    home, on = parts[0].device, on or parts[0].device
    moved = [part.to(on) for part in parts]
    if compute == "fp8":
        codes, scale = fp8.fp8_rows(fmt, moved)
        return "fp8_rows as fp8", (codes.to(home), scale[:, None].to(home))
    codes, scale = int8_torch.weight_rows(fmt, moved, group_for(weight_shape(fmt, parts)[1]))
    if fmt.block > 1 and fmt.bits_per_weight < 8 and on.type == "cuda":
        return f"{fmt.name} as int8", (*parts, scale.to(home))
    return "int8_rows", (codes.to(home), scale.to(home))
