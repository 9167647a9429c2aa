"""Which files make up what a path names: a file, an index, a shard, a folder with one model, a pipeline's folder.

A set of files is one model: `model.safetensors` alone, or `model-00001-of-00003.safetensors` and its siblings. Variants
(`model.fp16.safetensors`) are other sets beside it. Nothing is opened here but JSON.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flux_quant.errors import UserError

SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.)")
SUFFIXES = (".safetensors", ".gguf")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # in folders of models; elsewhere such files may be anything
PIPELINE = "model_index.json"
COMPONENTS = ("transformer", "unet", "controlnet", "text_encoder", "text_encoder_2", "vae")  # what we look for in it
LARGEST_INDEX = 50_000_000  # bytes; that of FLUX.1 has 120,000


@dataclass(frozen=True)
class Source:
    """Files in order, each with the prefix that its tensors get; names that an index promises."""

    files: tuple[tuple[str, Path], ...]
    promised: frozenset[str] = field(default=frozenset())


def resolve(path: Path) -> Source:
    """UserError if files are missing or the choice is not clear."""
    if not path.is_dir():
        if path.name == PIPELINE:
            return resolve(path.parent)
        if path.suffix == ".json":
            return from_index(path)
        return Source(tuple(("", file) for file in siblings(path)))
    if (path / PIPELINE).is_file():
        folders = pipeline_folders(path)
        if not folders:
            raise UserError(f"{path}: none of its folders ({', '.join(COMPONENTS)}) holds a model")
        return Source(tuple((f"{folder.name}/", file) for folder in folders for file in model_set(folder)))
    return Source(tuple(("", file) for file in model_set(path)))


def pipeline_folders(path: Path) -> list[Path]:
    """The folders of a diffusers pipeline that hold weights."""
    return [path / name for name in COMPONENTS if any(weight_files(path / name, SUFFIXES + PICKLES))]


def from_index(path: Path) -> Source:
    """`*.index.json`: {"weight_map": {tensor: file beside the index}}."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{path} is no index of shards: it has no weight_map")
    files = sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{path} names the file {name!r}, which is not beside it")
    if missing := [name for name in files if not (path.parent / name).is_file()]:
        raise UserError(f"{path}: {len(missing)} of {len(files)} files are missing, the first is {missing[0]}")
    return Source(tuple(("", path.parent / name) for name in files), frozenset(weight_map))


def read_json(path: Path) -> dict:
    if path.stat().st_size > LARGEST_INDEX:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, too many for an index")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged (not JSON)") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (not a table)")
    return content


def siblings(path: Path) -> list[Path]:
    """All shards of the set that this file belongs to; the file alone if its name is not that of a shard."""
    found = SHARD.search(path.name)
    if not found:
        return [path]
    count = int(found[2])
    if not 1 <= int(found[1]) <= count:
        raise UserError(f"{path}: there is no shard {int(found[1])} of {count}")
    head, tail = path.name[: found.start()], path.name[found.end() :]
    shards = [path.with_name(f"{head}-{i:05}-of-{count:05}{tail}") for i in range(1, count + 1)]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(f"{path}: {len(missing)} of {count} shards are missing, the first is {missing[0]}")
    return shards


def weight_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())


def sets_in(folder: Path) -> dict[str, Path]:
    """The models of a folder: label -> its first file. Pickles only where nothing else lies."""
    found: dict[str, Path] = {}
    files = weight_files(folder, SUFFIXES) or (weight_files(folder, PICKLES) if is_model(folder) else [])
    for path in files:
        shard = SHARD.search(path.name)
        label = SHARD.sub(f" ({int(shard[2])} shards)", path.name) if shard else path.name
        found.setdefault(label, path)
    return found


def is_model(folder: Path) -> bool:
    """Whether a library has saved one model here."""
    return (folder / "config.json").is_file()


def model_set(folder: Path) -> list[Path]:
    """The files of the one model in a folder: the set without a variant, else the only one; or a UserError."""
    sets = sets_in(folder)
    if not sets:
        raise UserError(f"{folder} holds no model: no {' or '.join(SUFFIXES)} file lies in it")
    standard = [label for label in sets if "." not in Path(label).stem.split(" (")[0]]
    chosen = standard if len(standard) == 1 else list(sets)
    if len(chosen) > 1:
        indexes = sorted(folder.glob("*.index*.json"))
        if len(indexes) == 1 and not is_variant(indexes[0].name):
            return [file for _, file in from_index(indexes[0]).files]
        raise UserError(f"{folder} holds {len(sets)} models ({', '.join(sets)}); name one of the files")
    return siblings(sets[chosen[0]])


def is_variant(name: str) -> bool:
    """`diffusion_pytorch_model.safetensors.index.fp16.json` belongs to a variant."""
    return not name.endswith(".index.json")


def model_paths(folder: Path) -> Iterator[Path]:
    """What can be opened below a folder, each model once: files, first shards, the folders of a pipeline."""
    parts = pipeline_folders(folder) if (folder / PIPELINE).is_file() else []
    yield from parts
    if not parts:
        yield from sets_in(folder).values()
    children = (path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    for child in sorted(path for path in children if path not in parts):
        yield from model_paths(child)
