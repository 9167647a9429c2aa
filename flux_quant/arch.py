"""Model families as data: what tells them apart, how they are named elsewhere, how big they are.

Nothing is taken from a file's name or from a variant's nominal size: every dimension comes from tensor shapes, so a
small model of the same architecture works everywhere. Names and layouts: black-forest-labs/flux (`model.py`,
`autoencoder.py`), diffusers' `convert_flux_to_diffusers.py` and `convert_ldm_vae_checkpoint`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from flux_quant.errors import UserError

Shape = tuple[int, ...]

# --- FLUX.1 transformer -----------------------------------------------------------------------------------------------

# BFL name -> the diffusers names of its rows, from the top. Every name stands for a weight and, where there is one,
# a bias. `final_layer` holds (shift, scale) where diffusers holds (scale, shift): see SWAPPED_HALVES.
DOUBLE_BLOCK_MAP = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE_BLOCK_MAP = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
OUTER_MAP = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
KEY_MAP: dict[str, tuple[str, ...]] = {
    **OUTER_MAP,
    **{
        f"double_blocks.{{}}.{bfl}": tuple(f"transformer_blocks.{{}}.{name}" for name in names)
        for bfl, names in DOUBLE_BLOCK_MAP.items()
    },
    **{
        f"single_blocks.{{}}.{bfl}": tuple(f"single_transformer_blocks.{{}}.{name}" for name in names)
        for bfl, names in SINGLE_BLOCK_MAP.items()
    },
}
SWAPPED_HALVES = "final_layer.adaLN_modulation.1"
BLOCK = re.compile(  # FLUX.1 in BFL and diffusers names, T5 in Hugging Face and llama.cpp names, CLIP-L
    r"(?:double_blocks|single_blocks|transformer_blocks|single_transformer_blocks"
    r"|encoder\.block|enc\.blk|text_model\.encoder\.layers)\.\d+"
)

STAGES = {"double_blocks": 1, "single_blocks": 2, "final_layer": 3}  # everything else comes first
POSITIONS = {name: position for position, name in enumerate(KEY_MAP)}

# The ten linears outside the blocks: every converter keeps them precise.
OUTSIDE_BLOCKS = tuple(f"{name}.*" for name in OUTER_MAP)


@dataclass(frozen=True)
class FluxConfig:
    """Dimensions of a FLUX.1 transformer, read off its tensors."""

    in_channels: int  # of a packed 2 x 2 latent patch; 64, or more with conditioning channels
    out_channels: int
    hidden: int
    head_dim: int
    mlp: int
    context: int  # width of the T5 features
    pooled: int  # width of the CLIP vector
    double_blocks: int
    single_blocks: int
    guidance: bool

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """Rotary channels for (index, row, column): 16, 56, 56 of FLUX.1's 128, in proportion for other sizes."""
        eighth = self.head_dim // 8
        return eighth, (self.head_dim - eighth) // 2, (self.head_dim - eighth) // 2

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> "FluxConfig":
        """From BFL tensor names and shapes (rows, columns) of the unpacked weights."""
        try:
            hidden, in_channels = shapes["img_in.weight"]
            return cls(
                in_channels=in_channels,
                out_channels=shapes["final_layer.linear.weight"][0],
                hidden=hidden,
                head_dim=shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0],
                mlp=shapes["double_blocks.0.img_mlp.0.weight"][0],
                context=shapes["txt_in.weight"][1],
                pooled=shapes["vector_in.in_layer.weight"][1],
                double_blocks=count_blocks(shapes, "double_blocks."),
                single_blocks=count_blocks(shapes, "single_blocks."),
                guidance="guidance_in.in_layer.weight" in shapes,
            )
        except KeyError as missing:
            raise UserError(f"not a complete FLUX.1 transformer: tensor {missing} is missing") from None

    def diffusers(self) -> dict[str, object]:
        """Arguments of diffusers' FluxTransformer2DModel."""
        return dict(
            patch_size=1,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            num_layers=self.double_blocks,
            num_single_layers=self.single_blocks,
            attention_head_dim=self.head_dim,
            num_attention_heads=self.heads,
            joint_attention_dim=self.context,
            pooled_projection_dim=self.pooled,
            guidance_embeds=self.guidance,
            axes_dims_rope=self.rope_axes,
        )


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow `prefix`, which ends in a dot."""
    return len({name[len(prefix) :].split(".", 1)[0] for name in names if name.startswith(prefix)})


def block_of(name: str) -> str:
    """`double_blocks.3` for a tensor of that block, `outside blocks` for the others."""
    found = BLOCK.match(name)
    return found.group() if found else "outside blocks"


def running_order(name: str) -> tuple[int, int, int, str]:
    """Sort key of BFL names: embedders, double blocks, single blocks, final layer, each in the order of KEY_MAP."""
    module, _, kind = name.rpartition(".")
    pattern, blocks = re.subn(r"(?<=_blocks\.)\d+", "{}", module, count=1)
    stage = STAGES.get(name.split(".")[0], 0)
    return stage, int(name.split(".")[1]) if blocks else 0, POSITIONS.get(pattern, len(POSITIONS)), kind


def missing_tensors(names: Collection[str], config: FluxConfig) -> list[str]:
    """BFL names that a transformer of this configuration has and `names` has not."""
    expected = []
    for module in KEY_MAP:
        if module.startswith("guidance_in.") and not config.guidance:
            continue
        kinds = ("scale",) if module.endswith("_norm") else ("weight", "bias")
        blocks = {"double": config.double_blocks, "single": config.single_blocks}.get(module.split("_")[0], 1)
        expected += [f"{module.format(i)}.{kind}" for i in range(blocks) for kind in kinds]
    return [name for name in expected if name not in names]


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FLUX.1 tensors in BFL names -> diffusers names: rows are cut, the final modulation's halves change places."""
    hidden = tensors["img_in.weight"].shape[0]
    out = {}
    for name, tensor in tensors.items():
        module, kind = name.rsplit(".", 1)
        index = re.search(r"_blocks\.(\d+)\.", name)
        pattern = module.replace(f"_blocks.{index[1]}.", "_blocks.{}.", 1) if index else module
        targets = KEY_MAP[pattern]
        if module == SWAPPED_HALVES:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        rows = [hidden] * len(targets) if len(targets) > 1 else [tensor.shape[0]]
        rows[-1] = tensor.shape[0] - sum(rows[:-1])
        kind = "weight" if kind == "scale" else kind
        for target, piece in zip(targets, tensor.split(rows), strict=True):
            out[f"{target.format(index[1]) if index else target}.{kind}"] = piece
    return out


