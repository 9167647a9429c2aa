"""Which files make a picture: the transformer, two text encoders, the VAE, the tokenizers; found beside each other.

A model folder is laid out as ComfyUI's: `diffusion_models` (or `unet`), `text_encoders` (or `clip`), `vae`, and beside
them `tokenizers` with the folders `t5` and `clip`; or as diffusers': `transformer`, `text_encoder`, `text_encoder_2`,
`vae`, `tokenizer`, `tokenizer_2`. Models are told apart by their tensors, never by their names.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flux_quant.converters.checkpoint import open_checkpoint
from flux_quant.converters.component import components
from flux_quant.converters.folders import SUFFIXES, is_model, sets_in
from flux_quant.errors import UserError

FOLDERS = {  # component -> folders of a ComfyUI models directory, newest name first
    "transformer": ("diffusion_models", "unet", "transformer"),
    "t5": ("text_encoders", "clip", "text_encoder_2"),
    "clip": ("text_encoders", "clip", "text_encoder"),
    "vae": ("vae",),
}
FAMILIES = {"transformer": "FLUX.1", "t5": "T5 encoder", "clip": "CLIP-L", "vae": "VAE"}
BUNDLED = Path(__file__).parent / "tiny_flux"  # the trained model that ships with the package


@dataclass(frozen=True)
class Components:
    """The files of one complete model."""

    transformer: Path
    t5: Path
    clip: Path
    vae: Path
    tokenizers: Path


def find_components(
    model: Path,
    t5: Path | None = None,
    clip: Path | None = None,
    vae: Path | None = None,
    tokenizers: Path | None = None,
) -> Components:
    """Everything beside `model`, a transformer (a file, a shard, a folder) or a directory of models, that is not given.

    UserError that names what is missing, where it was looked for, and the option to give it.
    """
    if not model.exists():
        raise UserError(f"{model}: no such file or directory")
    alone = model.is_dir() and is_model(model)
    roots = [model] if model.is_dir() and not alone else [model.parent, model.parent.parent]
    transformer = model if model.is_file() or alone else choose("transformer", roots, "--model FILE")

    def beside(component: str) -> Path:
        """An all-in-one file has its own."""
        own = matches(transformer, FAMILIES[component])
        return transformer if own else choose(component, roots, f"--{component}")

    return Components(
        transformer=transformer,
        t5=t5 or beside("t5"),
        clip=clip or beside("clip"),
        vae=vae or beside("vae"),
        tokenizers=tokenizers or find_tokenizers(roots),
    )


def choose(component: str, roots: list[Path], option: str) -> Path:
    """The one model of this kind in the component's folders below the roots."""
    family = FAMILIES[component]
    found = [path for path in candidates(component, roots) if matches(path, family)]
    if len(found) == 1:
        return found[0]
    places = ", ".join(str(root / name) for root in roots for name in FOLDERS[component])
    if not found:
        raise UserError(f"no {family} file found in {', '.join(map(str, roots))} or {places}; give it with {option}")
    raise UserError(f"{len(found)} {family} files ({', '.join(path.name for path in found)}); choose with {option}")


def candidates(component: str, roots: list[Path]) -> Iterator[Path]:
    """Models in the roots and in the component's folders, each once: files, and first shards."""
    folders = dict.fromkeys(folder for root in roots for folder in (root, *(root / n for n in FOLDERS[component])))
    for folder in folders:
        if folder.is_dir():
            yield from (path for path in sets_in(folder).values() if path.suffix.lower() in SUFFIXES)


def matches(path: Path, family: str) -> bool:
    """Whether the file is of this family. Damaged neighbours are not our business here."""
    try:
        with open_checkpoint(path) as reader:
            return any(component.family.name == family for component in components(reader))
    except UserError:
        return False


def picture_size(text: str | None, transformer: Path) -> tuple[int, int]:
    """Width and height from "768x512" or "512"; without it what the file's metadata recommend, else 1024 x 1024."""
    if text is None:
        return recommended_size(transformer)
    return parse_pixels(text)


def recommended_size(transformer: Path) -> tuple[int, int]:
    with open_checkpoint(transformer) as reader:
        return parse_pixels(str(reader.metadata.get("modelspec.resolution", "1024x1024")))


def parse_pixels(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if not found:
        raise UserError(f"size {text}: write it as WIDTHxHEIGHT, for example 1024x768")
    return int(found[1]), int(found[2] or found[1])


def find_tokenizers(roots: list[Path]) -> Path:
    """A folder that holds `t5` and `clip` (or diffusers' `tokenizer_2` and `tokenizer`)."""
    for root in roots:
        for folder in (root / "tokenizers", root):
            if any((folder / name).is_dir() for name in ("tokenizer_2", "t5")):
                return folder
    raise UserError(
        f"no tokenizers in {' or '.join(str(root / 'tokenizers') for root in roots)}; give with --tokenizers a folder "
        "that holds tokenizer and tokenizer_2 of the FLUX.1 repository (under 4 MB, no weights)"
    )
