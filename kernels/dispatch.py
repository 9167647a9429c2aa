"""Which code unpacks or multiplies a packed weight, by format, rows of the input and device; what it chose and why.

    plain      the weight is stored as floats in the input's dtype: torch's own linear
    codec      torch alone: the codec unpacks, torch multiplies; runs everywhere
    cpu        loops compiled by numba unpack, torch multiplies
    vector     CUDA, few rows: one kernel on the packed weight, bound by reading it
    fused      CUDA, more rows: one kernel that unpacks tiles and multiplies on tensor cores
    two_pass   CUDA, many rows: a kernel unpacks into a scratch, cuBLAS multiplies
    int8, fp8  on request (`QuantFormat.compute`): 8-bit activations, see `eight_bit`

On CUDA a table chooses between vector, fused and two_pass, see `tables`. Gradients flow to the input and the
bias; the backward pass unpacks again instead of keeping the unpacked weight, so that training a LoRA on a quantized
base needs no more memory for weights than running it. For `torch.compile` the whole of it is one operator.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from flux_quant.formats import QuantFormat, Shape, format_named
from flux_quant.kernels import eight_bit, fallback, passes, tables, torch_path
from flux_quant.kernels.packed import FLOATS, Rows, check_linear, check_parts, take, weight_shape

CODEC, CPU, PLAIN = "codec", "cpu", "plain"


@dataclass(frozen=True)
class Way:
    path: str
    why: str
    config: int | None = None


def dequantize(
    fmt: QuantFormat, parts: Sequence[Tensor], dtype: torch.dtype, out: Tensor | None = None, rows: Rows = ...
) -> Tensor:
    """Parts of a weight (N, ..., K) -> those `rows` of it (all, or a slice without steps) in `dtype`.

    Written to `out` if given, which must have that shape and dtype. ValueError, TypeError for what does not fit.
    """
    check_parts(fmt, parts)
    if dtype not in FLOATS:
        raise TypeError(f"weights are unpacked to float32, float16 or bfloat16, not {dtype}")
    fmt, parts = without_compute(fmt, tuple(take(parts, rows)))
    shape = weight_shape(fmt, parts)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=parts[0].device)
    elif out.shape != shape or out.dtype != dtype or out.device != parts[0].device:
        wanted = f"{shape} {dtype} on {parts[0].device}"
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype} on {out.device}, should be {wanted}")
    if fmt.is_plain or out.numel() == 0 or not out.is_contiguous():
        return torch_path.dequantize(fmt, parts, out)
    unpacker, _ = unpacker_for(fmt, parts)
    if unpacker == CPU:
        from flux_quant.kernels import cpu_dequant

        cpu_dequant.dequantize(fmt, parts, out)
    elif unpacker == tables.TWO_PASS:
        from flux_quant.kernels import triton_path

        def run() -> Tensor:
            return triton_path.dequantize(fmt, parts, out.view(-1, shape[-1]))

        name = f"unpack {fmt.name} to {dtype}"
        fallback.guarded(name, out.device, run, lambda: torch_path.dequantize(fmt, parts, out))
    else:
        torch_path.dequantize(fmt, parts, out)
    return out


def linear(x: Tensor, fmt: QuantFormat, parts: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """x (..., K), parts of a weight (N, K), bias (N) -> (..., N) in x's dtype. Gradients flow to x and bias.

    ValueError, TypeError with the numbers for what does not fit together, before anything runs.
    """
    check_linear(x, fmt, parts, bias)
    if bias is not None:
        bias = bias.to(x.dtype)
    if fmt.is_plain and parts[0].dtype == x.dtype:
        return F.linear(x, parts[0], bias)
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad)
    traced = torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, torch.nn.Parameter)
    if wants_gradient or traced:
        return linear_op(x, list(parts), bias, fmt.name)
    return run_linear(x, fmt, parts, bias)


def run_linear(x: Tensor, fmt: QuantFormat, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """`linear` without its checks and without gradients; the bias in x's dtype."""
    n, k = weight_shape(fmt, parts)
    flat = x.reshape(-1, k)
    if not flat.numel() or not n:
        out = x.new_zeros(len(flat), n)
        return (out if bias is None else out + bias).view(*x.shape[:-1], n)
    return multiplied(flat, fmt, parts, bias).view(*x.shape[:-1], n)


