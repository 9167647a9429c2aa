"""What users report of FLUX.1 on their cards today, with other programs: as published, not checked here.

Most are single runs of unnamed versions; "per step" is what their program printed, "per picture" includes the encoders
and the VAE. `times over` a figure of ours means little: steps, sizes and clocks differ, and often are not said.
"""

from dataclasses import dataclass

FORGE, COMFY = "https://github.com/lllyasviel/stable-diffusion-webui-forge", "https://github.com/Comfy-Org/ComfyUI"
STEP, PICTURE = "step_seconds", "picture_seconds"


@dataclass(frozen=True)
class Report:
    vram: int  # GB
    card: str
    program: str
    format: str
    size: str | None
    kind: str
    seconds: tuple[float, float]  # lowest and highest that is reported
    source: str
    note: str = ""


def report(vram: int, card: str, program: str, form: str, size: str | None, kind: str, *rest: object) -> Report:
    """rest: one number or the lowest and the highest, source, note."""
    numbers = [value for value in rest if not isinstance(value, str)]
    words = [value for value in rest if isinstance(value, str)]
    return Report(vram, card, program, form, size, kind, (min(numbers), max(numbers)), *words)


SQUARE = "1024x1024"
REPORTS = (
    report(4, "a card of 4 GB", "ComfyUI", "dev GGUF, GGUF T5", "768x768", PICTURE, 70,
           "https://huggingface.co/city96/t5-v1_1-xxl-encoder-gguf/discussions/4"),
    report(6, "GTX 1060", "Forge", "NF4 v2", "896x1152", STEP, 25.5, 42, f"{FORGE}/issues/1338", "rising while it ran"),
    report(6, "RTX 2060", "unknown", "schnell FP8", "512x768", STEP, 16.9, "https://decrypt.co/244307"),
    report(8, "GTX 1070", "ComfyUI", "FP8", SQUARE, STEP, 30, 45, f"{COMFY}/issues/4271"),
    report(8, "GTX 1070", "ComfyUI", "FP8", "512x768", STEP, 20, 30, f"{COMFY}/issues/4271"),
    report(8, "GTX 1070", "Forge", "NF4", None, PICTURE, 300, f"{FORGE}/issues/1114"),
    report(8, "10 and 20 series", "Forge", "NF4", SQUARE, PICTURE, 240, f"{FORGE}/discussions/1030"),
    report(8, "RTX 2060 Super", "ComfyUI", "schnell Q4_0", "1920x1080", PICTURE, 39, f"{COMFY}/issues/4461", "4 steps"),
    report(8, "RTX 2070 Super", "ComfyUI-GGUF", "NF4 or GGUF", None, PICTURE, 60,
           "https://github.com/city96/ComfyUI-GGUF/issues/30"),
    report(8, "RTX 3070 Laptop", "krita-ai-diffusion", "NF4 or FP8", SQUARE, PICTURE, 70,
           "https://github.com/Acly/krita-ai-diffusion/issues/1067"),
    report(8, "RTX 3070 Ti Laptop", "Forge", "FP8", SQUARE, STEP, 8.3,
           "https://github.com/huggingface/diffusers/issues/9149", "its author: no benchmark"),
    report(8, "RTX 3070 Ti Laptop", "Forge", "NF4", SQUARE, STEP, 2.15,
           "https://github.com/huggingface/diffusers/issues/9149", "its author: no benchmark"),
    report(8, "RTX 4060 Laptop", "ComfyUI", "FP8", None, STEP, 20, f"{COMFY}/issues/4461", "or more; 16 GB of RAM"),
    report(8, "RTX 4070 Laptop", "Forge", "FP8", SQUARE, STEP, 12,
           "https://huggingface.co/lllyasviel/flux1-dev-bnb-nf4/discussions/13", "NF4 in one file: about 54"),
    report(8, "RTX 5070 Laptop", "diffusers, leaf offload with streams", "schnell Q4_K_S", "512x512", STEP, 3.0, 3.7,
           "https://github.com/huggingface/diffusers/issues/14691"),
    report(10, "RTX 3080", "krita-ai-diffusion", "schnell FP8", SQUARE, PICTURE, 26, 35,
           "https://github.com/Acly/krita-ai-diffusion/issues/1023"),
    report(10, "RTX 3080", "krita-ai-diffusion", "dev FP8", SQUARE, PICTURE, 40,
           "https://github.com/Acly/krita-ai-diffusion/issues/1023"),
    report(12, "RTX 2060", "Forge", "NF4 or FP8", SQUARE, PICTURE, 398, f"{FORGE}/discussions/1030", "20 steps"),
    report(12, "RTX 3060", "Forge", "NF4", SQUARE, PICTURE, 85, f"{FORGE}/discussions/1030", "20 steps"),
    report(12, "RTX 3060", "Forge", "schnell NF4", SQUARE, PICTURE, 15, 17, f"{FORGE}/discussions/1020", "4 steps"),
    report(12, "RTX 3060", "ComfyUI", "FP8", None, STEP, 13.1, f"{COMFY}/issues/6008", "more than 1024x1024"),
    report(12, "RTX 3080 Ti", "Forge", "Q8_0", "1920x1080", STEP, 3.75, 15.4, f"{FORGE}/issues/1634",
           "the first run, and the second"),
    report(12, "RTX 4070", "Forge", "NF4 and a LoRA", "896x1152", PICTURE, 38, 50, f"{FORGE}/issues/1218"),
    report(16, "RTX 4060 Ti", "Forge", "NF4 v2", "1024x768", STEP, 1.5, f"{FORGE}/issues/1739",
           "about 3 with one or two LoRAs; its title says 4060"),
    report(24, "RTX 3090", "Forge", "FP8", SQUARE, PICTURE, 41, f"{FORGE}/issues/1901", "20 steps"),
    report(24, "RTX 3090", "Forge, asynchronous", "FP8", SQUARE, STEP, 1.97, 14.4, f"{FORGE}/issues/1575",
           "before and after a regression"),
    report(24, "RTX 4090", "ComfyUI", "FP8", SQUARE, STEP, 0.54, "https://github.com/Comfy-Org/ComfyUI/discussions/9002"),
    report(24, "RTX 4090", "flux-fp8-api", "FP8, products in FP8, compiled", SQUARE, STEP, 0.28,
           "https://github.com/aredden/flux-fp8-api"),
    report(24, "RTX 4090", "ComfyUI", "Q4_0", None, STEP, 0.71, f"{COMFY}/issues/4674", "1.3 with a LoRA"),
)  # fmt: skip
