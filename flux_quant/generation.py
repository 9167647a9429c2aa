"""Prompt in, picture out: encode the text, denoise, decode; one phase after the other, each with its own weights.

    components = find_components(Path("models/diffusion_models/flux1-dev.safetensors"))
    result = generate(components, Request(prompt="a red fox", size=(1024, 1024)))
    save_png(result.images[0], Path("fox.png"), result.settings_of(0))

The starting noise is that of diffusers' FluxPipeline with a CPU generator of the same seed.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flux_quant.arch import FluxConfig
from flux_quant.components import Components
from flux_quant.configs import vae_config
from flux_quant.converters.component import open_component
from flux_quant.converters.lora_io import read_lora
from flux_quant.converters.lora_records import Lora
from flux_quant.converters.lora_report import check_complete
from flux_quant.drawing import preview, vae
from flux_quant.drawing.given import (
    Given,
    Nets,
    check_given,
    from_noise,
    load_nets,
    read_given,
)
from flux_quant.drawing.latents import NOWHERE, LatentFiles, Latents, load_latents, on_disk
from flux_quant.drawing.pictures import composite, latent_mask, save_png, to_images
from flux_quant.drawing.request import Request
from flux_quant.drawing.resources import peak_ram, peak_vram, release, timed
from flux_quant.drawing.sampling import (
    Callback,
    Conditioning,
    Drawing,
    Reference,
    StepState,
    controls_of,
    denoise,
    modulation_rows,
    no_progress,
)
from flux_quant.errors import UserError
from flux_quant.loading import load_flux, load_vae, shapes_of
from flux_quant.lora import Strength, apply_, at, shapes_in
from flux_quant.model import Flux, pack_latents, unpack_latents
from flux_quant.modulation import HoistedModulation
from flux_quant.placing import SCHNELL_LENGTH, planned, room, text_by
from flux_quant.runtime import Memory, Residence, Whole, prepare
from flux_quant.text.encode import AS_TRAINED, LONGEST, TextFeatures, TextOptions, encode_clip, encode_t5

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from PIL import Image

Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass
class Result:
    images: list["Image.Image"]
    settings: dict[str, object]
    seeds: tuple[int, ...]
    steps: int  # that were taken
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase
    peak_ram: int = 0  # bytes of the process so far
    peak_vram: int = 0  # bytes allocated by torch
    metrics: dict[str, object] = field(default_factory=dict)  # of streaming, see `runtime.Residence.metrics`

    @property
    def image(self) -> "Image.Image":
        return self.images[0]

    def measured(self) -> dict[str, object]:
        """Times, peaks and what streaming cost, for JSON."""
        peaks = {"peak_ram": self.peak_ram, "peak_vram": self.peak_vram}
        return {"settings": self.settings, "seconds": self.seconds, **peaks, "streaming": self.metrics}

    def settings_of(self, picture: int) -> dict[str, object]:
        return {**self.settings, "seed": self.seeds[picture]}


def generate(
    components: Components,
    request: Request,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
    text: TextOptions = AS_TRAINED,
    callback: Callback | None = None,
    files: LatentFiles = NOWHERE,
    memory: Memory | None = None,
    compute: str = "16-bit",
) -> Result:
    """All phases. Activations and VAE are in `dtype` (the VAE in float32 where the card lacks it), text as it says.

    With the `memory` of the device, blocks stay there or stream as a plan for its budget says, and so does T5 unless
    `text` places it. compute: what the products in the blocks multiply, see `linear.set_compute_`.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        model = load_flux(components.transformer)  # mapped: it takes memory only as it is moved or used
        loras = load_loras(request, model)
        apply_(model, loras, dtype=dtype)
        text = replace(text, loras=text_strengths(loras))
        open_component(components.vae, "VAE")  # what is wrong with it is better known before the work
        nets = load_nets(request, model.config)
        check_given(request, model.config, nets)
        levels = request.levels(model.config.guidance, from_noise(request, model.config, nets))
        for part in dict.fromkeys([model, *(net for _, net in nets)]):
            prepare(part, device, compute, inf if memory is None else memory.host.pinned)
        placed = planned(memory, components, model, request, text, compute, nets)
    with nullcontext() if memory is None else memory.capped():
        given = Given()
        if request.pictures or nets or request.redux:
            with timed(seconds, "encode"):
                given = seen(request, components.vae, model, nets, device, dtype, room(memory, device))
        with timed(seconds, "text"):
            text = text if placed.plan is None else text_by(placed.plan, memory, text)
            features = encode(components, texts_of(request), model.config.guidance, text)
        drawing = make_drawing(request.one_by_one(), model.config, features, device, levels, placed.given(given))
        with timed(seconds, "modulation"):
            modulation = HoistedModulation(model)
            modulation_rows(model, drawing, modulation, device, dtype)
            controls_of(model, drawing, device, dtype)
        tokens, metrics = draw(
            model,
            drawing,
            modulation,
            Whole(model, device) if placed.plan is None else Residence(model, placed.plan, memory),
            dtype,
            progress,
            callback,
            seconds,
        )
        latents = unpack_latents(tokens, *request.grid).cpu()
        settings = dict(
            model=components.transformer.name,
            **request.settings(),
            pad_to=features.txt.shape[1],
            dtype=str(dtype).removeprefix("torch."),
            compute=compute,
        )
        del model, modulation, drawing, tokens, nets
        release(device)
        kept = (None, None) if given.mask is None else (given.picture, given.mask)
        saved = Latents(latents, *kept, settings | {"seeds": request.all_seeds, "vae": str(components.vae.absolute())})
        with timed(seconds, "decode"), on_disk(saved, files):
            images = decode_latents(saved, components.vae, device, dtype, room(memory, device))
    peaks = peak_ram(), peak_vram(device)
    return Result(images, settings, request.all_seeds, len(levels) - 1, seconds, *peaks, metrics)