def multiplied(x: Tensor, fmt: QuantFormat, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N), by the way chosen for it."""
    shape = weight_shape(fmt, parts)
    if fmt.compute != "16-bit":
        how = eight_bit.product_for(fmt, len(x), shape, x.dtype, x.device)

        def in_eight_bits() -> Tensor:
            return eight_bit.linear(x, fmt, parts, bias, how)

        def in_more_bits() -> Tensor:
            return multiplied(x, *without_compute(fmt, parts), bias)

        if how.way:
            return fallback.guarded(f"{how.way} {fmt.name}, {x.dtype}", x.device, in_eight_bits, in_more_bits)
        return in_more_bits()
    way = way_for(fmt, len(x), shape, x.dtype, x.device, parts)
    if way.path == CPU:
        from flux_quant.kernels import cpu_dequant

        return cpu_dequant.linear(x, fmt, parts, bias)

    def by_codec() -> Tensor:
        return passes.multiply(x, torch_path.pieces(fmt, parts, x.dtype), shape[0], bias)

    if way.path == CODEC:
        return by_codec()
    from flux_quant.kernels import triton_path

    def in_two_passes() -> Tensor:
        def run() -> Tensor:
            return triton_path.run(tables.TWO_PASS, x, fmt, parts, bias, None)

        return fallback.guarded(f"unpack {fmt.name} to {x.dtype}", x.device, run, by_codec)

    if way.path == tables.TWO_PASS:
        return in_two_passes()

    def in_one_kernel() -> Tensor:
        return triton_path.run(way.path, x, fmt, parts, bias, way.config)

    return fallback.guarded(f"{way.path} {fmt.name}, {x.dtype}", x.device, in_one_kernel, in_two_passes)


def without_compute(fmt: QuantFormat, parts: Sequence[Tensor]) -> tuple[QuantFormat, Sequence[Tensor]]:
    """The same weight, for 16 bits: without what 8-bit compute has added to it."""
    if fmt.base:
        base = format_named(fmt.base)
        return base, parts[: len(base.parts)]
    return (fmt if fmt.compute == "16-bit" else replace(fmt, compute="16-bit")), parts


def run_input_gradient(grad: Tensor, fmt: QuantFormat, parts: Sequence[Tensor]) -> Tensor:
    """grad (..., N) -> grad @ weight (..., K) in grad's dtype."""
    fmt, parts = without_compute(fmt, parts)
    n, k = weight_shape(fmt, parts)
    flat = grad.reshape(-1, n)

    def by_codec() -> Tensor:
        return passes.input_gradient(flat, torch_path.pieces(fmt, parts, flat.dtype), k)

    unpacker, _ = unpacker_for(fmt, parts)
    if unpacker == CPU and not fmt.is_plain:
        from flux_quant.kernels import cpu_dequant

        out = passes.input_gradient(flat, cpu_dequant.pieces(fmt, parts, flat.dtype), k)
    elif unpacker == tables.TWO_PASS and flat.numel():
        from flux_quant.kernels import triton_path

        def run() -> Tensor:
            with passes.SCRATCH:
                return passes.input_gradient(flat, triton_path.pieces(fmt, parts, flat.dtype), k)

        out = fallback.guarded(f"unpack {fmt.name} to {flat.dtype}", flat.device, run, by_codec)
    else:
        out = by_codec()
    return out.view(*grad.shape[:-1], k)