# --- VAE --------------------------------------------------------------------------------------------------------------

LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159  # model input = (latent - shift) * scale

VAE_NAMES = (  # BFL, diffusers; `{}` stands for a number or a letter. `up` is counted from the other end.
    (".norm_out.", ".conv_norm_out."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    (".mid.attn_1.{}.", ".mid_block.attentions.0.to_{}."),
    (".down.{}.block.{}.", ".down_blocks.{}.resnets.{}."),
    (".down.{}.downsample.", ".down_blocks.{}.downsamplers.0."),
    (".up.{}.block.{}.", ".up_blocks.{}.resnets.{}."),
    (".up.{}.upsample.", ".up_blocks.{}.upsamplers.0."),
    (".nin_shortcut.", ".conv_shortcut."),
)


def vae_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VAE tensors in BFL names -> names and shapes of diffusers' AutoencoderKL (1 x 1 convolutions become linears)."""
    last = count_blocks(tensors, "decoder.up.") - 1
    out = {}
    for name, tensor in tensors.items():
        target = mirrored_level(renamed(name, VAE_NAMES), "up_blocks", last)
        out[target] = tensor[:, :, 0, 0] if ".attentions." in target and tensor.ndim == 4 else tensor
    return out


def vae_from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `vae_to_diffusers`."""
    last = count_blocks(tensors, "decoder.up_blocks.") - 1
    names = tuple((diffusers, bfl) for bfl, diffusers in VAE_NAMES)
    out = {}
    for name, tensor in tensors.items():
        target = mirrored_level(renamed(name, names), "up", last)
        out[target] = tensor[:, :, None, None] if ".attn_1." in target and tensor.ndim == 2 else tensor
    return out


def renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Every first part of a pair that is found in the name gives way to the second."""
    for old, new in pairs:
        numbers = iter(range(1, 10))
        replacement = re.sub(r"{}", lambda _, n=numbers: rf"\g<{next(n)}>", new)
        name = re.sub(re.escape(old).replace(r"\{\}", r"(\w+)"), replacement, name)
    return name


def mirrored_level(name: str, key: str, last: int) -> str:
    return re.sub(rf"\.{key}\.(\d+)\.", lambda found: f".{key}.{last - int(found[1])}.", name)


def vae_config(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Arguments of diffusers' AutoencoderKL for VAE tensors in BFL names."""
    levels = count_blocks(tensors, "encoder.down.")
    widths = tuple(tensors[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels))
    return dict(
        block_out_channels=widths,
        norm_num_groups=widths[0] // 4,  # 32 in FLUX.1; no tensor tells, so smaller models keep 4 channels a group
        layers_per_block=count_blocks(tensors, "encoder.down.0.block."),
        latent_channels=tensors["decoder.conv_in.weight"].shape[1],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=LATENT_SCALE,
        shift_factor=LATENT_SHIFT,
    )


# --- Which family is it? ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """What a set of tensor names and shapes is."""

    name: str  # "FLUX.1", "T5 encoder", "CLIP-L", "VAE", or a relative that is none of ours: "FLUX.2", "Chroma"
    variant: str  # "dev", "schnell", "Fill", ...; empty where there is only one
    naming: str  # "BFL", "diffusers", "Hugging Face", "llama.cpp"


def has(*patterns: str) -> Callable[[Mapping[str, Shape]], bool]:
    """A test: every pattern (a glob) matches a name."""
    return lambda shapes: all(any(fnmatchcase(name, pattern) for name in shapes) for pattern in patterns)


# The first row that matches. Relatives of FLUX.1 that are other architectures come first; FLUX.1 itself is told from
# those not listed (Bria, LongCat, Ovis) by the embedding of CLIP's pooled vector, which they lack.
SIGNATURES: tuple[tuple[Callable[[Mapping[str, Shape]], bool], str, str], ...] = (
    (has("double_stream_modulation_img.lin.weight"), "FLUX.2", "BFL"),
    (has("double_stream_modulation_img.linear.weight"), "FLUX.2", "diffusers"),
    (has("distilled_guidance_layer.norms.0.*", "double_blocks.0.*"), "Chroma", "BFL"),
    (has("distilled_guidance_layer.norms.0.*", "transformer_blocks.0.*"), "Chroma", "diffusers"),
    (has("double_blocks.0.img_attn.norm.key_norm.*", "img_in.weight", "vector_in.in_layer.weight"), "FLUX.1", "BFL"),
    (
        has(
            "transformer_blocks.0.attn.add_q_proj.weight",
            "x_embedder.weight",
            "time_text_embed.text_embedder.linear_1.weight",
        ),
        "FLUX.1",
        "diffusers",
    ),
    (has("encoder.block.0.layer.1.DenseReluDense.wi_1.weight"), "T5 encoder", "Hugging Face"),
    (has("enc.blk.0.attn_q.weight", "token_embd.weight"), "T5 encoder", "llama.cpp"),
    (has("text_model.encoder.layers.0.self_attn.q_proj.weight"), "CLIP-L", "Hugging Face"),
    (has("decoder.up.0.block.0.conv1.weight", "encoder.conv_in.weight"), "VAE", "BFL"),
    (has("decoder.up_blocks.0.resnets.0.conv1.weight", "encoder.conv_in.weight"), "VAE", "diffusers"),
)
PREFIXES = (  # of the components in an all-in-one file; "" is a file of one component
    "",
    "model.diffusion_model.",
    "text_encoders.t5xxl.transformer.",
    "text_encoders.clip_l.transformer.",
    "vae.",
)
VARIANTS_BY_INPUT = {64: "dev", 128: "Depth or Canny", 384: "Fill"}  # columns of img_in.weight


def identify(shapes: Mapping[str, Shape]) -> Family | None:
    """The family of a file's tensors (names without any prefix, unpacked shapes), or None."""
    for matches, family, naming in SIGNATURES:
        if matches(shapes):
            return Family(family, flux_variant(shapes, naming) if family == "FLUX.1" else "", naming)
    return None


def identify_all(shapes: Mapping[str, Shape]) -> dict[str, Family]:
    """Prefix -> family, for every component of a file; empty if none is known."""
    found = {}
    for prefix in PREFIXES:
        names = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        if family := identify(names):
            found[prefix] = family
    return found


def canonical_name(name: str, family: Family) -> str:
    """The name as its first publisher wrote it: files saved by ComfyUI call FLUX.1's norm scales `weight`."""
    if (family.name, family.naming) == ("FLUX.1", "BFL"):
        return re.sub(r"(query|key)_norm\.weight$", r"\1_norm.scale", name)
    return name


def flux_variant(shapes: Mapping[str, Shape], naming: str) -> str:
    """By shape alone; Krea and Kontext have exactly the shapes of dev."""
    first, guidance = {
        "BFL": ("img_in.weight", "guidance_in.in_layer.weight"),
        "diffusers": ("x_embedder.weight", "time_text_embed.guidance_embedder.linear_1.weight"),
    }[naming]
    if guidance not in shapes:
        return "schnell"
    columns = shapes[first][1]
    return VARIANTS_BY_INPUT.get(columns, f"unknown ({columns} input channels)")