def seen(
    request: Request,
    vae_file: Path,
    model: Flux,
    nets: Nets,
    device: torch.device | str,
    dtype: torch.dtype,
    free: int | None,
) -> Given:
    """The pictures of a request, encoded; `free` bytes may be taken for it."""
    encoder = placed_vae(vae_file, device, dtype)
    return read_given(request, model.config, nets, lambda x: vae.encode(encoder, x, free))


def draw(
    model: Flux,
    drawing: Drawing,
    modulation: HoistedModulation,
    residence: Whole | Residence,
    dtype: torch.dtype,
    progress: Progress,
    callback: Callback | None,
    seconds: dict[str, float],
) -> tuple[Tensor, dict[str, object]]:
    """Clean tokens, and what residence measured; `callback` sees a step before the plan is revised."""

    def after_step(state: StepState) -> None:
        if callback is not None:
            callback(state)
        residence.after_step(state)

    with ExitStack() as stack:
        with timed(seconds, "load"):
            stack.enter_context(residence)
        with timed(seconds, "denoise"):
            tokens = residence.run(lambda: denoise(model, drawing, dtype, modulation, progress, after_step))
        return tokens, residence.metrics()


def load_loras(request: Request, model: Flux) -> list[tuple[Lora, Strength]]:
    """The files of a request, read for this model; keys that found no place are warned of."""
    shapes = shapes_in(model)
    loras = [(read_lora(path, shapes), strength) for path, strength in request.loras]
    for lora, _ in loras:
        check_complete(lora)
        if lora.unused:
            first = lora.unused[0]
            warnings.warn(f"{len(lora.unused)} keys of {lora.path} have no place, {first} among them", stacklevel=2)
    return loras


def text_strengths(loras: Sequence[tuple[Lora, Strength]]) -> tuple[tuple[Lora, float], ...]:
    """Text is encoded once: by the strength of the first step."""
    return tuple((lora, at(strength, 0)) for lora, strength in loras)


def placed_vae(path: Path, device: torch.device | str, dtype: torch.dtype) -> "AutoencoderKL":
    """On the device, in the dtype that suits it. By torch's `to`: diffusers' own complains of any cast."""
    return torch.nn.Module.to(load_vae(path), device, vae.vae_dtype(device, dtype))


def texts_of(request: Request) -> list[Request]:
    """What is encoded: the prompt, and the negative one for both encoders."""
    negative = [] if request.negative is None else [replace(request, prompt=request.negative, prompt_t5=None)]
    return [request, *negative]


