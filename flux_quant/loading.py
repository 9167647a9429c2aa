"""A checkpoint becomes a module: the engine, the text encoders, the VAE.

Modules are built on the meta device and their linears replaced by `QuantLinear` around the stored parts, as views of
the mapped file: nothing is unpacked or copied that a forward pass can unpack itself, tables of token vectors neither.
Everything else (norms, biases, convolutions) is small and becomes float32. Every dimension comes from tensor shapes.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flux_quant import arch
from flux_quant.configs import clip_config, t5_config, vae_config
from flux_quant.controlnet import ControlNet, ControlNetConfig, Joined
from flux_quant.converters.checkpoint import CheckpointReader, load, open_checkpoint
from flux_quant.converters.component import Component, components, open_component, select
from flux_quant.embedding import QuantEmbedding
from flux_quant.errors import UserError
from flux_quant.families import Family
from flux_quant.formats import FORMATS, QuantFormat
from flux_quant.kernels.packed import take
from flux_quant.linear import QuantLinear
from flux_quant.model import Flux
from flux_quant.naming import vae_to_diffusers

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, T5EncoderModel


FAST_GELU = "gated-gelu_pytorch_tanh"  # T5's "gated-gelu" in one pass over the activations instead of eight


def shapes_of(reader: CheckpointReader) -> dict[str, arch.Shape]:
    return {name: info.shape for name, info in reader.tensors.items()}


@contextmanager
def dimensions_of(reader: Component) -> Iterator[None]:
    """While a model's dimensions are read off its tensors: what fails then is the file's fault."""
    try:
        yield
    except KeyError as missing:
        raise UserError(f"{reader.path}: no complete {reader.family.name}: tensor {missing} is missing") from None
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{reader.path}: no {reader.family.name} has tensors of such shapes ({error})") from None


def load_flux(path: str | Path) -> Flux:
    """The engine over the file's weights, on the CPU, in evaluation mode."""
    reader = open_component(path, "FLUX.1")
    with torch.device("meta"):
        model = Flux(arch.FluxConfig.from_shapes(shapes_of(reader)))
    bind(model, reader)
    return model.eval()


class BothNamings:
    """A ControlNet's file in diffusers' names and, the blocks and embedders of FLUX.1, in BFL's: as a reader."""

    def __init__(self, own: Component) -> None:
        self.own, self.flux = own, Component(own, "", Family("FLUX.1", "", "diffusers"))
        self.path = own.path
        self.tensors = {**own.tensors, **self.flux.tensors}

    def read(self, name: str) -> tuple[Tensor, ...]:
        return (self.flux if name in self.flux.tensors else self.own).read(name)

    def pieces(self, name: str) -> tuple[str, ...]:
        """diffusers' names of what a weight is made of, where that would have to be unpacked to become one."""
        stored = self.flux.places.get(name)
        if stored is None or len(stored.names) == 1 or self.flux.tensors[name].format != "f32":
            return ()
        return () if all(self.own.tensors[piece].format == "f32" for piece in stored.names) else stored.names


