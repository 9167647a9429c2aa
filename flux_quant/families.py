"""Which model is it? Told from tensor names and shapes, never from a file's name.

A signature is a few names that only one family has. Relatives that are other architectures have their own rows, so
that nothing is taken for what it merely resembles.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from flux_quant.naming import Shape

Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Family:
    """What a set of tensor names and shapes is."""

    name: str  # "FLUX.1", "T5 encoder", "CLIP-L", "VAE", ..., or a relative that is none of ours: "FLUX.2", "Chroma"
    variant: str  # "dev", "schnell", "Fill", ...; empty where there is only one
    naming: str  # "BFL", "diffusers", "Hugging Face", "llama.cpp", ...: a column of layouts.TABLES


def has(*patterns: str) -> Callable[[Shapes], bool]:
    """A test: every pattern (a name, or a glob) matches a name."""

    def matches(shapes: Shapes) -> bool:
        return all(
            any(fnmatchcase(name, pattern) for name in shapes) if "*" in pattern else pattern in shapes
            for pattern in patterns
        )

    return matches


def clip_g(embedding: str, other: str) -> Callable[[Shapes], bool]:
    """The text encoder of OpenCLIP bigG, which SDXL uses beside CLIP-L: same names, 1280 wide."""
    return lambda shapes: shapes.get(embedding, ())[-1:] == (1280,) and other in shapes


ATTENTION = "encoder.layers.0.self_attn.q_proj.weight"  # of every CLIP text model

# The first row that matches. FLUX.1 itself is told from relatives that are not listed (Bria, LongCat, Ovis) by the
# embedding of CLIP's pooled vector, which they lack; SDXL from other UNets by its label embedding and its depth.
SIGNATURES: tuple[tuple[Callable[[Shapes], bool], str, str], ...] = (
    (has("double_stream_modulation_img.lin.weight"), "FLUX.2", "BFL"),
    (has("double_stream_modulation_img.linear.weight"), "FLUX.2", "diffusers"),
    (has("distilled_guidance_layer.norms.0.*", "double_blocks.0.*"), "Chroma", "BFL"),
    (has("distilled_guidance_layer.norms.0.*", "transformer_blocks.0.*"), "Chroma", "diffusers"),
    (has("controlnet_blocks.0.weight", "double_blocks.0.*"), "XLabs ControlNet", "BFL"),
    (
        has(
            "controlnet_x_embedder.weight",
            "transformer_blocks.0.attn.add_q_proj.weight",
            "time_text_embed.text_embedder.linear_1.weight",
        ),
        "FLUX ControlNet",
        "diffusers",
    ),
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
    (has("redux_up.weight", "redux_down.weight"), "FLUX Redux", "BFL"),
    (has("label_emb.0.0.weight", "input_blocks.*.transformer_blocks.1.attn2.to_k.weight"), "SDXL", "SGM"),
    (has("add_embedding.linear_1.weight", "down_blocks.*.transformer_blocks.1.attn2.to_k.weight"), "SDXL", "diffusers"),
    (has("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"), "UMT5 encoder", "Hugging Face"),
    (has("encoder.block.0.layer.1.DenseReluDense.wi_1.weight"), "T5 encoder", "Hugging Face"),
    (has("enc.blk.1.attn_rel_b.weight"), "UMT5 encoder", "llama.cpp"),
    (has("enc.blk.0.attn_q.weight", "token_embd.weight"), "T5 encoder", "llama.cpp"),
    (has(f"text_model.{ATTENTION}", "text_model.head.weight"), "SigLIP", "Hugging Face"),
    (clip_g("text_model.embeddings.token_embedding.weight", f"text_model.{ATTENTION}"), "CLIP-G", "Hugging Face"),
    (has(f"text_model.{ATTENTION}"), "CLIP-L", "Hugging Face"),
    (has(ATTENTION, "embeddings.token_embedding.weight", "head.weight"), "SigLIP", "transformers 5"),
    (clip_g("embeddings.token_embedding.weight", ATTENTION), "CLIP-G", "transformers 5"),
    (has(ATTENTION, "embeddings.token_embedding.weight"), "CLIP-L", "transformers 5"),
    (clip_g("token_embedding.weight", "transformer.resblocks.0.attn.in_proj_weight"), "CLIP-G", "OpenAI"),
    (has("transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"), "CLIP-L", "OpenAI"),
    (has("decoder.up.0.block.0.conv1.weight", "encoder.conv_in.weight"), "VAE", "BFL"),
    (has("decoder.up_blocks.0.resnets.0.conv1.weight", "encoder.conv_in.weight"), "VAE", "diffusers"),
)
PREFIXES = (  # of the components; "" is a file of one component
    "",
    # all-in-one files: FLUX.1 as ComfyUI saves it
    "model.diffusion_model.",
    "text_encoders.t5xxl.transformer.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.transformer.",
    "vae.",
    # SDXL as Stability publishes it: base has two text encoders, refiner one
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.0.model.",
    "conditioner.embedders.1.model.",
    "first_stage_model.",
    # folders of a diffusers pipeline
    "transformer/",
    "unet/",
    "controlnet/",
    "text_encoder/",
    "text_encoder_2/",
    "vae/",
)
VARIANTS_BY_INPUT = {64: "dev", 128: "Depth or Canny", 384: "Fill"}  # columns of img_in.weight
DOWNSAMPLERS = {
    "SGM": r"input_blocks\.\d+\.0\.op\.weight",
    "diffusers": r"down_blocks\.\d+\.downsamplers\.0\.conv\.weight",
}
SDXL_VARIANTS = {3: "base", 4: "refiner"}  # levels of resolution


def identify(shapes: Shapes) -> Family | None:
    """The family of a file's tensors (names without any prefix, unpacked shapes), or None."""
    for matches, family, naming in SIGNATURES:
        if matches(shapes):
            return Family(family, VARIANTS[family](shapes, naming) if family in VARIANTS else "", naming)
    return None


def identify_all(shapes: Shapes) -> dict[str, Family]:
    """Prefix -> family, for every component of a file; empty if none is known."""
    found = {}
    for prefix in PREFIXES:
        names = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        if family := identify(names):
            found[prefix] = family
    return found


def flux_variant(shapes: Shapes, naming: str) -> str:
    """By shape alone; Krea and Kontext have exactly the shapes of dev."""
    first, guidance = {
        "BFL": ("img_in.weight", "guidance_in.in_layer.weight"),
        "diffusers": ("x_embedder.weight", "time_text_embed.guidance_embedder.linear_1.weight"),
    }[naming]
    if guidance not in shapes:
        return "schnell"
    columns = shapes[first][-1] if shapes[first] else 0
    return VARIANTS_BY_INPUT.get(columns, f"unknown ({columns} input channels)")


def controlnet_variant(shapes: Shapes, naming: str) -> str:
    """Union models embed their mode; Alimama's inpainting gets 4 mask values per patch beside the latent."""
    if "controlnet_mode_embedder.weight" in shapes:
        return "Union"
    return "inpainting" if shapes["controlnet_x_embedder.weight"][-1:] == (68,) else ""


def sdxl_variant(shapes: Shapes, naming: str) -> str:
    levels = 1 + sum(bool(re.fullmatch(DOWNSAMPLERS[naming], name)) for name in shapes)
    return SDXL_VARIANTS.get(levels, f"unknown ({levels} levels)")


VARIANTS = {"FLUX.1": flux_variant, "FLUX ControlNet": controlnet_variant, "SDXL": sdxl_variant}
