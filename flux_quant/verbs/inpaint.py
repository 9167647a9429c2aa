"""The verb `inpaint`: a part of a picture drawn anew. `cli` registers it."""

import typer

from flux_quant.errors import UserError
from flux_quant.verbs import generate as drawing
from flux_quant.verbs import options as opt


def register(app: typer.Typer) -> None:
    app.command()(inpaint)


def inpaint(
    model: opt.GenerateModel,
    image: opt.PaintedPicture,
    mask: opt.PaintedMask,
    prompt: opt.PromptText,
    output: opt.Picture,
    controlnet: opt.ControlNets = None,
    lora: opt.SideLoras = None,
    preset: opt.Preset = None,
    strength: opt.PaintedStrength = 1.0,
    prompt_t5: opt.PromptT5 = None,
    steps: opt.DrawingSteps = None,
    guidance: opt.DrawingGuidance = None,
    seed: opt.Seed = 0,
    size: opt.PaintedSize = None,
    scheduler: opt.Scheduler = "euler",
    seeds: opt.Seeds = None,
    batch: opt.Batch = None,
    negative: opt.Negative = None,
    cfg: opt.Cfg = 1.0,
    cfg_range: opt.CfgRange = "0:1",
    save_latent: opt.SaveLatent = None,
    preview: opt.Preview = None,
    t5: opt.Component = None,
    clip: opt.Component = None,
    vae: opt.Component = None,
    tokenizers: opt.Tokenizers = None,
    prompt_cache: opt.UsePromptCache = True,
    device: opt.Device = "auto",
    vram: opt.VramBudget = None,
    ram_budget: opt.RamBudget = None,
    compute: opt.Compute = "16-bit",
    metrics: opt.MetricsFile = None,
    force: opt.ForcePicture = False,
    threads: opt.Threads = None,
) -> None:
    """Draw anew what is white in a mask: with a ControlNet for inpainting, a Fill model, or any other model.

    What is black keeps its pixels. Without --size the picture keeps its size, up to twice the area that the model was
    made for.
    """
    given = dict(locals())  # every option is one of `generate`
    from flux_quant.components import find_components, recommended_size
    from flux_quant.drawing.pictures import painted_size

    if not 0 < strength <= 1:
        raise UserError(f"strength {strength:g}: choose a number above 0, up to 1")
    transformer = find_components(model, t5, clip, vae, tokenizers).transformer
    width, height = painted_size(image, recommended_size(transformer))
    drawing.generate(**given | {"size": size or f"{width}x{height}"})