def explain(fmt: QuantFormat, shape: tuple[int, int, int], device: torch.device | str, dtype=torch.bfloat16) -> str:
    """What `linear` does with shape (M, N, K), M rows of input in `dtype`, on `device`, and why, in one line."""
    rows, *weight = shape
    device = torch.device(device)
    way = way_for(fmt, rows, tuple(weight), dtype, device)
    return f"{fmt.name} {weight[0]} x {weight[1]}, {rows} rows on {device}: {way.path} ({way.why})"


def way_for(
    fmt: QuantFormat,
    rows: int,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    parts: Sequence[Tensor] | None = None,
) -> Way:
    """The way of `rows` rows in `dtype` through a weight of `shape` (N, K); `parts` are looked at if given."""
    if fmt.compute != "16-bit":
        how = eight_bit.product_for(fmt, rows, shape, dtype, device)
        if how.way:
            return Way(fmt.compute, how.why, how.config)
        fmt, parts = without_compute(fmt, parts or ())
        instead = way_for(fmt, rows, shape, dtype, device, parts or None)
        return replace(instead, why=f"{how.why}; {instead.why}")
    if fmt.is_plain:
        if fmt.parts[0].dtype == dtype:
            return Way(PLAIN, "the weight is stored in the input's dtype")
        return Way(CODEC, f"the weight is cast to {dtype} a slice at a time")
    unpacker, why = unpacker_for(fmt, parts, device)
    if unpacker == CPU:
        from flux_quant.kernels import cpu_dequant

        return Way(CPU, cpu_dequant.describe(fmt, rows))
    if unpacker == CODEC:
        return Way(CODEC, why)
    from flux_quant.kernels import triton_path

    steps, source = tables.steps_for(device, triton_path.file_format(fmt))
    step = tables.step_for(steps, rows)
    if refusal := triton_path.refusal(step.path, fmt, rows, shape, dtype, device):
        return Way(tables.TWO_PASS, f"{refusal}; table {source}")
    limit = "any number of rows" if step.rows is None else f"up to {step.rows} rows"
    return Way(step.path, f"{limit}; table {source}", step.config)


def unpacker_for(
    fmt: QuantFormat, parts: Sequence[Tensor] | None, device: torch.device | None = None
) -> tuple[str, str]:
    """CPU, CODEC or two_pass (our CUDA kernels): who unpacks a weight on its device, and why not somebody faster."""
    device = parts[0].device if device is None else device
    if device.type == "cpu":
        from flux_quant.kernels import cpu_dequant

        return (CPU, "") if cpu_dequant.supports(fmt) else (CODEC, f"no loop for {fmt.name} on the CPU")
    if reason := fallback.triton_for(device):
        return CODEC, reason
    from flux_quant.kernels import triton_path

    reason = triton_path.obstacle(fmt, parts) if parts else None if triton_path.supported(fmt) else "no kernel for it"
    return (CODEC, reason) if reason else (tables.TWO_PASS, "")


@torch.library.custom_op("flux_quant::linear", mutates_args=())
def linear_op(x: Tensor, parts: list[Tensor], bias: Tensor | None, format_name: str) -> Tensor:
    return run_linear(x, format_named(format_name), parts, bias)


@linear_op.register_fake
def linear_shape(x: Tensor, parts: list[Tensor], bias: Tensor | None, format_name: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], parts[0].shape[0])


@torch.library.custom_op("flux_quant::linear_input_gradient", mutates_args=())
def gradient_op(grad: Tensor, parts: list[Tensor], format_name: str) -> Tensor:
    return run_input_gradient(grad, format_named(format_name), parts)


@gradient_op.register_fake
def gradient_shape(grad: Tensor, parts: list[Tensor], format_name: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight_shape(format_named(format_name), parts)[1])


def remember(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, parts, _, ctx.format_name = inputs
    ctx.save_for_backward(*parts)


def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = gradient_op(grad, list(ctx.saved_tensors), ctx.format_name)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.flatten(0, -2).sum(dim=0)
    return grad_x, [None] * len(ctx.saved_tensors), grad_bias, None


linear_op.register_autograd(backward, setup_context=remember)
