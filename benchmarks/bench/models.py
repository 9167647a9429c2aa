"""What is measured: the shipped model, the user's, or random weights of full size; and files that are made of them."""

import hashlib
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from flux_quant.arch import FluxConfig
from flux_quant.benchmarks.bench.record import Scalar
from flux_quant.benchmarks.bench.suite import Asked
from flux_quant.benchmarks.random_weights import DEV, DOUBLE, SINGLE
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.converters.recipe import FP8, PLAIN
from flux_quant.converters.summary import summarize
from flux_quant.errors import UserError

SOURCE = "source"  # the format of a file as it came


def transformer(asked: Asked) -> Path:
    """The file of the user's model, or of the shipped one. UserError if it is not there."""
    return find_components(asked.model or BUNDLED).transformer if asked.model is None else alone(asked.model)


def alone(path: Path) -> Path:
    """A transformer, of which neither encoders nor VAE are needed."""
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    return path if path.is_file() else find_components(path).transformer


def weights_of(asked: Asked) -> dict[str, Scalar]:
    """For `Run.weights`. The checksum of a file of 24 GB takes its time."""
    if asked.random:
        return {"kind": "random", "name": f"random weights of FLUX.1's size, {DOUBLE} + {SINGLE} blocks"}
    path = transformer(asked)
    kind = "shipped" if asked.model is None else "file"
    if path.is_dir():
        return {"kind": kind, "name": path.name}
    return {"kind": kind, "name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


@cache
def sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            found.update(piece)
    return found.hexdigest()


def full_size(double: int = DOUBLE, single: int = SINGLE, guidance: bool = True) -> FluxConfig:
    return FluxConfig(**DEV | {"guidance": guidance}, double_blocks=double, single_blocks=single)


def suffix_of(recipe: str) -> str:
    return ".safetensors" if recipe in (*FP8, *PLAIN) else ".gguf"


@dataclass
class Workshop:
    """A temporary folder for files that several cases use; it is made at the first of them and goes with `close`."""

    label: str
    folder: TemporaryDirectory | None = field(default=None, repr=False)
    made: dict[object, Path] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        if self.folder is None:
            self.folder = TemporaryDirectory(prefix=f"flux-quant-{self.label}-")
        return Path(self.folder.name)

    def room(self, nbytes: float) -> None:
        """UserError if there is no place for so many bytes."""
        free = shutil.disk_usage(self.path).free
        if free < nbytes:
            raise UserError(f"{self.path.parent} has {free / 1e9:.1f} GB free, {nbytes / 1e9:.1f} GB are needed")

    def converted(self, source: Path, recipe: str) -> Path:
        """The source in another format; the source itself for SOURCE."""
        if recipe == SOURCE:
            return source
        if (source, recipe) not in self.made:
            self.room(source.stat().st_size)
            target = self.path / f"{source.stem}-{recipe}{suffix_of(recipe)}"
            run(make_plan(Conversion(source, target, recipe, force=True)))
            self.made[source, recipe] = target
        return self.made[source, recipe]

    def close(self) -> None:
        if self.folder is not None:
            self.folder.cleanup()
        self.folder = None
        self.made.clear()


@cache
def label(source: Path, recipe: str) -> str:
    """The recipe, or the format of most of the source's weights."""
    if recipe != SOURCE:
        return recipe
    found = summarize(source).formats
    return max(found, key=lambda name: found[name].parameters)
