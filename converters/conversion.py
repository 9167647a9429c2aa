"""What a user asks a conversion for, and what it does with one tensor."""

from dataclasses import dataclass
from pathlib import Path

from flux_quant.converters.component import Component
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.recipe import SAFETENSORS, Rows
from flux_quant.converters.shards import Sharding


@dataclass(frozen=True)
class Conversion:
    """What a user asks for."""

    source: Path
    target: Path
    format: str
    force: bool = False
    components: tuple[str, ...] = ()  # labels; by default the main model of the source
    own_rows: Rows = ()
    search: bool = True
    legacy_fp8: bool = False
    imatrix: Path | None = None
    calibration: Path | None = None  # largest inputs of the layers, for FP8 activations
    loras: tuple[tuple[Path, float], ...] = ()
    tokenizer: Path | None = None  # whose vocabulary a T5 in GGUF carries
    sharding: Sharding | None = None
    device: str = "cpu"
    resume: bool = False
    checksums: bool = False
    folder: bool = False  # the target is a folder as diffusers and transformers write them

    @property
    def suffix(self) -> str:
        """Of the files."""
        return SAFETENSORS if self.folder else self.target.suffix.lower()


@dataclass(frozen=True)
class Row:
    """One canonical tensor: what it is in the source, how it is packed, and which tensors of the output it becomes."""

    component: Component
    source: TensorInfo
    packed: TensorInfo  # canonical name; the shape differs where narrow rows are rewritten
    pieces: tuple[TensorInfo, ...]  # in the output, below each other
    swapped: bool = False  # the halves of its rows change places
    reason: str = ""  # why the format is not the recipe's

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def format(self) -> str:
        return self.packed.format
