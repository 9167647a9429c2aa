"""What a model's tensors should look like, and what breaks a GGUF file in one reader or another.

Of FLUX.1 every name and shape is known. Of the others it is known that blocks of one kind are alike: a tensor that one
of them has is missing in the rest, and a shape that most of them share is wrong elsewhere.
Traps: tried out with ComfyUI-GGUF, diffusers, stable-diffusion.cpp and llama.cpp.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from flux_quant import arch
from flux_quant.arch import FluxConfig
from flux_quant.converters.checkpoint import CheckpointReader
from flux_quant.converters.component import Component
from flux_quant.converters.gguf_io import SHAPE_KEY
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS, Shape

TIME_CHANNELS = 256  # of FLUX.1's timestep and guidance embedding

ARCHITECTURES = {"FLUX.1": ("flux",), "T5 encoder": ("t5encoder", "t5"), "SDXL": ("sdxl",)}  # general.architecture
ALIKE = ("FLUX ControlNet", "XLabs ControlNet", "T5 encoder", "CLIP-L", "CLIP-G")  # blocks of one kind are all alike
FIRST_BLOCK_ONLY = "layer.0.SelfAttention.relative_attention_bias.weight"  # of T5
REQUIRED = {  # family -> what it has beside blocks
    "T5 encoder": (
        "shared.weight",
        f"encoder.block.0.{FIRST_BLOCK_ONLY}",
        "encoder.final_layer_norm.weight",
    ),
    "CLIP-L": ("text_model.embeddings.position_embedding.weight", "text_model.final_layer_norm.weight"),
    "VAE": ("encoder.conv_out.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"),
    "SDXL": ("time_embed.0.weight", "label_emb.0.0.weight", "out.2.weight"),
    "FLUX Redux": ("redux_up.weight", "redux_up.bias", "redux_down.weight", "redux_down.bias"),
}


def flux_shapes(config: FluxConfig) -> dict[str, tuple[int, ...]]:
    """Shape of a FLUX.1 weight by the end of its module's name."""
    hidden, mlp = config.hidden, config.mlp
    return {
        "_norm": (config.head_dim,),
        "img_in": (hidden, config.in_channels),
        "txt_in": (hidden, config.context),
        "vector_in.in_layer": (hidden, config.pooled),
        ".in_layer": (hidden, TIME_CHANNELS),
        ".out_layer": (hidden, hidden),
        "_mod.lin": (6 * hidden, hidden),
        "modulation.lin": (3 * hidden, hidden),
        ".qkv": (3 * hidden, hidden),
        ".proj": (hidden, hidden),
        "mlp.0": (mlp, hidden),
        "mlp.2": (hidden, mlp),
        "linear1": (3 * hidden + mlp, hidden),
        "linear2": (hidden, hidden + mlp),
        "final_layer.linear": (config.out_channels, hidden),
        "adaLN_modulation.1": (2 * hidden, hidden),
    }


def model_problems(component: Component) -> Iterator[str]:
    """Tensors that are missing or have a shape that cannot be right; canonical names."""
    infos = {**component.tensors, **component.foreign}
    family = component.family.name
    yield from (f"{name} is missing" for name in REQUIRED.get(family, ()) if name not in infos)
    if family == "FLUX.1":
        yield from flux_problems({name: info.shape for name, info in infos.items()})
    elif family in ALIKE:
        yield from odd_blocks({name: info.shape for name, info in infos.items()})


def flux_problems(shapes: Mapping[str, Shape]) -> Iterator[str]:
    try:
        config = FluxConfig.from_shapes(shapes)
    except UserError as error:
        yield str(error)
        return
    yield from (f"{name} is missing" for name in arch.missing_tensors(shapes, config))
    table = flux_shapes(config)
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        expected = next((table[end] for end in table if module.endswith(end)), shape)
        expected = expected[:1] if kind == "bias" else expected
        if shape != expected:
            yield f"{name} has the shape {list(shape)}; {list(expected)} would fit the others"


def odd_blocks(shapes: Mapping[str, Shape]) -> Iterator[str]:
    """Blocks that lack a tensor that others of their kind have, or have it in another shape."""
    kinds: dict[tuple[str, str], dict[int, Shape]] = {}  # (name before, after the block's number) -> shape by number
    blocks: dict[str, int] = {}  # name before the number -> how many there should be
    for name, shape in shapes.items():
        kind, _, number = arch.block_of(name).rpartition(".")
        if kind:
            kinds.setdefault((kind, name.removeprefix(f"{kind}.{number}.")), {})[int(number)] = shape
            blocks[kind] = max(blocks.get(kind, 0), int(number) + 1)
    for (kind, end), found in kinds.items():
        if end != FIRST_BLOCK_ONLY:
            yield from (f"{kind}.{i}.{end} is missing" for i in range(blocks[kind]) if i not in found)
        usual, _ = Counter(found.values()).most_common(1)[0]
        for i, shape in found.items():
            if shape != usual:
                yield f"{kind}.{i}.{end} has the shape {list(shape)}; other blocks have {list(usual)}"


def gguf_warnings(reader: CheckpointReader, found: list[Component]) -> Iterator[str]:
    """What one reader or another makes of a GGUF file that we can read."""
    infos = {**reader.tensors, **reader.foreign}
    kinds = {name: reader.stored_as(name) for name in infos}
    family = found[0].family.name if found else ""
    yield from architecture_warnings(reader.metadata, family, set(kinds.values()))
    if reader.metadata.get("split.count", 1) != 1:
        yield "the model is split: ComfyUI-GGUF, diffusers and stable-diffusion.cpp read the first file alone"
    if reader.foreign:
        foreign = ", ".join(sorted({info.format for info in reader.foreign.values()}))
        yield f"{len(reader.foreign)} tensors of the type {foreign} were not checked; diffusers cannot read them either"
    if any(component.prefix for component in found):
        yield f"names begin with {found[0].prefix}, which some tools for GGUF refuse"
    vectors = [name for name, info in infos.items() if len(info.shape) == 1 and kinds[name] not in ("f32", "f16")]
    if vectors:
        what = f"{len(vectors)} vectors are neither F32 nor F16 ({vectors[0]}: {kinds[vectors[0]]})"
        yield f"{what}: diffusers cannot compute with them"
    if family == "FLUX.1":
        yield from flux_warnings(reader, found[0])


def architecture_warnings(metadata: Mapping[str, object], family: str, kinds: Collection[str]) -> Iterator[str]:
    named, expected = metadata.get("general.architecture"), ARCHITECTURES.get(family, ())
    if named is None:
        yield "general.architecture is missing: ComfyUI-GGUF refuses text encoders without it and guesses other models"
    elif expected and named not in expected:
        yield f"general.architecture is {named}; readers expect {expected[0]} for a {family}"
    if (
        any(kind not in FORMATS or not FORMATS[kind].is_plain for kind in kinds)
        and "general.quantization_version" not in metadata
    ):
        yield "general.quantization_version is missing, which the format demands of quantized files"


def flux_warnings(reader: CheckpointReader, component: Component) -> Iterator[str]:
    kind = component.stored_as("img_in.weight") if "img_in.weight" in component.places else "f32"
    if kind not in ("f32", "f16"):
        yield f"img_in.weight is {kind}: diffusers takes its width in bytes for the model's variant"
    reshaped = [key for key in reader.metadata if key.startswith(SHAPE_KEY)]
    if reshaped:
        yield f"{len(reshaped)} tensors are reshaped ({reshaped[0]}): only ComfyUI-GGUF knows how to read them"
