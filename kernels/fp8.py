"""FP8 linear layers: both operands in e4m3, multiplied by the tensor cores through torch._scaled_mm.

A scale belongs to a whole tensor ("tensor") or to each row ("row") of activations and of weights alike; a product does
not mix the two. Activations get theirs at every call from their largest magnitude, mapped to 448, or a static one from
calibration. e4m3 holds values to one part in 16, so no channel spoils its neighbours and no rotation is needed, but an
output is some four times less exact than with int8 (`benchmarks/results/*/*-eight_bit.json`).

Devices differ in what works (Ada and the GeForce cards of Blackwell have lacked rows in some builds), so `fp8_ways`
tries. `emulate` says what is right. NaN: a row of activations ("row") or all of them ("tensor") with NaN or infinity
give NaN, unless a static scale is used, with which infinity saturates as every large value does.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from flux_quant.codecs.fp8 import LARGEST, cast
from flux_quant.codecs.int8 import TINY
from flux_quant.formats import QuantFormat
from flux_quant.kernels.int8_torch import describe, pieces

WAYS = ("tensor", "row")
MULTIPLE = 16  # of K and N: what cuBLASLt takes
BIASED = (torch.bfloat16, torch.float16)  # outputs to which _scaled_mm adds a bias of the same dtype

Quantize = Callable[[Tensor, str, Tensor | None], tuple[Tensor, Tensor]]


def quantize(x: Tensor, way: str, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (M, K) float -> codes (M, K) e4m3, scale () or (M, 1) float32, by way; a given scale () is kept."""
    if scale is None:
        scale = row_scales(x) if way == "row" else tensor_scale(x)
    return cast(x.float() / scale), scale


def tensor_scale(x: Tensor) -> Tensor:
    """() float32; NaN if there is NaN or infinity in x."""
    if not x.numel():
        return torch.full((), TINY / LARGEST, device=x.device)
    low, high = x.aminmax()
    return scale_of(torch.maximum(-low, high).float())


def row_scales(x: Tensor) -> Tensor:
    """(M, 1) float32."""
    return scale_of(x.abs().amax(dim=1, keepdim=True).float())


def scale_of(largest: Tensor) -> Tensor:
    return torch.where(largest.isfinite(), largest.clamp(min=TINY) / LARGEST, torch.nan)


def fp8_rows(fmt: QuantFormat, parts: Sequence[Tensor], way: str = "row") -> tuple[Tensor, Tensor]:
    """Parts of a weight (N, K) -> codes (N, K) e4m3, scale (N,) or () float32: FP8 weights as they are if they fit."""
    check_way(way)
    stored = parts[0].dtype == torch.float8_e4m3fn
    if stored and (way == "row" or len(parts) < 2 or parts[1].numel() == 1):
        scale = parts[1].float() if len(parts) > 1 else torch.ones((), device=parts[0].device)
        return parts[0], scale.reshape(-1).expand(len(parts[0])).contiguous() if way == "row" else scale.reshape(())
    codes = whole = None
    if way == "tensor":
        whole = torch.stack([tensor_scale(fmt.unpack(*piece)) for _, piece in pieces(fmt, parts)]).amax()
    scales = []
    for rows, piece in pieces(fmt, parts):
        values = fmt.unpack(*piece)
        if codes is None:
            codes = torch.empty(len(parts[0]), values.shape[1], dtype=torch.float8_e4m3fn, device=values.device)
        codes[rows], scale = quantize(values, way, whole)
        scales.append(scale.view(-1))
    return codes, torch.cat(scales) if way == "row" else whole


def fp8_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    way: str,
    input_scale: Tensor | None = None,
    quantizer: Quantize = quantize,
    fast: bool = True,
) -> Tensor:
    """x (M, K) float, w (N, K) e4m3, its scale () or (N,) float32, bias (N,) -> (M, N) in `dtype`.

    `input_scale` () is a static scale of x, for "tensor". `quantizer` makes codes and scale of x, as `quantize` does.
    `fast`: sums stay in the tensor cores' own precision, on Hopper less than that of float32.
    """
    check_operands(x, w, w_scale, bias, way, input_scale)
    if not len(x):
        return x.new_empty(0, len(w), dtype=dtype)
    codes, scale = quantizer(x, way, input_scale)
    return scaled_product(codes, scale, w, w_scale, bias, dtype, way, fast)


