"""Conversions of one BF16 file to GGUF: by us, ggml's code in C, llama.cpp's in Python, stable-diffusion.cpp.

Ours searches for scales and verifies what it wrote; `search: no` is its quick path, as the others' plain one is.
"""

from pathlib import Path

import torch

from flux_quant.benchmarks.bench.models import full_size
from flux_quant.benchmarks.bench.record import OURS, Scalar
from flux_quant.benchmarks.peers.contest import Contest, Entry
from flux_quant.benchmarks.random_weights import write_random
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.quantize import Deviation

FORMATS = {"q8_0": "q8_0", "q4_0": "q4_0", "q4_k": "q4_k_s"}  # ggml's name -> our recipe
SEARCHED = ("q4_0",)  # K-quants are searched for either way
OTHERS = ("libgguf", "gguf", "stable-diffusion.cpp")
SHIPPED = "shipped"


def contests(small: bool, wide: bool) -> list[Contest]:
    """wide: one of FLUX.1's double blocks and one single block too, 1.1 GB."""
    models = [SHIPPED, *(["3072 wide, 1 + 1 blocks, random"] if wide and not small else [])]
    return [contest(model, name) for model in models for name in FORMATS]


def contest(model: str, name: str) -> Contest:
    def material(folder: Path) -> dict:
        source = find_components(BUNDLED).transformer
        if model != SHIPPED:
            source = folder / "flux.safetensors"
            write_random(source, full_size(1, 1), "bf16")
        return {"kind": "convert", "source": str(source), "format": name, "target": str(folder / "out.gguf")}

    entries = [Entry(OURS, {"format": name}, {"recipe": FORMATS[name]})]
    if name in SEARCHED:
        entries.append(Entry(OURS, {"format": name, "search": "no"}, {"recipe": FORMATS[name], "search": False}))
    entries += [Entry(peer, {"format": name}, against=entries[0].name) for peer in OTHERS]
    what = {"work": "convert", "model": model}
    return Contest(what, entries, material, judge, needs=15.0 if model == SHIPPED else 60.0)


def judge(shared: dict, entry: Entry, out: Path) -> dict[str, Scalar]:
    """Error over the weights that were packed, and how much of the model those are."""
    total, numel, everything = Deviation(), 0, 0
    with open_checkpoint(shared["source"]) as source, open_checkpoint(shared["target"]) as target:
        for name, info in target.tensors.items():
            everything += info.numel
            if info.format != shared["format"]:
                continue
            right, found = load(source, name).float(), load(target, name).float()
            noise = (right - found).square().sum(dtype=torch.float64).item()
            total += Deviation(right.square().sum(dtype=torch.float64).item(), noise)
            numel += info.numel
    size = Path(shared["source"]).stat().st_size
    return {"weight_snr_db": total.snr, "packed_share": numel / everything, "source_bytes": size}
