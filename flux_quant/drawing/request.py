"""What a user asks for: a value that refuses, with the remedy, what no picture can be made from."""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from flux_quant.drawing.schedules import SCHEDULES, from_denoise, from_strength, noise_levels
from flux_quant.errors import UserError
from flux_quant.lora import Strength

PATCH = 16  # pixels of a token: 8 of the VAE times 2
STRENGTH = 0.6  # diffusers' default for FLUX.1
T = TypeVar("T")
AREAS = 0.095, 2.1  # megapixels between which FLUX.1 draws well: 0.1 to 2, and a little


@dataclass(frozen=True)
class ControlRequest:
    """A ControlNet, what it is shown, and how much and when it acts."""

    net: Path
    image: Path | None = None  # a hint; nets for inpainting see the given picture and its mask instead
    scale: float = 1.0
    span: tuple[float, float] = (0.0, 1.0)  # in parts of the steps
    mode: str | None = None  # of a Union net

    def __str__(self) -> str:
        mode = f" {self.mode}" if self.mode else ""
        return f"{self.net.name}:{self.scale:g}:{self.span[0]:g}-{self.span[1]:g}{mode}"


@dataclass(frozen=True)
class ReduxRequest:
    """A picture that is read as words."""

    redux: Path
    encoder: Path  # SigLIP
    image: Path
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.redux.name}:{self.weight:g} {self.image}"


@dataclass(frozen=True)
class Request:
    """One picture to be made, or one for each of several seeds."""

    prompt: str
    prompt_t5: str | None = None  # another prompt for T5; CLIP always reads `prompt`
    steps: int = 20
    guidance: float = 3.5  # a number that [dev] was trained with; costs nothing
    seed: int = 0
    size: tuple[int, int] = (1024, 1024)  # width, height in pixels
    scheduler: str = "euler"
    seeds: tuple[int, ...] = ()  # instead of `seed`: a batch
    negative: str | None = None  # what the picture is led away from, by true classifier-free guidance
    cfg: float = 1.0  # its scale; every step in its range takes twice as long
    cfg_range: tuple[float, float] = (0.0, 1.0)  # in parts of the steps
    image: Path | None = None  # a picture to begin with
    strength: float | None = None  # how much of it changes: the share of the steps that is taken
    denoise: float | None = None  # the same as ComfyUI means it: all steps are taken, from a later beginning
    mask: Path | None = None  # white where the given picture is drawn anew
    controls: tuple[ControlRequest, ...] = ()
    control_image: Path | None = None  # a hint for a Canny or Depth model itself
    reference: Path | None = None  # a picture that Kontext sees
    redux: ReduxRequest | None = None
    loras: tuple[tuple[Path, Strength], ...] = ()  # files, with their strengths

    def __post_init__(self) -> None:
        for complaint in self.complaints():
            raise UserError(complaint)

    def complaints(self) -> Iterator[str]:
        width, height = self.size
        if any(side < PATCH or side % PATCH for side in self.size):
            yield f"size {width}x{height}: both sides must be multiples of {PATCH}"
        if self.steps < 1:
            yield f"steps {self.steps}: at least 1 is needed"
        if self.scheduler not in SCHEDULES:
            yield f"scheduler {self.scheduler} is unknown; choose one of {', '.join(SCHEDULES)}"
        if (self.cfg > 1) != (self.negative is not None):
            yield "a negative prompt and a cfg above 1 work only together; give both, for example cfg 3.5"
        if not 0 <= self.cfg_range[0] < self.cfg_range[1] <= 1:
            yield f"cfg range {self.cfg_range[0]:g} to {self.cfg_range[1]:g}: choose a part of 0 to 1"
        if self.image is None and not (self.mask is self.strength is self.denoise is None):
            yield "a mask, strength or denoise needs a given picture (image)"
        if self.strength is not None and self.denoise is not None:
            yield "strength and denoise exclude each other: diffusers' and ComfyUI's ways to say the same"
        for control in self.controls:
            if not 0 <= control.span[0] < control.span[1] <= 1:
                first, last = control.span
                yield f"{control.net} acts from {first:g} to {last:g} of the steps: choose a part of 0 to 1"
        if self.controls and self.reference is not None:
            yield "ControlNets and a reference (Kontext) exclude each other"
        if any(not 0 <= seed < 1 << 64 for seed in self.all_seeds):
            yield "seeds go from 0 to 2^64 - 1"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.size[1] // PATCH, self.size[0] // PATCH

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return self.seeds or (self.seed,)

    @property
    def pictures(self) -> list[Path]:
        """Files that are looked at, those of ControlNets aside."""
        return [path for path in (self.image, self.mask, self.control_image, self.reference) if path is not None]

    def one_by_one(self) -> list["Request"]:
        """A request for each seed."""
        return [replace(self, seed=seed, seeds=()) for seed in self.all_seeds]

    def levels(self, guided: bool, from_noise: bool = False) -> list[float]:
        """The noise levels of its steps, see `schedules`. UserError if none is left.

        from_noise: all steps are taken, whatever picture is given.
        """

        def levels(steps: int) -> list[float]:
            return noise_levels(self.scheduler, steps, self.grid[0] * self.grid[1], guided)

        if self.image is None or from_noise:
            return levels(self.steps)
        if self.denoise is not None:
            chosen = from_denoise(levels, self.steps, self.denoise)
        else:
            chosen = from_strength(levels(self.steps), STRENGTH if self.strength is None else self.strength)
        if chosen[0] == 1 and self.mask is None:
            warnings.warn(
                f"{self.image} is not seen: its change takes all {self.steps} steps, from noise", stacklevel=2
            )
        return chosen

    def settings(self) -> dict[str, object]:
        """For JSON, of one picture (`seed`); what was not used is left out."""
        unused = Request("", prompt_t5=self.prompt_t5)
        fields = {"steps", "guidance", "seed", "size", "prompt", "prompt_t5"}
        given = {k: v for k, v in asdict(self).items() if k in fields or v != getattr(unused, k) and k != "seeds"}
        given |= {"loras": [f"{path}:{strength}" for path, strength in self.loras]} if self.loras else {}
        given |= {"controls": [str(control) for control in self.controls]} if self.controls else {}
        given |= {"redux": str(self.redux)} if self.redux else {}
        return {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}


