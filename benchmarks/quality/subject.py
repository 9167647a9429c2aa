"""Which model is judged, on what: the bundled one, the user's file, or one of full width with random weights."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from flux_quant.arch import FluxConfig
from flux_quant.benchmarks import make_full_size
from flux_quant.benchmarks.bench.suite import Asked
from flux_quant.benchmarks.quality.prompts import REAL, SHIPPED
from flux_quant.benchmarks.random_weights import DEV
from flux_quant.components import BUNDLED, Components, find_components
from flux_quant.converters.component import Component, open_component
from flux_quant.drawing.given import PLAIN, kind_of
from flux_quant.drawing.sampling import Drawing
from flux_quant.errors import UserError
from flux_quant.generation import Request, encode, make_drawing
from flux_quant.loading import shapes_of
from flux_quant.text.encode import TextFeatures

RANDOM_TITLE = "random weights"  # as `make_full_size` writes it
WORDS = 128  # tokens of noise where there is no text
RANDOM_FRACTION, RANDOM_BLOCKS = 0.05, (1, 2)  # of FLUX.1's depth, and what that is: double and single blocks
NOT_TRAINED = "the weights are random"
NO_ENCODERS = "{}, so the text is noise"


@dataclass(frozen=True)
class Setting:
    """How much is done. Steps of 0: as the model was made for, 20 for [dev] and 4 for [schnell]."""

    prompts: int
    size: tuple[int, int]  # width, height in pixels
    steps: int
    states: int  # that velocities are compared at
    together: int  # prompts in one pass
    few: tuple[int, int]  # prompts and states of the scan, block by block


SETTINGS = {
    "shipped": Setting(16, (96, 96), 20, 5, 16, (4, 3)),
    "shipped, quick": Setting(3, (96, 96), 4, 2, 3, (2, 2)),
    "file": Setting(10, (1024, 1024), 0, 4, 1, (2, 2)),
    "file on a CPU": Setting(2, (512, 512), 0, 4, 1, (1, 2)),
    "file, quick": Setting(2, (256, 256), 2, 2, 1, (1, 1)),
    "random": Setting(2, (256, 256), 4, 2, 1, (1, 1)),
}


def say(text: str) -> None:
    print(f"quality: {text}", file=sys.stderr, flush=True)


class Subject:
    """Everything that does not depend on a format. Nothing is computed before it is asked for."""

    def __init__(self, asked: Asked) -> None:
        """UserError if the file is no FLUX.1 transformer that draws from text."""
        if asked.model is not None and not asked.model.exists():
            raise UserError(f"{asked.model}: no such file or directory")
        self.asked, self.device = asked, torch.device(asked.device)
        self.kind = "random" if asked.random and asked.model is None else "file" if asked.model else "shipped"
        self.folder = TemporaryDirectory(prefix="flux-quant-quality-")
        self.components, self.obstacle = self.find()
        if self.kind != "random" and kind_of(self.config) != PLAIN:
            raise UserError(f"{self.path} reads pictures (Fill, Depth or Canny); quality is measured with text alone")
        self.setting = self.chosen_setting()

    def find(self) -> tuple[Components | None, str]:
        """What draws pictures, or why there are none that mean anything."""
        if self.kind == "random":
            return None, NOT_TRAINED
        if self.kind == "shipped":
            return find_components(BUNDLED), ""
        if self.reader.metadata.get("modelspec.title") == RANDOM_TITLE:
            return None, NOT_TRAINED
        try:
            return find_components(self.asked.model), ""
        except UserError as error:
            return None, NO_ENCODERS.format(error)

    def chosen_setting(self) -> Setting:
        name = self.kind
        if name == "file" and self.device.type == "cpu":
            name += " on a CPU"
        if name != "random" and self.asked.quick:
            name = f"{self.kind}, quick"
        setting = SETTINGS[name]
        if self.kind != "shipped" and self.asked.sizes:
            setting = replace(setting, size=self.asked.sizes[0])
        steps = self.asked.steps[0] if self.asked.steps else setting.steps
        return replace(setting, steps=steps or (20 if self.config.guidance else 4))

    @cached_property
    def path(self) -> Path:
        """The transformer."""
        if self.kind == "random":
            path = Path(self.folder.name) / "random.safetensors"
            make_full_size.make(path, RANDOM_FRACTION)
            return path
        return find_components(BUNDLED).transformer if self.kind == "shipped" else self.asked.model

    @cached_property
    def reader(self) -> Component:
        return open_component(self.path, "FLUX.1")

    @property
    def config(self) -> FluxConfig:
        if self.kind == "random":
            return FluxConfig(**DEV, double_blocks=RANDOM_BLOCKS[0], single_blocks=RANDOM_BLOCKS[1])
        return FluxConfig.from_shapes(shapes_of(self.reader))

    @property
    def name(self) -> str:
        blocks = " + ".join(map(str, RANDOM_BLOCKS))
        return f"random weights, {blocks} blocks" if self.kind == "random" else self.path.name

    @property
    def draws(self) -> bool:
        """Whether its pictures are compared, and its own way to them: all but a CPU's share of a large model."""
        return not self.obstacle and (self.kind == "shipped" or self.device.type != "cpu" or self.asked.quick)

    @property
    def blocks(self) -> list[str]:
        config = self.config
        names = [f"double_blocks.{i}" for i in range(config.double_blocks)]
        return names + [f"single_blocks.{i}" for i in range(config.single_blocks)]

    @cached_property
    def requests(self) -> list[Request]:
        prompts = [wanted.caption for wanted in SHIPPED] if self.kind == "shipped" else REAL
        setting = self.setting
        return [
            Request(prompt, steps=setting.steps, seed=seed, size=setting.size)
            for seed, prompt in enumerate(prompts[: setting.prompts])
        ]

    @cached_property
    def features(self) -> TextFeatures:
        if self.components is not None:
            return encode(self.components, self.requests, guided=self.config.guidance)
        generator = torch.Generator().manual_seed(0)
        count, config = len(self.requests), self.config
        txt = torch.randn(count, WORDS, config.context, generator=generator)
        return TextFeatures(txt, torch.randn(count, config.pooled, generator=generator))

    def drawings(self, prompts: int | None = None) -> Sequence[Drawing]:
        """The first prompts, all of them if None, as many at a time as run together."""
        count, step = prompts or len(self.requests), self.setting.together
        rows = [slice(first, min(first + step, count)) for first in range(0, count, step)]
        return [make_drawing(self.requests[some], self.config, self.features[some], self.device, None) for some in rows]

    def say(self, text: str) -> None:
        """Work on the bundled model takes seconds and needs no words."""
        if self.kind != "shipped":
            say(text)
