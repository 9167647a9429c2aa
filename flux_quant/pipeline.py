"""Prompt in, picture out: encode the text, denoise, decode; one phase after the other, each with its own weights.

    components = find_components(Path("models/diffusion_models/flux1-dev.safetensors"))
    result = generate(components, Request(prompt="a red fox", size=(1024, 1024)))
    save_png(result.images[0], Path("fox.png"), result.settings)

The starting noise is that of diffusers' FluxPipeline with a CPU generator of the same seed.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flux_quant import __version__
from flux_quant.arch import LATENT_SCALE, LATENT_SHIFT
from flux_quant.components import Components
from flux_quant.converters.output import OutputFile
from flux_quant.errors import UserError
from flux_quant.loading import load_flux, load_vae
from flux_quant.model import Flux, pack_latents, unpack_latents
from flux_quant.sampling import Conditioning, Drawing, denoise, no_progress
from flux_quant.schedules import noise_levels
from flux_quant.text import AS_TRAINED, LONGEST, TextFeatures, TextOptions, encode_clip, encode_t5

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from PIL import Image

PATCH = 16  # pixels of a token: 8 of the VAE times 2
SCHNELL_LENGTH = 256  # tokens of T5 that [schnell] was trained with

Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Request:
    """One picture to be made."""

    prompt: str
    prompt_t5: str | None = None  # another prompt for T5; CLIP always reads `prompt`
    steps: int = 20
    guidance: float = 3.5
    seed: int = 0
    size: tuple[int, int] = (1024, 1024)  # width, height in pixels

    def __post_init__(self) -> None:
        for side in self.size:
            if side < PATCH or side % PATCH:
                raise UserError(f"size {self.size[0]}x{self.size[1]}: both sides must be multiples of {PATCH}")
        if self.steps < 1:
            raise UserError(f"steps {self.steps}: at least 1 is needed")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.size[1] // PATCH, self.size[0] // PATCH


@dataclass
class Result:
    image: "Image.Image"
    settings: dict[str, object]
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase
    peak_ram: int = 0  # bytes of the process so far
    peak_vram: int = 0  # bytes allocated by torch


def generate(
    components: Components,
    request: Request,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
    text: TextOptions = AS_TRAINED,
) -> Result:
    """All phases for one picture. Activations are in `dtype`, the VAE always in float32, text as `text` says."""
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        model = load_flux(components.transformer)  # mapped: it takes memory only as it is moved or used
        refuse_image_inputs(components, model)
    with timed(seconds, "text"):
        features = encode(components, [request], model.config.guidance, text)
    with timed(seconds, "load"):
        model.to(device)
    with timed(seconds, "denoise"):
        latents = denoise_batch(model, features, [request], device, dtype, progress)
    del model
    with timed(seconds, "decode"):
        image = to_images(decode(load_vae(components.vae).to(device), latents))[0]
    settings = dict(
        model=components.transformer.name,
        **asdict(request),
        pad_to=features.txt.shape[1],
        dtype=str(dtype).removeprefix("torch."),
    )
    return Result(image, settings, seconds, peak_ram(), peak_vram(device))


def refuse_image_inputs(components: Components, model: Flux) -> None:
    """Fill, Depth and Canny read more channels than they write: a picture beside the noise."""
    c = model.config
    if c.in_channels != c.out_channels:
        raise UserError(
            f"{components.transformer} reads {c.in_channels} channels, {c.in_channels - c.out_channels} of them of an "
            "input picture (Fill, Depth or Canny); generate draws from text alone"
        )


def choose_device(name: str) -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype of the activations there. `auto` takes CUDA where there is any."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name}: torch {torch.__version__} finds no CUDA GPU; use --device cpu")
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32


def encode(
    components: Components, requests: Sequence[Request], guided: bool, options: TextOptions = AS_TRAINED
) -> TextFeatures:
    """Both encoders, one after the other, for all requests. A request without a prompt for T5 gives it CLIP's."""
    t5_prompts = [request.prompt if request.prompt_t5 is None else request.prompt_t5 for request in requests]
    most = LONGEST if guided else SCHNELL_LENGTH
    txt = encode_t5(components.t5, components.tokenizers, t5_prompts, options, most)
    pooled = encode_clip(components.clip, components.tokenizers, [request.prompt for request in requests], options)
    return TextFeatures(txt, pooled)


def denoise_batch(
    model: Flux,
    features: TextFeatures,
    requests: Sequence[Request],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
) -> Tensor:
    """Requests that differ in prompt and seed only -> latents (B, 16, height / 8, width / 8) float32."""
    first = requests[0]
    noise = torch.cat([starting_noise(request, model.config.in_channels) for request in requests])
    noise, txt, pooled = (tensor.to(device) for tensor in (noise, features.txt, features.pooled))
    levels = noise_levels("euler", first.steps, noise.shape[1], model.config.guidance)
    drawing = Drawing(noise, Conditioning(txt, pooled), first.grid, levels, first.guidance)
    return unpack_latents(denoise(model, drawing, dtype, progress=progress), *first.grid)


def starting_noise(request: Request, channels: int) -> Tensor:
    """(1, S, channels) float32, the same on every device."""
    rows, columns = request.grid
    generator = torch.Generator().manual_seed(request.seed)
    return pack_latents(torch.randn(1, channels // 4, 2 * rows, 2 * columns, generator=generator))


@torch.no_grad()
def decode(vae: "AutoencoderKL", latents: Tensor) -> Tensor:
    """latents (B, 16, h, w) -> pictures (B, 3, 8 h, 8 w) float32 in 0-1 on the CPU."""
    pictures = vae.decode(latents / LATENT_SCALE + LATENT_SHIFT).sample
    return (pictures / 2 + 0.5).clamp(0, 1).float().cpu()


def to_images(pictures: Tensor) -> list["Image.Image"]:
    from PIL import Image

    return [Image.fromarray((p.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()) for p in pictures]


def save_png(image: "Image.Image", path: Path, settings: dict[str, object], force: bool = False) -> None:
    """Complete or not at all. The settings lie in the PNG as JSON under the key `flux_quant`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Software", f"flux_quant {__version__}")
    info.add_text("flux_quant", json.dumps(settings))
    encoded = BytesIO()
    image.save(encoded, format="PNG", pnginfo=info)
    with OutputFile(path, len(encoded.getvalue()), force) as file:
        file.write(0, encoded.getvalue())


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the time of the block to a phase."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def peak_ram() -> int:
    """The largest resident size of this process so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_vram(device: torch.device | str) -> int:
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else 0
