"""Folders as diffusers and transformers write them: a config.json from the tensors' shapes, weights, perhaps in shards.

Names in them are the libraries' own. FP8 in such a folder is a plain cast: no class of theirs applies a scale it finds
beside a weight, so a scaled weight would be read as noise.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flux_quant import arch
from flux_quant.arch import FluxConfig
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.output import staging_folder
from flux_quant.converters.shards import Sharding, split_files
from flux_quant.converters.writer import FilePlan
from flux_quant.errors import UserError
from flux_quant.formats import Shape

Shapes = Mapping[str, Shape]
Config = dict[str, object]
CONFIG = "config.json"
DEFAULT_SHARDING = Sharding(10 * 10**9)  # as diffusers' save_pretrained


def flux_config(shapes: Shapes) -> Config:
    return {"_class_name": "FluxTransformer2DModel"} | FluxConfig.from_shapes(shapes).diffusers()


def vae_config(shapes: Shapes) -> Config:
    return {"_class_name": "AutoencoderKL"} | arch.vae_config(shapes)


def t5_config(shapes: Shapes) -> Config:
    """Arguments of transformers' T5Config for the encoder of T5 1.1."""
    block = "encoder.block.0.layer."
    buckets, heads = shapes[f"{block}0.SelfAttention.relative_attention_bias.weight"]
    vocabulary, width = shapes["shared.weight"]
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{block}0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes[f"{block}1.DenseReluDense.wi_0.weight"][0],
        "num_layers": arch.count_blocks(shapes, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "dropout_rate": 0.0,
    }


def clip_config(shapes: Shapes) -> Config:
    """Arguments of transformers' CLIPTextConfig. Token ids are those of CLIP's own vocabulary, its last two."""
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": arch.count_blocks(shapes, "text_model.encoder.layers."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
        "projection_dim": width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1,
    }


@dataclass(frozen=True)
class Library:
    """How a family lies in a folder."""

    naming: str
    stem: str  # of the weight files
    config: Callable[[Shapes], Config]


DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
LIBRARIES = {
    "FLUX.1": Library("diffusers", DIFFUSERS, flux_config),
    "VAE": Library("diffusers", DIFFUSERS, vae_config),
    "T5 encoder": Library("Hugging Face", TRANSFORMERS, t5_config),
    "CLIP-L": Library("Hugging Face", TRANSFORMERS, clip_config),
}
NAMINGS = {family: library.naming for family, library in LIBRARIES.items()}


def files(
    folder: Path, family: str, shapes: Shapes, infos: Sequence[TensorInfo], sharding: Sharding | None
) -> tuple[list[FilePlan], dict[Path, bytes]]:
    """The files of a folder, where they lie until it appears: weights, and small ones with their content.

    shapes: canonical names; infos: what is written, in the library's names.
    """
    if family not in LIBRARIES:
        raise UserError(f"a {family} is not written as a folder; name a .safetensors file")
    if scaled := next((info.name for info in infos if info.format == "fp8"), None):
        raise UserError(f"scales of FP8 weights ({scaled}) are not read from such a folder; use --format fp8_plain")
    library = LIBRARIES[family]
    staging = staging_folder(folder)
    path = staging / f"{library.stem}.safetensors"
    weights, extras = split_files(path, infos, {}, sharding or DEFAULT_SHARDING)
    config = json.dumps(library.config(shapes), indent=2) + "\n"
    return weights, {**extras, staging / CONFIG: config.encode()}