XLABS = {  # our name of a module -> XLabs' own, where it is another
    "controlnet_x_embedder": "pos_embed_input",
    "input_hint_block.conv_in": "input_hint_block.0",
    **{f"input_hint_block.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(6)},
    "input_hint_block.conv_out": "input_hint_block.14",
}


class XLabsNaming:
    """A ControlNet as XLabs publishes it, BFL's names and a list of convolutions, as a reader."""

    def __init__(self, own: Component) -> None:
        self.own, self.path = own, own.path
        ours = {stored: name for name, stored in XLABS.items()}
        self.names = {}
        for name in own.tensors:
            module, _, kind = name.rpartition(".")
            self.names[f"{ours.get(module, module)}.{kind}"] = name
        self.tensors = {name: own.tensors[stored] for name, stored in self.names.items()}

    def read(self, name: str) -> tuple[Tensor, ...]:
        return self.own.read(self.names[name])

    def pieces(self, name: str) -> tuple[str, ...]:
        return ()


def open_controlnet(path: str | Path) -> BothNamings | XLabsNaming:
    reader = open_checkpoint(path)
    for component in components(reader):
        if component.family.name == "XLabs ControlNet":
            return XLabsNaming(component)
    return BothNamings(select(reader, "FLUX ControlNet"))


def load_controlnet(path: str | Path, base: arch.FluxConfig) -> ControlNet:
    """A net for models of that configuration, over the file's weights, on the CPU. Blocks without use stay in the file.

    UserError that names the file if the net is incomplete, or one for other models.
    """
    reader = open_controlnet(path)
    try:
        config = ControlNetConfig.from_shapes(shapes_of(reader), base)
    except UserError as error:
        raise UserError(f"{reader.path}: {error}") from None
    with torch.device("meta"):
        net = ControlNet(config)
        sources = joined_(net, reader)
    load_quantized_(net, reader, lambda name: sources.get(name, name))
    return net.eval()


def joined_(net: ControlNet, reader: BothNamings | XLabsNaming) -> dict[str, str]:
    """Linears whose stored pieces cannot be one become several. Parameter -> tensor, for those."""
    sources = {}
    for path, layer in list(net.named_modules()):
        if pieces := reader.pieces(f"{path}.weight") if isinstance(layer, nn.Linear) else ():
            rows = [reader.own.tensors[piece].shape[0] for piece in pieces]
            net.set_submodule(path, Joined([nn.Linear(layer.in_features, count) for count in rows]))
            for i, piece in enumerate(pieces):
                sources[f"{path}.parts.{i}.weight"] = piece
                sources[f"{path}.parts.{i}.bias"] = f"{piece.removesuffix('.weight')}.bias"
    return sources


def load_t5(path: str | Path) -> "T5EncoderModel":
    """A T5 v1.1 encoder; activations and norms stay in float32 (T5 overflows in float16)."""
    return open_t5(path)[0]


def open_t5(path: str | Path, cls: "type[T5EncoderModel] | None" = None) -> tuple["T5EncoderModel", Component]:
    """The encoder, a `cls`, and its file. Linears and the table of token vectors are views of it, still packed."""
    from transformers import T5Config, T5EncoderModel

    reader = open_component(path, "T5 encoder")
    with dimensions_of(reader), torch.device("meta"):
        config = t5_config(shapes_of(reader)) | {"feed_forward_proj": FAST_GELU}
        model = (cls or T5EncoderModel)(T5Config(**config))
    model.encoder.embed_tokens = model.shared
    bind(model, reader, packed=("shared",))
    model.encoder.embed_tokens = model.shared
    for block in model.encoder.block:
        feed_forward = block.layer[1].DenseReluDense
        feed_forward.wo = Opaque(feed_forward.wo)
    return model.eval(), reader


class Opaque(nn.Module):
    """A linear that hides its weight: transformers casts T5's hidden states to the dtype of `wo.weight`, bytes too."""

    weight = None

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """In float32 where the rest is in float16, which the last product of T5's feed-forward layers leaves."""
        return self.inner(x.float() if x.dtype == torch.float16 else x)


def load_clip(path: str | Path, end_of_text: int | None = None) -> "CLIPTextModel":
    """CLIP-L's text tower, its linears and token vectors still packed; activations in float32.

    `end_of_text` is the tokenizer's id of the token whose state is pooled: the last one, if nothing else is said.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    reader = open_component(path, "CLIP-L")
    shapes = {name: shape for name, shape in shapes_of(reader).items() if name.startswith("text_model.")}
    with dimensions_of(reader), torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**clip_config(shapes, end_of_text)))
    own = [name for name, _ in model.named_parameters()]
    missing = "" if all(name.startswith("text_model.") for name in own) else "text_model."  # by version of transformers
    report_difference({missing + name: tuple(p.shape) for name, p in model.named_parameters()}, shapes, reader.path)
    inner = "embeddings" if missing else "text_model.embeddings"
    load_quantized_(model, reader, lambda name: missing + name, packed=(f"{inner}.token_embedding",))
    embeddings = model.get_submodule(inner)
    embeddings.token_embedding.follows = True
    embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings).expand(1, -1)
    return model.eval()


def load_vae(path: str | Path, cls: "type[AutoencoderKL] | None" = None) -> "AutoencoderKL":
    """diffusers' AutoencoderKL, or a `cls` that is one, in float32."""
    from diffusers import AutoencoderKL

    reader = open_component(path, "VAE")
    tensors = {name: load(reader, name) for name in reader.tensors}
    with dimensions_of(reader):
        model = (cls or AutoencoderKL)(**vae_config(shapes_of(reader)))
    fill(model, vae_to_diffusers(tensors), reader.path)
    return model.eval()


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load a complete state; UserError with the first name that is missing or has another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    report_difference(expected, {name: tuple(tensor.shape) for name, tensor in state.items()}, path)
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)


