"""What the verbs of the command line take, by verb: a new option is a row here and a parameter in `cli`.

A row that several verbs share stands at the top. typer makes the option's name from that of the parameter unless the
row gives one.
"""

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[Path, typer.Argument(metavar="SRC", help="file, shards or folder of a model")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DST", help="its suffix chooses the container")]
FormatName = Annotated[str, typer.Option("--format", "-f", help="q8_0 q6_k q5_k_m q4_k_m ... fp8 bf16; see README")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")]
Force = Annotated[bool, typer.Option("--force", help="replace DST if it exists")]
Component = Annotated[Path | None, typer.Option(metavar="FILE", help="[default: found beside the model]")]
Folder = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="where everything is written")]
Model = Annotated[Path | None, typer.Option("--model", "-m", help="model folder [default: the bundled model]")]
Threads = Annotated[int | None, typer.Option(min=1, help="processor threads [default: all cores]")]

# Of `convert`.
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="GLOB=FORMAT", help="another format for some tensors; repeatable"),
]
Keeps = Annotated[
    list[str] | None, typer.Option("--keep", metavar="GLOB", help="tensors that keep their own format; repeatable")
]
RecipeFile = Annotated[Path | None, typer.Option(metavar="FILE", help="lines GLOB=FORMAT, after --set and --keep")]
Components = Annotated[
    str | None, typer.Option(metavar="LIST", help="which models of SRC: transformer,t5,clip,vae,...")
]
Loras = Annotated[
    list[str] | None, typer.Option("--lora", metavar="FILE[:STRENGTH]", help="fuse a LoRA first; repeatable")
]
SearchMode = Annotated[str, typer.Option(help="of scales: full, or none for the bytes of ggml's plain reference")]
Imatrix = Annotated[Path | None, typer.Option(metavar="FILE", help="importance of input columns")]
Calibration = Annotated[Path | None, typer.Option(metavar="FILE", help="of `calibrate`: scales for FP8 activations")]
Legacy = Annotated[bool, typer.Option("--legacy", help="FP8 in the form of 2024, for Forge")]
AsFolder = Annotated[bool, typer.Option("--diffusers", help="DST is a folder as diffusers writes it")]
ShardSize = Annotated[str | None, typer.Option(metavar="SIZE", help="several files of at most 2GB, 500MB ...")]
ShardBy = Annotated[str | None, typer.Option(metavar="block", help="one file per block")]
Tokenizer = Annotated[
    Path | None, typer.Option(metavar="FILE", help="spiece.model for a T5 as GGUF [default: beside SRC]")
]
QuantizeOn = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ... that quantizes")]
Resume = Annotated[bool, typer.Option("--resume", help="keep what is finished if interrupted, and go on with it")]
Checksums = Annotated[bool, typer.Option("--checksums", help="record the SHA-256 of every tensor")]

# Of `generate` and `calibrate`.
GenerateModel = Annotated[Path, typer.Option("--model", "-m", help="transformer file, or a folder of model files")]
Steps = Annotated[int, typer.Option(min=1, help="denoising steps")]
Guidance = Annotated[float, typer.Option(help="scale of the distilled guidance")]
Seed = Annotated[int, typer.Option(help="of the starting noise, of the first picture")]
PictureSize = Annotated[str | None, typer.Option(metavar="WxH", help="pixels [default: what the model was made for]")]
Tokenizers = Annotated[Path | None, typer.Option(metavar="DIR", help="folder with both tokenizers")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]

# Of `calibrate`.
Importance = Annotated[Path, typer.Option("--output", "-o", metavar="DST", help="a .safetensors file")]
PromptFile = Annotated[Path, typer.Option(metavar="FILE", help="one prompt per line")]

# Of `generate`.
Picture = Annotated[Path, typer.Option("--output", "-o", metavar="PNG", help="where the picture goes")]
ForcePicture = Annotated[bool, typer.Option("--force", help="replace PNG if it exists")]