def drawable_size(size: tuple[int, int], recommended: tuple[int, int] = (1024, 1024)) -> tuple[int, int]:
    """The nearest size with sides that are multiples of 16; warns if it is another one, or far from the recommended."""
    if min(size) < 1:
        raise UserError(f"size {size[0]}x{size[1]}: both sides must be positive")
    width, height = (max(PATCH, int(side / PATCH + 0.5) * PATCH) for side in size)
    if (width, height) != tuple(size):
        change = f"size {size[0]}x{size[1]} becomes {width}x{height}"
        warnings.warn(f"{change}: sides are multiples of {PATCH}", stacklevel=2)
    area = width * height / (recommended[0] * recommended[1]) * 1.048576
    if not AREAS[0] <= area <= AREAS[1]:
        warnings.warn(
            f"{width}x{height} is far from the {recommended[0]}x{recommended[1]} that the model was trained for; "
            "good pictures have a tenth to twice that area",
            stacklevel=2,
        )
    return width, height


def parse_seeds(text: str | None, seed: int, batch: int | None) -> tuple[int, ...]:
    """ "1,5,9", or `batch` seeds from `seed` on; nothing for one picture."""
    if text is None:
        return tuple(range(seed, seed + batch)) if batch else ()
    if batch:
        raise UserError("--seeds and --batch exclude each other")
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UserError(f"seeds {text}: write them as numbers with commas, for example 1,2,3") from None


def parse_range(text: str) -> tuple[float, float]:
    """ "0:0.6" -> 0.0, 0.6."""
    try:
        first, last = (float(part) for part in text.split(":"))
    except ValueError:
        raise UserError(f"range {text}: write it as FROM:TO, for example 0:0.6") from None
    return first, last


def parse_controls(nets: Sequence[str], images: Sequence[Path], modes: Sequence[str]) -> tuple[ControlRequest, ...]:
    """FILE[:SCALE[:START-END]] of each net; an image and a mode for each of them, or one for all. UserError."""
    controls = []
    for i, text in enumerate(nets):
        found = re.fullmatch(r"(.+?)(?::([\d.]+)(?::([\d.]+)-([\d.]+))?)?", text)
        try:
            scale, first, last = (float(x or default) for x, default in zip(found.groups()[1:], (1, 0, 1), strict=True))
        except ValueError:
            raise UserError(
                f"ControlNet {text}: write it as FILE:SCALE:START-END, for example net.gguf:0.8:0-0.6"
            ) from None
        chosen = (one_of("control images", images, i, len(nets)), scale, (first, last))
        controls.append(ControlRequest(Path(found[1]), *chosen, one_of("control modes", modes, i, len(nets))))
    return tuple(controls)


def parse_redux(text: str | None, image: Path | None, encoder: Path | None) -> ReduxRequest | None:
    """FILE[:WEIGHT], with the picture and the image encoder that it needs."""
    if text is None:
        if stray := image or encoder:
            raise UserError(f"{stray}: a picture as words, or what reads it, needs --redux FILE")
        return None
    found = re.fullmatch(r"(.+?)(?::([\d.]+))?", text)
    if image is None or encoder is None:
        raise UserError(f"{found[1]} needs a picture (--redux-image) and SigLIP (--image-encoder)")
    try:
        return ReduxRequest(Path(found[1]), encoder, image, float(found[2] or 1))
    except ValueError:
        raise UserError(f"Redux {text}: write it as FILE:WEIGHT, for example redux.safetensors:0.7") from None


def single_hint(images: Sequence[Path], modes: Sequence[str]) -> Path | None:
    """Of a Canny or Depth model, without any ControlNet. UserError for more than one, or a mode."""
    if modes:
        raise UserError(f"control mode {modes[0]}: modes are for ControlNets (--controlnet)")
    if len(images) > 1:
        raise UserError(f"{len(images)} control images: a model reads one; others are for ControlNets (--controlnet)")
    return images[0] if images else None


def one_of(what: str, values: Sequence[T], i: int, count: int) -> T | None:
    if len(values) not in (0, 1, count):
        raise UserError(f"{len(values)} {what} for {count} ControlNets: give one for each, or one for all")
    return values[min(i, len(values) - 1)] if values else None


def picture_paths(output: Path, seeds: tuple[int, ...]) -> list[Path]:
    """One picture goes to `output`, several beside it under their seeds."""
    if len(seeds) == 1:
        return [output]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds {', '.join(map(str, seeds))}: the same seed twice gives the same picture twice")
    return [output.with_name(f"{output.stem}-{seed}{output.suffix}") for seed in seeds]
