"""Which model files ComfyUI's folders hold, for our nodes only.

ComfyUI lists no .gguf files; lists of our own do, over the same folders, so that other nodes' lists stay as they are.
A model in several files is listed once, by its first.
"""

import re
from pathlib import Path

import folder_paths

from flux_quant.converters.folders import SHARD, SUFFIXES
from flux_quant.errors import UserError

LISTS = {  # ours -> ComfyUI's folders
    "flux_quant_models": ("diffusion_models", "unet", "checkpoints"),
    "flux_quant_text_encoders": ("text_encoders", "clip"),
    "flux_quant_loras": ("loras",),
}
MODELS, ENCODERS, LORAS = LISTS
NAME = re.compile(r"[^\\/:*?\"<>|]+")


def refresh(kind: str) -> None:
    """The folders may have been added to, by extra_model_paths.yaml or by another node pack."""
    known = folder_paths.folder_names_and_paths
    folders = [place for name in LISTS[kind] if name in known for place in known[name][0]]
    known[kind] = (list(dict.fromkeys(folders)), {*SUFFIXES, ".sft"})


def names(kind: str) -> list[str]:
    refresh(kind)
    found = folder_paths.get_filename_list(kind)
    return [name for name in found if not (shard := SHARD.search(name)) or int(shard[1]) == 1]


def path_of(kind: str, name: str) -> Path:
    """UserError if it is gone."""
    refresh(kind)
    found = folder_paths.get_full_path(kind, name)
    if found is None:
        raise UserError(f"{name} is in none of ComfyUI's folders {', '.join(LISTS[kind])}")
    return Path(found)


def target_for(source: Path, name: str, suffix: str) -> Path:
    """A file beside the source. UserError for a name that is a path."""
    stem = name.strip().removesuffix(suffix)
    if not NAME.fullmatch(stem) or stem.startswith("."):
        raise UserError(f"{name!r}: give the new file a plain name; it is put beside {source.name}")
    return source.with_name(stem + suffix)
