"""8-bit integer linear layers in plain torch: the reference for `int8.py`, and the way for CPUs and RTX 20.

    codes, scale = quantize_rows(x, group)            per token, at every call
    weight, weight_scale = weight_rows(fmt, parts, group)    per output row, once
    y = int_mm(codes, scale, weight, weight_scale, bias, torch.float16)

The product is exact in int32, so every way of computing it gives the same accumulators; both scales and the bias are
applied to them in float32. A row of activations with NaN or infinity gives NaN in all its outputs, whatever the
weights: where a linear in 16 bits shows NaN or infinity, this one shows NaN.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flux_quant.codecs.int8 import TOP, quantize_rows
from flux_quant.codecs.rotation import rotate
from flux_quant.formats import QuantFormat

LONGEST = (2**31 - 1) // 127**2  # channels with which an int32 accumulator cannot overflow
SLICE_BYTES = 32 << 20  # of float32 weight that is requantized at a time, of int32 accumulators of `int_mm`
CAPABILITIES = {"triton": (8, 13), "tma": (9, 10)}  # major numbers, from and below, for which kernels were compiled
FEWEST = 17  # rows that torch._int_mm takes on CUDA
PADDED = 32  # rows it gets instead of fewer

Finish = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], None]


def weight_rows(fmt: QuantFormat, parts: Sequence[Tensor], group: int) -> tuple[Tensor, Tensor]:
    """Parts of a weight (N, K) -> codes of W R (N, K) int8, scale (N,) float32, on the parts' device.

    The scale maps the largest magnitude of a row to 127: searching one that clips gains 1 % of the error (docs/log.md).
    """
    codes = scale = None
    for rows, piece in pieces(fmt, parts):
        part, steps = quantize_rows(fmt.unpack(*piece), group)
        if codes is None:
            codes = part.new_empty(len(parts[0]), part.shape[1])
            scale = steps.new_empty(len(parts[0]))
        codes[rows], scale[rows] = part, steps[:, 0]
    return codes, scale


def pieces(fmt: QuantFormat, parts: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Some rows of a weight after the others, the parts of each; a part without axes belongs to all of them."""
    (per_block,) = fmt.parts[0].shape((fmt.block,))
    columns = parts[0].shape[1] // per_block * fmt.block
    for start, stop in slices(len(parts[0]), 4 * max(1, columns)):
        rows = slice(start, stop)
        yield rows, [part[rows] if part.ndim else part for part in parts]


def codes_for(values: Tensor, scale: Tensor, group: int) -> Tensor:
    """W (N, K) float, its scale (N,) from `weight_rows` -> codes of W R (N, K) int8."""
    return (rotate(values, group) / scale[:, None]).nan_to_num(0).round().clamp(-TOP, TOP).to(torch.int8)


def int_mm(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    finish: Finish | None = None,
) -> Tensor:
    """a (M, K) int8, its scale (M, 1), w (N, K) int8, its scale (N,), bias (N,) -> (M, N) in `dtype`.

    Through torch._int_mm, which writes its accumulators out: some columns at a time, so that they stay few. `finish`
    (acc, a_scale, w_scale, bias, out) turns them into output, `finish_slice` if none is given.
    """
    check_operands(a, a_scale, w, w_scale, bias)
    finish = finish or finish_slice
    rows, columns = a.shape[0], w.shape[0]
    refuse("int_mm", torch.cuda.get_device_capability(a.device) if a.is_cuda else None, rows, columns, a.shape[1])
    out = torch.empty(rows, columns, dtype=dtype, device=a.device)
    if not out.numel():
        return out
    if a.is_cuda and rows < FEWEST:
        a = torch.nn.functional.pad(a, (0, 0, 0, PADDED - rows))
    for start, stop in slices(columns, 4 * len(a), multiple=256):
        acc = torch._int_mm(a, w[start:stop].t())[:rows]
        finish(acc, a_scale, w_scale[start:stop], None if bias is None else bias[start:stop], out[:, start:stop])
    return out


def finish_slice(acc: Tensor, a_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = acc * a_scale * w_scale + bias, in float32 up to the last rounding."""
    values = (acc * a_scale).mul_(w_scale)
    out.copy_(values if bias is None else values.add_(bias.float()))


def slices(length: int, bytes_each: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Cut `length` into ranges of at most SLICE_BYTES, each but the last a multiple of `multiple`."""
    step = max(multiple, SLICE_BYTES // bytes_each // multiple * multiple)
    return [(start, min(start + step, length)) for start in range(0, length, step)] or [(0, 0)]


def obstacle(way: str, capability: tuple[int, int] | None, rows: int, columns: int, channels: int) -> str | None:
    """Why an int8 product (rows, channels) x (columns, channels) cannot be computed in this way; None if it can.

    `way` is "int_mm", "triton" or "tma", `capability` that of the CUDA device, None for a CPU.
    """
    if channels > LONGEST:
        return f"{channels} channels may overflow int32; at most {LONGEST}"
    if way in CAPABILITIES:
        low, below = CAPABILITIES[way]
        if capability is None or not (low, 0) <= capability < (below, 0):
            return f"{way} multiplies int8 on compute capabilities {low}.0 to {below - 1}.x only"
        return f"{channels} channels are not a multiple of 16" if channels % 16 or not channels else None
    if capability is None:
        return None
    if capability < (7, 5):
        return "int8 tensor cores begin with compute capability 7.5"
    if columns % 8 or channels % 8 or not channels:
        return f"torch._int_mm takes multiples of 8 on CUDA; the weight is {columns} x {channels}"
    return None


def refuse(way: str, capability: tuple[int, int] | None, rows: int, columns: int, channels: int) -> None:
    reason = obstacle(way, capability, rows, columns, channels)
    if reason:
        raise ValueError(f"no int8 product by {way}: {reason}")


def check_operands(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> None:
    """ValueError with the shapes unless everything fits together."""
    if a.dtype != torch.int8 or w.dtype != torch.int8 or a.ndim != 2 or w.ndim != 2 or a.shape[1] != w.shape[1]:
        raise ValueError(f"int8 (M, K) and (N, K) are needed, got {describe(a)} and {describe(w)}")
    rows, columns = len(a), len(w)
    expected = {"a_scale": (a_scale, (rows, 1)), "w_scale": (w_scale, (columns,))}
    for name, (tensor, shape) in expected.items():
        if tensor.dtype != torch.float32 or tensor.shape != shape:
            raise ValueError(f"{name} must be float32 {shape}, got {describe(tensor)}")
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"bias of {columns} outputs has shape {tuple(bias.shape)}")
    others = {"w": w, "a_scale": a_scale, "w_scale": w_scale} | ({} if bias is None else {"bias": bias})
    for name, tensor in others.items():
        if tensor.device != a.device:
            raise ValueError(f"{name} is on {tensor.device}, the activations are on {a.device}")


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
