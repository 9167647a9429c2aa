"""Packed weights on the CPU: unpack them with all cores, and multiply with them.

numba's loops unpack at several times the rate at which float weights come from memory. A linear layer therefore never
holds its weight: each thread unpacks some rows into a scratch of its own, multiplies x with them by torch's matrix
product on one thread while they are in the cache, and takes the next rows. The scratch and the product are

    float32 where x is float32 or float16, or the processor multiplies no bfloat16 (torch's product of bfloat16 is
             4 to 6 times slower there than that of float32)
    bfloat16 where x is bfloat16 and the processor has AMX or AVX512-BF16; for float32 x there too, if the user allowed
             it by `torch.set_float32_matmul_precision("medium")`

Sums are float32 in either case; what is float32 is rounded to x's dtype once, at the end. One or two rows of x are
multiplied in the loop itself, in float32, and the weight is never stored.

The loops form each value as the codec does, bit for bit; 16-bit values are those rounded to nearest even.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import prod
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from flux_quant.formats import QuantFormat, Shape
from flux_quant.kernels.cpu_threads import compiled, threads_for
from flux_quant.kernels.packed import Rows, row_slices, weight_shape

MODULES = dict.fromkeys(("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"), "cpu_dequant_legacy")
MODULES |= dict.fromkeys(("q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_xs"), "cpu_dequant_kquants")
VIEWS = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
}  # as the loops tell them
LANES = 16  # weights that a loop takes at a time
SHARE = 1 << 22  # weights that are worth a thread
GRADIENT_BYTES = 16 << 20  # of unpacked weight that the backward pass multiplies with at a time
EXTRA = 8  # unpacking a weight takes as long as multiplying it with so many rows of x
SCRATCH = 1 << 21  # weights that a thread holds unpacked at most
VECTORS, FEW, SOME = 2, 8, 64  # rows of x

Target = tuple[np.ndarray, object]  # see `cpu_dequant_targets`
Loop = Callable[[Target, int, int], None]  # first row, last row


def supports(fmt: QuantFormat) -> bool:
    """Whether there is a loop for the format: every GGUF layout in its native order, and FP8 e4m3fn."""
    return fmt.name in MODULES or is_fp8(fmt)


def describe(fmt: QuantFormat, rows: int) -> str:
    """What `linear` does with `rows` rows of bfloat16 x, and why, in one line."""
    if not supports(fmt):
        return f"{fmt.name}, {rows} rows: no loop for this format"
    if rows <= VECTORS:
        return f"{fmt.name}, {rows} rows: multiplied while unpacked, in float32, the weight is never stored"
    native = "the processor multiplies bfloat16" if has_bfloat16() else "no AMX or AVX512-BF16 here"
    name = str(compute_dtype(torch.bfloat16)).removeprefix("torch.")
    return f"{fmt.name}, {rows} rows: unpacked to {name} ({native}) some rows at a time, then torch's matrix product"


def dequantize(fmt: QuantFormat, parts: Sequence[Tensor], out: Tensor, rows: slice = slice(None)) -> None:
    """Rows of a weight (N, ..., K) -> out (n, ..., K), contiguous float32, bfloat16 or float16; all of it is written.

    An FP8 scale is one for the whole weight or one per row, (N,) or (N, 1, ...). Parts that are not contiguous are
    copied first. ValueError for an `out` of another shape, TypeError for one of another dtype.
    """
    if out.dtype not in VIEWS:
        raise TypeError(f"weights are unpacked to float32, float16 or bfloat16, not {out.dtype}")
    parts = taken(fmt, parts, rows)
    shape = weight_shape(fmt, parts)
    if tuple(out.shape) != shape or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)} with strides {out.stride()}, should be {shape} and contiguous")
    if out.numel():
        count, columns = rows_and_columns(shape)
        by_rows(loop_for(fmt, parts), (flat(out), columns, 0), count, columns)


def pieces(fmt: QuantFormat, parts: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[Rows, Tensor]]:
    """Rows of a weight (N, K) in `dtype`, for `passes`: each overwrites the one before."""
    shape = weight_shape(fmt, parts)
    scratch = None
    for rows in row_slices(shape, GRADIENT_BYTES, dtype.itemsize):
        if scratch is None:
            scratch = torch.empty(rows.stop - rows.start, shape[1], dtype=dtype)
        weight = scratch[: rows.stop - rows.start]
        dequantize(fmt, parts, weight, rows)
        yield rows, weight


def linear(
    x: Tensor, fmt: QuantFormat, parts: Sequence[Tensor], bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """x (..., K) float32, float16 or bfloat16, parts of a weight (N, K), bias (N) -> (..., N) in x's dtype.

    `dtype` float32 or bfloat16 is computed in instead of what suits the processor. No gradients: they are the caller's.
    Several threads may call it at once; they take turns where the work is worth more than one core. ValueError where x
    or the scales of the weight do not fit it.
    """
    count, columns = weight_shape(fmt, parts)
    if x.shape[-1] != columns:
        raise ValueError(f"x is {tuple(x.shape)}, its last axis should be {columns} for a weight ({count}, {columns})")
    rows = x.detach().reshape(x.shape[:-1].numel(), columns).contiguous()
    dtype = dtype or compute_dtype(x.dtype)
    if bias is not None:
        bias = bias.detach()
    if not (len(rows) and count and columns):
        out = rows.new_zeros(len(rows), count) + (0 if bias is None else bias)
    elif len(rows) <= VECTORS:
        out = vectors(rows.float(), fmt, taken(fmt, parts), bias)
    else:
        bias = None if bias is None else bias.to(dtype)
        out = matrix(rows.to(dtype), fmt, taken(fmt, parts), bias)
    return out.to(x.dtype).view(*x.shape[:-1], count)


def vectors(x: Tensor, fmt: QuantFormat, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """x (M, K) float32 -> (M, N) float32, row by row."""
    count, columns = weight_shape(fmt, parts)
    loop, out = loop_for(fmt, parts), x.new_empty(len(x), count)
    for row, result in zip(x, out, strict=True):
        by_rows(loop, (flat(row), flat(result)), count, columns)
    return out if bias is None else out + bias


def matrix(x: Tensor, fmt: QuantFormat, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """x (M, K), bias (N), both in the dtype of the product -> (M, N) in it."""
    (rows, columns), count, threads = x.shape, len(parts[0]), torch.get_num_threads()
    turn = x.dtype == torch.float32 and FEW <= rows < SOME
    step = rows_at_a_time(rows, count, columns + rows * turn, threads)
    sizes = [step * columns, step * rows * turn]
    loop, out, free = loop_for(fmt, parts), x.new_empty(rows, count), rooms(threads, os.getpid())

    def run(first: int) -> None:
        last = min(first + step, count)
        room = free.get()
        try:
            memory = room if sum(sizes) <= len(room) else torch.empty(sum(sizes))  # rows of more than 131072 weights
            weight, turned = memory.view(x.dtype)[: sum(sizes)].split(sizes)
            loop((flat(weight), columns, first), first, last)
            weight, turned = weight.view(step, columns)[: last - first], turned.view(step, rows * turn)[: last - first]
            multiply(
                x, weight, turned if turn else None, None if bias is None else bias[first:last], out[:, first:last]
            )
        finally:
            free.put(room)

    with threads_for(count * columns * (rows + EXTRA), SHARE * EXTRA) as spread:
        for _ in spread(run, range(0, count, step)):
            pass
    return out


def multiply(x: Tensor, weight: Tensor, turned: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """x (M, K), weight (n, K), bias (n) -> out (M, n); by weight @ x.T if there is room for it, `turned` (n, M)."""
    with torch.inference_mode():  # which every thread decides for itself
        if turned is not None:
            torch.mm(weight, x.T, out=turned)
            torch.add(turned.T, 0 if bias is None else bias, out=out)
        elif bias is None:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(bias, x, weight.T, out=out)


@cache
def rooms(threads: int, process: int) -> SimpleQueue:
    """Scratches of float32, one for each thread. They stay: the pages of new memory cost as much as the unpacking."""
    free = SimpleQueue()
    for _ in range(threads):
        free.put(torch.empty(SCRATCH))
    return free


def rows_at_a_time(rows: int, count: int, columns: int, threads: int) -> int:
    """Of a weight (count, columns), for `rows` rows of x: what suits the product, in as many slices for every thread.

    The product packs x anew for every slice, which 256 rows of the weight are enough for; they are read from the cache
    but from the innermost. Few rows of x are not packed, and 128 rows of the weight stay in the second level.
    """
    most = min(128 if rows < FEW else 256, max(LANES, SCRATCH // columns // LANES * LANES))
    slices = -(-count // (most * threads)) * threads
    return min(count, -(-count // (LANES * slices)) * LANES)


def by_rows(loop: Loop, target: Target, count: int, columns: int) -> None:
    """Rows 0 .. count of a weight, by as many threads as they are worth."""
    with threads_for(count * columns, SHARE) as spread:
        step = count if spread is map else max(1, SHARE // 4 // columns)
        for _ in spread(lambda first: loop(target, first, min(first + step, count)), range(0, count, step)):
            pass


def loop_for(fmt: QuantFormat, parts: Sequence[Tensor]) -> Loop:
    """What unpacks rows first .. last of a weight (N, ..., K) with contiguous parts."""
    shape = weight_shape(fmt, parts)
    count, columns = rows_and_columns(shape)
    data = flat(parts[0].view(torch.uint8))
    if not is_fp8(fmt):
        kernel, rest = compiled(MODULES[fmt.name], fmt.name), (columns // fmt.block,)
    else:
        scale = parts[1].float() if len(parts) > 1 else torch.ones(1)
        if scale.numel() not in (1, count):
            raise ValueError(
                f"{fmt.name}: scales {tuple(scale.shape)} are neither one nor one for each of {count} rows"
            )
        kernel, rest = compiled("cpu_dequant_legacy", "fp8"), (columns, flat(scale))
    return lambda target, first, last: kernel(data, target, first, last, *rest)


def rows_and_columns(shape: Shape) -> tuple[int, int]:
    """A weight (N, ..., K) as a matrix; one of a single axis is one row."""
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))


def taken(fmt: QuantFormat, parts: Sequence[Tensor], rows: slice = slice(None)) -> tuple[Tensor, ...]:
    """Rows of all parts, contiguous; one scale for the whole weight belongs to all of them."""
    whole = (part.detach() if part.numel() == 1 and i else part.detach()[rows] for i, part in enumerate(parts))
    return tuple(part.contiguous() for part in whole)


def flat(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(VIEWS.get(tensor.dtype, tensor.dtype)).numpy()


def is_fp8(fmt: QuantFormat) -> bool:
    return fmt.parts[0].dtype == torch.float8_e4m3fn


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What x of `dtype` is multiplied in on this processor."""
    allowed = dtype == torch.bfloat16 or dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
    return torch.bfloat16 if allowed and has_bfloat16() else torch.float32


@cache
def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 (AMX or AVX512-BF16)."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
