"""What is in a model file, from its header alone."""

from collections import Counter
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from pathlib import Path

from flux_quant.arch import block_of
from flux_quant.converters.checkpoint import open_checkpoint
from flux_quant.converters.component import components
from flux_quant.converters.folders import SUFFIXES, model_paths, resolve
from flux_quant.converters.lora_report import LoraReport, describe
from flux_quant.errors import UserError
from flux_quant.families import Family


@dataclass(frozen=True)
class FormatUse:
    """All tensors of one format. `bits` per weight include scales."""

    tensors: int
    parameters: int
    bytes: int

    @property
    def bits(self) -> float:
        return 8 * self.bytes / max(self.parameters, 1)


@dataclass(frozen=True)
class Summary:
    path: Path
    families: dict[str, Family]  # by prefix; several in an all-in-one file, none if unknown
    container: str
    metadata: dict[str, str]
    tensors: int
    parameters: int
    bytes: int  # of the whole file, or of all of them
    formats: dict[str, FormatUse]  # most bytes first
    blocks: dict[str, int]  # bytes of each block, in file order
    lora: LoraReport | None = None

    @property
    def family(self) -> str:
        if self.lora:
            return "FLUX.1 LoRA"
        names = [f"{family.name} {family.variant}".strip() for family in self.families.values()]
        return " + ".join(names) or "unknown"

    @property
    def naming(self) -> str:
        if self.lora:
            return self.lora.family
        return " + ".join(dict.fromkeys(family.naming for family in self.families.values())) or "unknown"


def summarize(path: Path) -> Summary:
    with open_checkpoint(path) as reader:
        infos = [*reader.tensors.values(), *reader.foreign.values()]
        found = {component.prefix: component.family for component in components(reader)}
        blocks, parameters = Counter(), Counter()
        tensors, sizes = Counter(reader.stored_as(info.name) for info in infos), Counter()
        for info in infos:
            prefix = next((prefix for prefix in found if prefix and info.name.startswith(prefix)), "")
            blocks[prefix + block_of(info.name.removeprefix(prefix))] += reader.nbytes(info.name)
            parameters[reader.stored_as(info.name)] += info.numel
            sizes[reader.stored_as(info.name)] += reader.nbytes(info.name)
        return Summary(
            path=path,
            families=found,
            container=reader.container,
            metadata={key: shorten(value) for key, value in reader.metadata.items()},
            tensors=len(infos),
            parameters=parameters.total(),
            bytes=sum(file.stat().st_size for _, file in resolve(path).files),
            formats={name: FormatUse(tensors[name], parameters[name], size) for name, size in sizes.most_common()},
            blocks=dict(blocks),
            lora=None if found else describe(path),
        )


def shorten(value: object) -> str:
    """Tokenizers and thumbnails are metadata too."""
    if isinstance(value, Sized) and not isinstance(value, str):
        return f"{len(value):,} entries"
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def find_checkpoints(folder: Path) -> Iterator[Path]:
    """Models below a folder, each once (see `folders.model_paths`). UserError if there is none."""
    found = list(model_paths(folder))
    if not found:
        raise UserError(f"{folder} holds no {' or '.join(SUFFIXES)} file")
    yield from found