def bind(model: nn.Module, reader: CheckpointReader, packed: Collection[str] = ()) -> None:
    """Give a model on the meta device its weights: linears as stored, the rest in float32.

    Names in the reader must be the model's, no more and no less. `packed` as in `load_quantized_`.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    report_difference(expected, shapes_of(reader), reader.path)
    load_quantized_(model, reader, packed=packed)


Source = str | tuple[str, slice]  # a tensor of a checkpoint, or some of its rows


def load_quantized_(
    module: nn.Module,
    reader: CheckpointReader,
    key_map: Callable[[str], Source] | None = None,
    packed: Collection[str] = (),
) -> nn.Module:
    """Give any module its weights from a checkpoint: linears stay packed as they are stored, the rest becomes float32.

    key_map: the name of a parameter in the module -> that of a tensor in the checkpoint (by default the same), or a
    pair of it and a slice, where the parameter is made of rows of a fused tensor. The module may be on the meta device.
    packed: names of `nn.Embedding`s that stay packed too.
    UserError with the first name that is missing or has another shape; nothing has been changed then.
    """
    sources = {name: key_map(name) if key_map else name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        check_source(sources[name], tuple(parameter.shape), reader)
    for path, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            fmt, parts = stored_rows(reader, sources[f"{path}.weight"])
            bias = None if layer.bias is None else floats(reader, sources[f"{path}.bias"])
            module.set_submodule(path, QuantLinear.from_parts(fmt, parts, bias))
            continue
        if path in packed:
            module.set_submodule(path, QuantEmbedding(*stored_rows(reader, sources[f"{path}.weight"])))
            continue
        for name, _ in list(layer.named_parameters(recurse=False)):
            value = floats(reader, sources[f"{path}.{name}" if path else name])
            setattr(layer, name, nn.Parameter(value, requires_grad=False))
    return module


def check_source(source: Source, shape: arch.Shape, reader: CheckpointReader) -> None:
    name, rows = (source, None) if isinstance(source, str) else source
    if name not in reader.tensors:
        raise UserError(f"{reader.path}: tensor {name} {list(shape)} is missing")
    found = tuple(reader.tensors[name].shape)
    if rows is not None:
        found = (len(range(*rows.indices(found[0]))), *found[1:])
    if found != shape:
        raise UserError(f"{reader.path}: tensor {name} gives {list(found)}, the model needs {list(shape)}")


def stored_rows(reader: CheckpointReader, source: Source) -> tuple[QuantFormat, tuple[Tensor, ...]]:
    """A weight as it is stored: its format, and views of the mapped file."""
    name, rows = (source, ...) if isinstance(source, str) else source
    return FORMATS[reader.tensors[name].format], tuple(take(reader.read(name), rows))


def floats(reader: CheckpointReader, source: Source) -> Tensor:
    if isinstance(source, str):
        return load(reader, source)
    name, rows = source
    return load(reader, name)[rows]


def report_difference(expected: Mapping[str, arch.Shape], found: Mapping[str, arch.Shape], path: Path) -> None:
    """UserError for the first difference between the tensors a model needs and those a file has."""
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{path}: tensor {name} {list(shape)} is missing")
        if tuple(found[name]) != shape:
            raise UserError(f"{path}: tensor {name} is {list(found[name])}, the model needs {list(shape)}")
    for name in found:
        if name not in expected:
            raise UserError(f"{path}: tensor {name} has no place in the model")