def scaled_product(
    codes: Tensor,
    scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    way: str,
    fast: bool = True,
) -> Tensor:
    """codes (M, K), w (N, K) e4m3 with their scales -> (M, N). Rows are computed in bfloat16: all that CUDA offers."""
    inside = torch.bfloat16 if way == "row" and codes.is_cuda else dtype
    joined = bias.to(inside) if bias is not None and inside in BIASED else None
    if way == "row":
        w_scale = w_scale.reshape(-1).expand(len(w)).contiguous().view(1, -1)
    how = dict(bias=joined, out_dtype=inside, use_fast_accum=fast)
    out = torch._scaled_mm(codes, w.t(), scale_a=scale, scale_b=w_scale, **how)
    if bias is not None and joined is None:
        out += bias
    return out.to(dtype)


def emulate(
    codes: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What `scaled_product` should give: the codes multiplied in float32, on any device."""
    out = (codes.float() * scale) @ (w.float() * w_scale.reshape(-1, 1)).t()
    return (out if bias is None else out + bias.float()).to(dtype)


def check_way(way: str) -> None:
    if way not in WAYS:
        raise ValueError(f"no FP8 product by {way}; use one of {', '.join(WAYS)}")


def check_operands(
    x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, way: str, input_scale: Tensor | None
) -> None:
    check_way(way)
    if w.dtype != torch.float8_e4m3fn or x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"float (M, K) and float8_e4m3fn (N, K) are needed, got {describe(x)} and {describe(w)}")
    if any(size % MULTIPLE or not size for size in w.shape):
        raise ValueError(f"an FP8 product takes multiples of {MULTIPLE}; the weight is {w.shape[0]} x {w.shape[1]}")
    if w_scale.dtype != torch.float32 or w_scale.numel() not in ((1,) if way == "tensor" else (1, len(w))):
        remedy = "; requantize it with fp8_rows(fmt, parts, 'tensor')" if way == "tensor" else ""
        raise ValueError(f"scale of {len(w)} rows by {way}: {describe(w_scale)}{remedy}")
    if input_scale is not None and (way != "tensor" or input_scale.numel() != 1 or input_scale.dtype != torch.float32):
        raise ValueError(f"a static scale is one float32 for a whole tensor; by {way}, got {describe(input_scale)}")
    others = {"w": w, "w_scale": w_scale, "bias": bias, "input_scale": input_scale}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, the activations are on {x.device}")
    if bias is not None and bias.shape != (len(w),):
        raise ValueError(f"bias of {len(w)} outputs has shape {tuple(bias.shape)}")


def fp8_ways(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> tuple[str, ...]:
    """Which of WAYS give right outputs in `dtype` on this device, tried once per process."""
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < (8, 9):
            return ()
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return tuple(way for way in WAYS if works(way, device, dtype))


@cache
def works(way: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether two products (one row; more rows than a tile) agree with `emulate`. A device that refuses is no error."""
    generator = torch.Generator().manual_seed(0)
    w, w_scale = quantize(torch.randn(144, 256, generator=generator).to(device), way)
    bias = torch.randn(144, generator=generator).to(device, dtype)
    for rows in (1, 160):
        sizes = torch.logspace(-1, 1, rows)[:, None]  # a scale that is applied to the wrong row shows
        codes, scale = quantize((torch.randn(rows, 256, generator=generator) * sizes).to(device), way)
        expected = emulate(codes, scale, w, w_scale, bias, torch.float32)
        try:
            out = scaled_product(codes, scale, w, w_scale, bias, dtype, way).float()
        except (RuntimeError, ValueError, NotImplementedError):
            return False
        if not ((out - expected).norm(dim=1) <= 0.01 * expected.norm(dim=1)).all():
            return False
    return True