def decode_latents(
    saved: Latents,
    vae_file: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    free: int | None = None,
) -> list["Image.Image"]:
    """In the largest tiles that fit; a picture that was kept around a mask is put back, pixel by pixel."""
    model = placed_vae(vae_file, device, dtype)
    pictures = vae.decode(model, saved.latents, free)
    if saved.mask is not None:
        pictures = composite(pictures, saved.picture, saved.mask)
    return to_images(pictures)


def decode_file(
    path: Path,
    vae_file: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Result:
    """A drawing that was saved before it was decoded. Without `vae_file` the VAE that it was made with."""
    saved = load_latents(path)
    settings = dict(saved.settings)
    found = vae_file or Path(str(settings.get("vae", "")))
    if not found.is_file():
        raise UserError(f"{path} does not say which VAE decodes it ({found} is no file); give one with --vae")
    seconds: dict[str, float] = {}
    with timed(seconds, "decode"):
        images = decode_latents(saved, found, device, dtype, vae.free_memory(device))
    seeds = settings.pop("seeds", None)
    if not isinstance(seeds, list) or len(seeds) != len(images):
        seeds = range(len(images))
    settings.pop("vae", None)
    return Result(images, settings, tuple(seeds), 0, seconds, peak_ram(), peak_vram(device))


def previewer(path: Path, vae_file: Path) -> Callback:
    """A callback that writes, after each step, a small picture of what is to come. UserError if the VAE has no map."""
    widths = tuple(vae_config(shapes_of(open_component(vae_file, "VAE")))["block_out_channels"])
    if widths not in preview.FACTORS:
        raise UserError(f"{vae_file}: there is no linear preview for a VAE of widths {', '.join(map(str, widths))}")

    def write(state: StepState) -> None:
        pictures = preview.to_rgb(state.estimate, widths).cpu()
        save_png(to_images(torch.cat([*pictures], dim=-1)[None])[0], path, {"step": state.step + 1}, force=True)

    return write


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


def make_drawing(
    requests: Sequence[Request],
    config: FluxConfig,
    features: TextFeatures,
    device: torch.device | str = "cpu",
    levels: Sequence[float] | None = None,
    given: Given | None = None,
) -> Drawing:
    """Requests that differ in prompt and seed only. Features are of all of them, or of one prompt for all; with
    negative prompts, the latter half is of those."""
    first = requests[0]
    negative = None
    if first.negative is not None:
        half = len(features.txt) // 2
        features, away = features[:half], features[half:]
        negative = Conditioning(away.txt.to(device), away.pooled.to(device))
    given, known, mask = given or Given(), None, None
    if given.latents is not None:
        known = pack_latents(given.latents).to(device)
        if given.mask is not None and given.blended:
            places = latent_mask(given.mask).expand(-1, given.latents.shape[1], -1, -1)
            mask = pack_latents(places.contiguous()).to(device)
    txt = features.txt.to(device)
    if given.words is not None:
        txt = torch.cat([txt, given.words.to(txt).expand(len(txt), -1, -1)], dim=1)
    return Drawing(
        noise=torch.cat([starting_noise(request, config.out_channels) for request in requests]).to(device),
        text=Conditioning(txt, features.pooled.to(device)),
        grid=first.grid,
        levels=first.levels(config.guidance) if levels is None else levels,
        guidance=first.guidance,
        negative=negative,
        cfg=first.cfg,
        cfg_range=first.cfg_range,
        known=known,
        mask=mask,
        controls=[replace(control, condition=control.condition.to(device)) for control in given.controls],
        beside=None if given.beside is None else given.beside.to(device),
        reference=given.reference and Reference(*(tensor.to(device) for tensor in given.reference)),
    )


def denoise_batch(
    model: Flux,
    features: TextFeatures,
    requests: Sequence[Request],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
) -> Tensor:
    """Requests that differ in prompt and seed only -> latents (B, 16, height / 8, width / 8) float32."""
    drawing = make_drawing(requests, model.config, features, device)
    return unpack_latents(denoise(model, drawing, dtype, progress=progress), *requests[0].grid)


def starting_noise(request: Request, channels: int) -> Tensor:
    """(1, S, channels) float32, the same on every device."""
    rows, columns = request.grid
    generator = torch.Generator().manual_seed(request.seed)
    return pack_latents(torch.randn(1, channels // 4, 2 * rows, 2 * columns, generator=generator))
