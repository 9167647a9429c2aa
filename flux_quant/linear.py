"""A linear layer over a packed weight, and modules made of such layers.

An ordinary module with one plain buffer per part of its format, so that moving, saving, pinning and streaming it need
no special case; decided against a tensor subclass, which every such tool would have to know. Its one peculiarity: the
parts are what the format says they are, so `module.to(torch.bfloat16)` and its like move them but never change their
dtype (blocks of bytes would survive a cast; FP8 values, scales and stored floats would not). The bias is cast as usual.
"""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from flux_quant.codecs import planar
from flux_quant.formats import FORMATS, IN_MEMORY, QuantFormat, format_named
from flux_quant.kernels import cpu_quantize, dispatch, eight_bit
from flux_quant.kernels.packed import check_parts

COMPUTES = ("16-bit", "int8", "fp8")
MULTIPLE = 16  # of inputs and outputs: what 8-bit products take
# Kinds of devices that know autocast. Asked for once: torch.compile of torch 2.11 does not look into the question.
AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))

Adapter = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]  # x (..., K), the layer without it -> (..., N)


class QuantLinear(nn.Module):
    """y = x @ weight.T + bias, with the weight (N, K) stored in `fmt`.

    Buffers are named after the suffixes of the format's parts: `weight`, `weight_scale`. Each of the `adapters` is
    called in place of the layer, with its input and what computes the layer without it. They are not submodules and in
    no state dict; those with a `move_` (see `adapters.SidePath`) are moved with the layer.
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
        out_features, in_features = check_parts(fmt, parts)
        module = cls(in_features, out_features, fmt, bias=bias is not None, device="meta")
        for part, tensor in zip(fmt.parts, parts, strict=True):
            setattr(module, part.suffix, tensor)
        if bias is not None:
            if bias.shape != (out_features,):
                raise ValueError(f"bias of {out_features} outputs has shape {tuple(bias.shape)}")
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    @classmethod
    def from_float(cls, weight: Tensor, bias: Tensor | None, fmt: QuantFormat) -> "QuantLinear":
        """weight (N, K) and bias (N), float; the weight is packed into `fmt` by its codec."""
        return cls.from_parts(fmt, fmt.pack(weight.detach()), bias)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers[part.suffix] for part in self.fmt.parts)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in x's dtype; under autocast in its dtype, as torch's own linear."""
        kind = x.device.type
        if kind in AUTOCAST and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        run = self.product
        for adapter in self.adapters:
            run = partial(adapter, linear=run)
        return run(x)

    def product(self, x: Tensor) -> Tensor:
        """The layer without adapters."""
        return dispatch.linear(x, self.fmt, self.parts, self.bias)

    def repack_(self) -> "QuantLinear":
        """Bring the rows into the order that GPUs load fastest (see `codecs.planar`), where that is another one.

        A copy of the weight, made once: after loading, before the first step. State dicts keep the bytes of files.
        """
        if repacked := IN_MEMORY.get(f"{self.fmt.name} planar"):
            self.weight = planar.to_planar(self.fmt.name, self.weight)
            self.fmt = repacked
        return self

    def set_compute_(self, compute: str, device: torch.device | None = None) -> bool:
        """See `set_compute_` of the module -> whether anything changed."""
        if compute == self.fmt.compute or compute != "16-bit" and not self.takes_eight_bits():
            return False
        if self.fmt.compute != "16-bit":
            if not self.fmt.base:
                raise ValueError(f"the weight has been requantized to {self.fmt.name}; load it again for {compute}")
            base = format_named(self.fmt.base)
            self.replace_parts(base, self.parts[: len(base.parts)])
        if compute != "16-bit":
            name, parts = eight_bit.prepared(self.fmt, self.parts, compute, device)
            self.replace_parts(format_named(name), parts)
        return True

    def takes_eight_bits(self) -> bool:
        return self.in_features % MULTIPLE == 0 and self.out_features % MULTIPLE == 0

    def replace_parts(self, fmt: QuantFormat, parts: Sequence[Tensor]) -> None:
        for part in self.fmt.parts:
            del self._buffers[part.suffix]
        self.fmt = fmt
        for part, tensor in zip(fmt.parts, parts, strict=True):
            self.register_buffer(part.suffix, tensor)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.fmt.base:
            destination.pop(f"{prefix}int8_scale", None)
        if self.fmt.native:
            destination[f"{prefix}weight"] = planar.to_native(self.fmt.native, self.weight)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        name = f"{prefix}weight"
        if name in state_dict and self.fmt.compute != "16-bit":
            raise RuntimeError(f"{prefix[:-1]} computes in {self.fmt.compute}: load weights first, then set_compute_")
        if self.fmt.native and name in state_dict:
            state_dict = {**state_dict, name: planar.to_planar(self.fmt.native, state_dict[name])}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, {self.fmt.name}, bias={self.bias is not None}"
        return f"{text}, adapters={len(self.adapters)}" if self.adapters else text

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """What every move and cast of a module goes through: parts take part in moves only."""
        packed = {id(part) for part in self.parts}
        for adapter in self.adapters:
            if hasattr(adapter, "move_"):
                adapter.move_(keep_dtype(fn))
        return super()._apply(lambda tensor: (keep_dtype(fn) if id(tensor) in packed else fn)(tensor), recurse)


