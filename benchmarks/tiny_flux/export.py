"""Put the trained parts together as a model folder in ComfyUI's layout, in BF16.

python -m flux_quant.benchmarks.tiny_flux.export --vae build/tiny/vae --flux build/tiny/flux --out flux_quant/tiny_flux
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from flux_quant import arch
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.writer import create_checkpoint
from flux_quant.formats import FORMATS
from flux_quant.naming import vae_from_diffusers

ORIGIN = {
    "modelspec.title": "flux1-tiny",
    "modelspec.architecture": "Flux.1-dev",
    "modelspec.resolution": "96x96",
    "modelspec.license": "Apache-2.0; trained on images of Noto Color Emoji (OFL-1.1)",
    "modelspec.description": "FLUX.1 [dev] architecture at width 256, 2 double and 5 single blocks, trained on emoji",
}


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """BF16, in the order in which the tensors are used."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors, key=arch.running_order)
    infos = [TensorInfo(name, tuple(tensors[name].shape), "bf16") for name in names]
    with create_checkpoint(path, infos, metadata, force=True) as writer:
        for name in names:
            writer.write(name, FORMATS["bf16"].pack(tensors[name].cpu()))
    parameters = sum(info.numel for info in infos)
    print(f"{path}: {len(infos)} tensors, {parameters:,} parameters, {path.stat().st_size:,} bytes")


def export_model(state: Mapping[str, Tensor], tokenizers: Path, out: Path, notes: Mapping[str, str]) -> None:
    """A Bundle's weights, and a folder with the tokenizers; notes: more metadata."""
    write(out / "diffusion_models/flux1-tiny.safetensors", part(state, "flux."), {**ORIGIN, **notes})
    t5 = {name: tensor for name, tensor in part(state, "t5.").items() if name != "encoder.embed_tokens.weight"}
    write(out / "text_encoders/t5.safetensors", t5, {})
    clip = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in part(state, "clip.").items()}
    write(out / "text_encoders/clip_l.safetensors", clip, {})
    shutil.copytree(tokenizers, out / "tokenizers", dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vae", type=Path, help="without it --out keeps the autoencoder it has")
    parser.add_argument("--flux", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    saved = torch.load(args.flux / "checkpoint.pt", weights_only=True, map_location="cpu")
    steps = {"flux_quant.training_steps": str(saved["step"])}
    export_model(saved["average"], args.flux / "tokenizers", args.out, steps)
    if args.vae:
        from diffusers import AutoencoderKL

        vae = vae_from_diffusers(AutoencoderKL.from_pretrained(args.vae).state_dict())
        write(args.out / "vae/ae.safetensors", vae, {})


if __name__ == "__main__":
    main()
