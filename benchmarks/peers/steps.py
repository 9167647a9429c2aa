"""One evaluation of the transformer: the same GGUF file, the same noise, no words.

At FLUX.1's width with one block of each kind and random weights, because that is what diffusers and aircanvas read; and
the shipped model, which has other dimensions. Words are 256 vectors of zeros and the pooled vector is zero, because
stable-diffusion.cpp takes embeddings from encoders alone, and T5 has 9 GB.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from flux_quant.arch import FluxConfig
from flux_quant.benchmarks.bench.models import full_size
from flux_quant.benchmarks.bench.record import OURS, Scalar
from flux_quant.benchmarks.offloader_ways import diffusers_config
from flux_quant.benchmarks.peers import sdcpp_files
from flux_quant.benchmarks.peers.contest import Contest, Crew, Entry
from flux_quant.benchmarks.random_weights import write_random
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.checkpoint import open_checkpoint
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.model import unpack_latents

BLOCKS = (1, 1)
FORMATS = ("q8_0", "q4_k")  # that are there to be asked for; the first one is measured without asking
SIDE, SEED = 64, 7
GUIDANCE = 4.0  # 1000 times it is exact in BF16, in which diffusers multiplies: 3500 becomes 3504 there
ON_CUDA = 1024  # the side there: the device shall have something to do
FAR = 3.0  # latents beyond it are not read off a picture: the autoencoder flattens them
SHIPPED_WORDS = 64
SHIPPED, WIDE = "shipped", f"3072 wide, {BLOCKS[0]} + {BLOCKS[1]} blocks, random"
EIGHT_BIT = "products in 8 bits; its velocity read off an 8-bit picture of three of 16 channels"
FROM_DISK = "BF16 source packed to FP8 by each; blocks are read from disk at every step"


def contests(device: str, small: bool, formats: tuple[str, ...]) -> list[Contest]:
    """On CUDA only what there are others for: those who read GGUF at FLUX.1's width."""
    if device == "cuda":
        crew = Crew()
        names = [name for name in FORMATS if name in (formats or FORMATS)]
        return [] if small else [wide(name, device, crew) for name in names]
    found = [shipped(device), from_disk(device, SHIPPED)]
    if not small:
        found += [wide(name, device) for name in FORMATS if name in (formats or FORMATS[:1])]
        found.append(from_disk(device, WIDE))
    return found


def common(device: str, words: int) -> dict:
    dtype = "bfloat16" if device == "cuda" else "float32"
    side = side_of(device)
    picture = {"width": side, "height": side, "seed": SEED, "words": words, "guidance": GUIDANCE}
    return {"kind": "step", "device": device, "dtype": dtype, **picture}


def side_of(device: str) -> int:
    return ON_CUDA if device == "cuda" else SIDE


def readers(name: str) -> list[Entry]:
    """Those who read GGUF."""
    ours = f"{OURS} {name}"
    return [
        Entry(OURS, {"format": name}),
        Entry("diffusers", {"format": name}, against=ours),
        Entry("stable-diffusion.cpp", {"format": name}, against=ours, note=EIGHT_BIT),
    ]


def for_sdcpp(folder: Path, device: str) -> dict:
    """Nothing where its runner refuses."""
    if device == "cuda":
        return {}
    sdcpp_files.write_clip(folder / "clip.gguf")
    sdcpp_files.write_autoencoder(folder / "autoencoder.safetensors")
    return {"clip": str(folder / "clip.gguf"), "autoencoder": str(folder / "autoencoder.safetensors")}


def write_config(config: FluxConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"_class_name": "FluxTransformer2DModel", "patch_size": 1, **diffusers_config(config)}
    (folder / "config.json").write_text(json.dumps(content) + "\n")


def wide(name: str, device: str, crew: Crew | None = None) -> Contest:
    def material(folder: Path) -> dict:
        config = full_size(*BLOCKS)
        write_random(folder / "flux.gguf", config, name)
        write_config(config, folder)
        files = {"model": str(folder / "flux.gguf"), "config": str(folder), **for_sdcpp(folder, device)}
        return common(device, sdcpp_files.WORDS) | files

    side = side_of(device)
    what = {"work": "step", "model": WIDE, "size": f"{side}x{side}"}
    return Contest(what, readers(name), material, judge, needs=20.0, crew=crew)


def shipped(device: str) -> Contest:
    def material(folder: Path) -> dict:
        source, config = shipped_model()
        run(make_plan(Conversion(source, folder / "flux.gguf", "q8_0", force=True)))
        write_config(config, folder)
        files = {"model": str(folder / "flux.gguf"), "config": str(folder), **for_sdcpp(folder, device)}
        return common(device, SHIPPED_WORDS) | files

    what = {"work": "step", "model": SHIPPED, "size": f"{SIDE}x{SIDE}"}
    return Contest(what, readers("q8_0"), material, judge, needs=10.0)


def shipped_model() -> tuple[Path, FluxConfig]:
    source = find_components(BUNDLED).transformer
    with open_checkpoint(source) as reader:
        return source, FluxConfig.from_shapes({name: info.shape for name, info in reader.tensors.items()})


def from_disk(device: str, model: str) -> Contest:
    def material(folder: Path) -> dict:
        if model == SHIPPED:
            source, config = shipped_model()
        else:
            source, config = folder / "flux.safetensors", full_size(*BLOCKS)
            write_random(source, config, "bf16")
        run(make_plan(Conversion(source, folder / "flux-fp8.safetensors", "fp8", force=True)))
        run(make_plan(Conversion(source, folder / "transformer", "bf16", force=True, folder=True)))
        write_config(config, folder / "transformer")
        files = {"model": str(folder / "flux-fp8.safetensors"), "folder": str(folder)}
        return common(device, SHIPPED_WORDS if model == SHIPPED else sdcpp_files.WORDS) | files

    what = {"work": "step from disk", "model": model, "size": f"{SIDE}x{SIDE}"}
    entries = [
        Entry(OURS, {"format": "fp8"}, note="mapped, and so in the system's cache; not streamed"),
        Entry("aircanvas", {"format": "fp8"}, against=f"{OURS} fp8", note=FROM_DISK),
    ]
    return Contest(what, entries, material, judge, needs=10.0 if model == SHIPPED else 30.0)


def judge(shared: dict, entry: Entry, out: Path) -> dict[str, Scalar]:
    """How far a peer's velocity is from ours on the same noise, relative; ours comes first."""
    if entry.peer == OURS:
        shared["ours"] = str(out)
        return {}
    made, ours = torch.load(out, weights_only=True), torch.load(shared["ours"], weights_only=True)["velocity"]
    if "picture" not in made:
        return {"off_ours": relative(ours, made["velocity"])}
    rows, columns = shared["height"] // 16, shared["width"] // 16
    right = unpack_latents(ours, rows, columns)[0, : sdcpp_files.SHOWN]
    noise = torch.randn(16, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(shared["seed"]))
    noise = noise[: sdcpp_files.SHOWN]
    told = (noise - right).abs() < FAR
    off = relative(right[told], (noise - sdcpp_files.read_back(made["picture"]))[told])
    return {"off_ours": off, "told_share": told.float().mean().item()}


def relative(right: Tensor, found: Tensor) -> float:
    return ((right - found).norm() / right.norm()).item()