def keep_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function `fn` without the change of dtype it makes, which an empty tensor shows."""

    def moved(tensor: Tensor) -> Tensor:
        shown = fn(tensor.new_empty(0))
        return fn(tensor) if shown.dtype == tensor.dtype else tensor.to(shown.device)

    return moved


def quantize_module_(module: nn.Module, recipe: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Replace the linears of any module by packed ones, in place -> name of each replaced layer: its format.

    recipe: (glob on the layer's name, name of a format) rows, first match wins, None as a format leaves a layer alone.
    Layers that no row matches stay, and so do those whose inputs are no multiple of the format's block. ValueError for
    a format that does not exist.
    """
    recipe = [(pattern, name) for pattern, name in recipe]
    if unknown := [name for _, name in recipe if name is not None and name not in FORMATS]:
        raise ValueError(f"unknown format {unknown[0]}; choose one of {', '.join(FORMATS)}")
    replaced = {}
    for path, layer in list(module.named_modules()):
        name = next((name for pattern, name in recipe if fnmatchcase(path, pattern)), None)
        if name is None or not isinstance(layer, nn.Linear) or not FORMATS[name].fits(tuple(layer.weight.shape)):
            continue
        module.set_submodule(path, QuantLinear.from_parts(FORMATS[name], searched(layer.weight, name), layer.bias))
        replaced[path] = name
    return replaced


def searched(weight: Tensor, name: str) -> tuple[Tensor, ...]:
    """The parts of a weight (N, K) in a format, its scales searched for where it has any to search."""
    fmt, weight = FORMATS[name], weight.detach()
    if fmt.is_plain or weight.device.type != "cpu":
        return (fmt.search or fmt.pack)(weight)
    return cpu_quantize.quantize(name, weight)[0]


# Layers that stay in 16 bits when the rest computes in 8: globs on the names of BFL and of diffusers. Modulation and
# the embedders decide about every token at once and cost next to nothing; the last layer's error is the picture's.
KEEP_16_BIT = (
    "img_in",
    "txt_in",
    "time_in.*",
    "vector_in.*",
    "guidance_in.*",
    "*_mod.lin",
    "*.modulation.lin",
    "final_layer.*",
    "x_embedder",
    "context_embedder",
    "time_text_embed.*",
    "*.norm*.linear",
    "norm_out.linear",
    "proj_out",
)


def set_compute_(
    module: nn.Module, compute: str, keep: Iterable[str] = KEEP_16_BIT, device: torch.device | None = None
) -> dict[str, str]:
    """Let the packed layers of a module multiply in "int8", "fp8" or again in "16-bit" -> name: what it is held in now.

    Layers that match a glob of `keep`, and those whose sizes 8-bit products do not take, stay as they are. int8
    requantizes weights of 8 bits and more (they stay so), and on a CUDA device keeps those of fewer bits packed.
    `device`: where the module will run if it is not there yet. ValueError for another word, or for 16-bit after
    requantizing.
    """
    if compute not in COMPUTES:
        raise ValueError(f"compute {compute}; choose one of {', '.join(COMPUTES)}")
    keep, changed = tuple(keep), {}
    for path, layer in module.named_modules():
        if not isinstance(layer, QuantLinear) or any(fnmatchcase(path, pattern) for pattern in keep):
            continue
        if layer.set_compute_(compute, device):
            changed[path] = layer.fmt.name
    return changed


def repack_(module: nn.Module) -> nn.Module:
    """`QuantLinear.repack_` for every packed layer of a module."""
    for layer in module.modules():
        if isinstance(layer, QuantLinear):
            layer.repack_()
    return module
