"""What the models that we convert are called: by users, by readers of GGUF, inside all-in-one files, as files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    label: str  # in options and messages
    file_name: str  # of a part, without its suffix
    architecture: str = ""  # `general.architecture`, by which readers of GGUF choose
    prefix: str | None = None  # where ComfyUI looks for it in an all-in-one file


TARGETS = {  # family -> its names; of several models in a source, the first here is the main one
    "FLUX.1": Target("transformer", "transformer", "flux", "model.diffusion_model."),
    "FLUX ControlNet": Target("controlnet", "controlnet", "flux-controlnet"),
    "XLabs ControlNet": Target("controlnet", "controlnet", "flux-controlnet"),
    "FLUX Redux": Target("redux", "redux"),
    "SDXL": Target("unet", "unet", "sdxl"),
    "T5 encoder": Target("t5", "t5xxl", "t5encoder", "text_encoders.t5xxl.transformer."),
    "CLIP-L": Target("clip", "clip_l", prefix="text_encoders.clip_l.transformer."),
    "CLIP-G": Target("clip_g", "clip_g"),
    "VAE": Target("vae", "ae", prefix="vae."),
}
LABELS = {family: target.label for family, target in TARGETS.items()}
