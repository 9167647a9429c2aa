"""A linear layer over a packed weight.

An ordinary module with one plain buffer per part of its format, so that moving, saving, pinning and streaming it need
no special case; decided against a tensor subclass, which every such tool would have to know. Its one peculiarity: the
parts are what the format says they are, so `module.to(torch.bfloat16)` and its like move them but never change their
dtype (blocks of bytes would survive a cast; FP8 values, scales and stored floats would not). The bias is cast as usual.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flux_quant.formats import QuantFormat
from flux_quant.kernels import dispatch

Adapter = Callable[[Tensor], Tensor]  # x (..., K) -> (..., N), in x's dtype


class QuantLinear(nn.Module):
    """y = x @ weight.T + bias, with the weight (N, K) stored in `fmt`.

    Buffers are named after the suffixes of the format's parts: `weight`, `weight_scale`. `adapters` are added to the
    output one by one; they are not submodules, so whoever attaches one also moves and saves it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fmt: QuantFormat,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        """Uninitialised; on the meta device it costs nothing and waits for `load_state_dict(assign=True)`."""
        super().__init__()
        shape = (out_features, in_features)
        if not fmt.fits(shape):
            raise ValueError(f"in_features {in_features} is not a multiple of {fmt.block} ({fmt.name})")
        self.in_features, self.out_features, self.fmt = in_features, out_features, fmt
        self.adapters: list[Adapter] = []
        for part in fmt.parts:
            self.register_buffer(part.suffix, torch.empty(part.shape(shape), dtype=part.dtype, device=device))
        empty = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", empty)

    @classmethod
    def from_parts(cls, fmt: QuantFormat, parts: Sequence[Tensor], bias: Tensor | None = None) -> "QuantLinear":
        """Around tensors as they are: parts in the format's order, bias (N) in any float dtype. Copies nothing."""
        out_features, in_features = dispatch.weight_shape(fmt, parts)
        module = cls(in_features, out_features, fmt, bias=bias is not None, device="meta")
        for part, tensor in zip(fmt.parts, parts, strict=True):
            expected = part.shape((out_features, in_features))
            if tensor.dtype != part.dtype or tensor.shape != expected:
                raise ValueError(
                    f"{part.suffix} of a {fmt.name} weight ({out_features}, {in_features}) is {part.dtype} {expected}, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
            setattr(module, part.suffix, tensor)
        if bias is not None:
            if bias.shape != (out_features,):
                raise ValueError(f"bias of {out_features} outputs has shape {tuple(bias.shape)}")
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    @classmethod
    def from_float(cls, weight: Tensor, bias: Tensor | None, fmt: QuantFormat) -> "QuantLinear":
        """weight (N, K) and bias (N), float; the weight is packed into `fmt`."""
        return cls.from_parts(fmt, fmt.pack(weight.detach()), bias)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers[part.suffix] for part in self.fmt.parts)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in x's dtype."""
        out = dispatch.linear(x, self.fmt, self.parts, self.bias)
        for adapter in self.adapters:
            out = out + adapter(x)
        return out

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, {self.fmt.name}, bias={self.bias is not None}"
        return f"{text}, adapters={len(self.adapters)}" if self.adapters else text

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """What every move and cast of a module goes through: parts take part in moves only."""
        packed = {id(part) for part in self.parts}
        return super()._apply(lambda tensor: (keep_dtype(fn) if id(tensor) in packed else fn)(tensor), recurse)


def keep_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function `fn` without the change of dtype it makes, which an empty tensor shows."""

    def moved(tensor: Tensor) -> Tensor:
        shown = fn(tensor.new_empty(0))
        return fn(tensor) if shown.dtype == tensor.dtype else tensor.to(shown.device)

    return moved
