"""Folders as diffusers and transformers write them: a config.json from the tensors' shapes, weights, perhaps in shards.

Names in them are the libraries' own. FP8 in such a folder is a plain cast: no class of theirs applies a scale it finds
beside a weight, so a scaled weight would be read as noise.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flux_quant.configs import Config, Shapes, clip_config, flux_config, t5_config, vae_config
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.output import staging_folder
from flux_quant.converters.shards import Sharding, split_files
from flux_quant.converters.writer import FilePlan
from flux_quant.errors import UserError

CONFIG = "config.json"
DEFAULT_SHARDING = Sharding(10 * 10**9)  # as diffusers' save_pretrained


@dataclass(frozen=True)
class Library:
    """How a family lies in a folder."""

    naming: str | None  # where it is not the canonical one
    stem: str  # of the weight files
    fixed: Config  # beside what follows from the tensors
    config: Callable[[Shapes], Config]


DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
LIBRARIES = {
    "FLUX.1": Library("diffusers", DIFFUSERS, {"_class_name": "FluxTransformer2DModel"}, flux_config),
    "VAE": Library("diffusers", DIFFUSERS, {"_class_name": "AutoencoderKL"}, vae_config),
    "T5 encoder": Library(
        None,
        TRANSFORMERS,
        {"architectures": ["T5EncoderModel"], "model_type": "t5", "is_encoder_decoder": False},
        t5_config,
    ),
    "CLIP-L": Library(
        None, TRANSFORMERS, {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}, clip_config
    ),
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
    config = json.dumps(library.fixed | library.config(shapes), indent=2) + "\n"
    return weights, {**extras, staging / CONFIG: config.encode()}