# Of `generate`: what is drawn.
Width = Annotated[int | None, typer.Option(metavar="PIXELS", help="instead of --size, with --height")]
Height = Annotated[int | None, typer.Option(metavar="PIXELS", help="instead of --size, with --width")]
Scheduler = Annotated[str, typer.Option(help="noise levels: euler, or ComfyUI's simple and beta")]
Seeds = Annotated[str | None, typer.Option(metavar="N,N,...", help="a picture for each of these seeds")]
Batch = Annotated[int | None, typer.Option(min=1, metavar="N", help="N pictures, of --seed and the next ones")]
Negative = Annotated[str | None, typer.Option(help="what to lead away from, with --cfg")]
Cfg = Annotated[float, typer.Option(help="scale of true guidance away from --negative; doubles the time")]
CfgRange = Annotated[str, typer.Option(metavar="FROM:TO", help="where --cfg acts, in parts of the steps")]
GivenPicture = Annotated[Path | None, typer.Option("--image", metavar="FILE", help="a picture to begin with")]
Strength = Annotated[
    float | None, typer.Option(help="how much of it changes, and share of the steps taken [default: 0.6]")
]
Denoise = Annotated[float | None, typer.Option(help="instead of --strength, as ComfyUI: all steps are taken")]
Mask = Annotated[Path | None, typer.Option(metavar="FILE", help="white where --image is drawn anew")]
ControlNets = Annotated[
    list[str] | None,
    typer.Option(
        "--controlnet", metavar="FILE[:SCALE[:START-END]]", help="a ControlNet, in part of the steps; repeatable"
    ),
]
ControlImages = Annotated[
    list[Path] | None,
    typer.Option("--control-image", metavar="FILE", help="what it sees, or a Canny or Depth model; repeatable"),
]
ControlModes = Annotated[
    list[str] | None, typer.Option("--control-mode", help="of a Union net: canny, depth, pose ...; repeatable")
]
ReferencePicture = Annotated[Path | None, typer.Option("--reference", metavar="FILE", help="what Kontext sees")]
SaveLatent = Annotated[Path | None, typer.Option(metavar="FILE", help="keep the latents, for `decode`")]
Preview = Annotated[
    Path | None, typer.Option(metavar="PNG", help="rewritten after every step: a small picture of what is to come")
]

# Of `inpaint`.
PaintedPicture = Annotated[Path, typer.Option("--image", metavar="FILE", help="the picture")]
PaintedMask = Annotated[Path, typer.Option("--mask", metavar="FILE", help="white where it is drawn anew")]
PaintedSize = Annotated[str | None, typer.Option("--size", metavar="WxH", help="pixels [default: of the picture]")]
PaintedStrength = Annotated[
    float, typer.Option("--strength", help="1: from noise; less keeps traces of what is covered")
]

# Of `decode`.
LatentFile = Annotated[Path, typer.Argument(metavar="LATENT", help="of generate --save-latent, or of a failed decode")]
DecodingVae = Annotated[Path | None, typer.Option(metavar="FILE", help="[default: the one it was drawn with]")]

# Of `generate`: LoRAs.
DrawingSteps = Annotated[int | None, typer.Option("--steps", min=1, help="denoising steps [default: 20, turbo 8]")]
DrawingGuidance = Annotated[
    float | None, typer.Option("--guidance", help="scale of the distilled guidance [default: 3.5]")
]
ReduxFile = Annotated[str | None, typer.Option("--redux", metavar="FILE[:WEIGHT]", help="reads a picture as words")]
ReduxPicture = Annotated[Path | None, typer.Option("--redux-image", metavar="FILE", help="the picture for --redux")]
ImageEncoder = Annotated[Path | None, typer.Option("--image-encoder", metavar="FILE", help="SigLIP, for --redux")]
SideLoras = Annotated[
    list[str] | None, typer.Option("--lora", metavar="FILE[:STRENGTH]", help="a LoRA beside the weights; repeatable")
]
Preset = Annotated[str | None, typer.Option(metavar="turbo", help="steps and guidance that a distilled LoRA is for")]

# Of `generate`: text.
PromptText = Annotated[str, typer.Option("--prompt", "-p", help="what CLIP, and T5 without --t5-prompt, read")]
PromptT5 = Annotated[str | None, typer.Option("--t5-prompt", "--prompt-t5", help="another prompt for T5")]
PadTo = Annotated[
    int | None, typer.Option(min=1, metavar="TOKENS", help="length of T5's text [default: 512, schnell 256]")
]
UsePromptCache = Annotated[
    bool, typer.Option("--prompt-cache/--no-prompt-cache", help="keep encoded prompts on the disk, and use them")
]
PromptCacheSize = Annotated[str, typer.Option(metavar="SIZE", help="of all encoded prompts together")]

# Of `generate`: memory.
VramBudget = Annotated[
    str | None, typer.Option("--vram", metavar="SIZE", help="GPU memory to keep to: 8GB, 7.5GiB ...")
]
RamBudget = Annotated[str | None, typer.Option("--ram-budget", metavar="SIZE", help="RAM for weights that stream")]
Compute = Annotated[str, typer.Option("--compute", help="what products multiply: 16-bit, int8 or fp8")]
MetricsFile = Annotated[Path | None, typer.Option("--metrics", metavar="FILE", help="what was measured, as JSON")]
