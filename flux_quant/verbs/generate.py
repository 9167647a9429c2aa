"""The verbs `generate` and `decode`. `cli` registers them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from flux_quant.errors import UserError
from flux_quant.verbs import options as opt

if TYPE_CHECKING:
    import torch

    from flux_quant.generation import Result
    from flux_quant.runtime import Memory
    from flux_quant.text.encoders import Placement


PRESETS = {"turbo": (8, 3.5)}  # steps, guidance: FLUX.1-Turbo-Alpha, at strength 1; Hyper-FLUX at 0.125


def register(app: typer.Typer) -> None:
    app.command()(generate)
    app.command()(decode)


def generate(
    model: opt.GenerateModel,
    prompt: opt.PromptText,
    output: opt.Picture,
    prompt_t5: opt.PromptT5 = None,
    steps: opt.DrawingSteps = None,
    guidance: opt.DrawingGuidance = None,
    seed: opt.Seed = 0,
    size: opt.PictureSize = None,
    width: opt.Width = None,
    height: opt.Height = None,
    scheduler: opt.Scheduler = "euler",
    seeds: opt.Seeds = None,
    batch: opt.Batch = None,
    negative: opt.Negative = None,
    cfg: opt.Cfg = 1.0,
    cfg_range: opt.CfgRange = "0:1",
    image: opt.GivenPicture = None,
    strength: opt.Strength = None,
    denoise: opt.Denoise = None,
    mask: opt.Mask = None,
    controlnet: opt.ControlNets = None,
    control_image: opt.ControlImages = None,
    control_mode: opt.ControlModes = None,
    reference: opt.ReferencePicture = None,
    redux: opt.ReduxFile = None,
    redux_image: opt.ReduxPicture = None,
    image_encoder: opt.ImageEncoder = None,
    lora: opt.SideLoras = None,
    preset: opt.Preset = None,
    save_latent: opt.SaveLatent = None,
    preview: opt.Preview = None,
    t5: opt.Component = None,
    clip: opt.Component = None,
    vae: opt.Component = None,
    tokenizers: opt.Tokenizers = None,
    pad_to: opt.PadTo = None,
    prompt_cache: opt.UsePromptCache = True,
    prompt_cache_size: opt.PromptCacheSize = "1GB",
    device: opt.Device = "auto",
    vram: opt.VramBudget = None,
    ram_budget: opt.RamBudget = None,
    compute: opt.Compute = "16-bit",
    metrics: opt.MetricsFile = None,
    force: opt.ForcePicture = False,
    threads: opt.Threads = None,
) -> None:
    """Make a picture. Text encoders, VAE and tokenizers are looked for beside the model.

    Parts of a prompt get weights: (text:1.3), (text) for 1.1, [text] for 1/1.1; a backslash before a bracket keeps it.
    """
    from flux_quant import console
    from flux_quant.components import find_components, picture_size, recommended_size
    from flux_quant.converters.lora_io import parse_lora_option
    from flux_quant.converters.output import check_target
    from flux_quant.converters.shards import parse_size
    from flux_quant.drawing.latents import LatentFiles
    from flux_quant.drawing.request import (
        Request,
        drawable_size,
        parse_controls,
        parse_range,
        parse_redux,
        parse_seeds,
        picture_paths,
        single_hint,
    )
    from flux_quant.generation import choose_device, previewer
    from flux_quant.generation import generate as make
    from flux_quant.linear import COMPUTES
    from flux_quant.text.encode import TextOptions
    from flux_quant.text.prompt_cache import PromptCache

    if (width is None) != (height is None) or width is not None and size is not None:
        raise UserError("give --width and --height together, or --size")
    usual = preset_of(preset)
    steps, guidance = usual[0] if steps is None else steps, usual[1] if guidance is None else guidance
    chosen = parse_seeds(seeds, seed, batch)
    paths = picture_paths(output, chosen or (seed,))
    check_pictures([*paths, *([preview] if preview else [])], force)
    if save_latent:
        check_latents(save_latent, force)
    if metrics:
        check_target(metrics, True)
    cache = PromptCache.default(parse_size(prompt_cache_size)) if prompt_cache else None
    use_threads(threads)
    place, dtype = choose_device(device)
    if compute not in COMPUTES:
        raise UserError(f"compute {compute} is unknown; choose one of {', '.join(COMPUTES)}")
    memory = memory_of(place, vram, ram_budget)
    text = TextOptions(pad_to, text_placement(place, ram_budget), cache)
    components = find_components(model, t5, clip, vae, tokenizers)
    pixels = picture_size(size, components.transformer) if width is None else (width, height)
    pixels = drawable_size(pixels, recommended_size(components.transformer))
    request = Request(
        prompt, prompt_t5, steps, guidance, seed, pixels, scheduler, chosen,
        negative, cfg, parse_range(cfg_range), image, strength, denoise, mask,
        controls=parse_controls(controlnet or (), control_image or (), control_mode or ()),
        control_image=None if controlnet else single_hint(control_image or (), control_mode or ()), reference=reference,
        loras=tuple(map(parse_lora_option, lora or ())), redux=parse_redux(redux, redux_image, image_encoder),
    )  # fmt: skip
    files = LatentFiles(save_latent, output.with_suffix(".latent.safetensors"), force)
    callback = previewer(preview, components.vae) if preview else None
    with console.steps_progress() as progress:
        result = make(components, request, place, dtype, progress, text, callback, files, memory, compute)
    save_pictures(result, paths, force)
    if metrics:
        metrics.write_text(json.dumps(result.measured(), indent=1) + "\n")
    console.print_generation(paths, result)


def preset_of(name: str | None) -> tuple[int, float]:
    """Steps and guidance."""
    if name is not None and name not in PRESETS:
        raise UserError(f"--preset {name} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS.get(name, (20, 3.5))


def memory_of(device: "torch.device", vram: str | None, ram: str | None) -> "Memory | None":
    """What plans go by on a GPU; None on a processor, where nothing has to be streamed."""
    from flux_quant import console
    from flux_quant.runtime import Memory

    if device.type != "cuda":
        if vram:
            raise UserError(f"--vram {vram} is about a CUDA GPU; this picture is made on {device.type}")
        return None
    return Memory.of(device, vram, ram, console.say)


def text_placement(device: "torch.device", ram: str | None) -> "Placement":
    """T5 on the processor under a budget of RAM; on a GPU the plan places it."""
    from flux_quant.planner.memory import parse_amount
    from flux_quant.text.encoders import Placement

    if ram is None or device.type == "cuda":
        return Placement()
    return Placement(ram_budget=parse_amount(ram, "RAM budget"))


def decode(
    latent: opt.LatentFile,
    output: opt.Picture,
    vae: opt.DecodingVae = None,
    device: opt.Device = "auto",
    force: opt.ForcePicture = False,
    threads: opt.Threads = None,
) -> None:
    """Make the picture of saved latents: after a failure, on another machine, or with another VAE."""
    from flux_quant import console
    from flux_quant.drawing.request import picture_paths
    from flux_quant.generation import choose_device, decode_file

    check_pictures([output], force)
    use_threads(threads)
    result = decode_file(latent, vae, *choose_device(device))
    paths = picture_paths(output, result.seeds)
    check_pictures(paths, force)
    save_pictures(result, paths, force)
    console.print_generation(paths, result)


def check_pictures(paths: Sequence[Path], force: bool) -> None:
    from flux_quant.converters.output import check_target

    for path in paths:
        if path.suffix.lower() != ".png":
            raise UserError(f"{path}: pictures are written as .png")
        check_target(path, force)


def save_pictures(result: "Result", paths: Sequence[Path], force: bool) -> None:
    from flux_quant.drawing.pictures import save_png

    for i, (picture, path) in enumerate(zip(result.images, paths, strict=True)):
        save_png(picture, path, result.settings_of(i), force)


def check_latents(path: Path, force: bool) -> None:
    from flux_quant.converters.output import check_target

    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{path}: latents are written as .safetensors")
    check_target(path, force)


def use_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)
