"""A FLUX.1 [dev] of full size with random weights: 780 tensors, 11,901,408,320 parameters, 23.8 GB in BF16.

    python -I -m flux_quant.benchmarks.make_full_size build/flux1-random.safetensors [--fraction 0.1]

Values have the spread of trained ones (normal, standard deviation 0.02), so that scales, times and sizes are realistic;
pictures are noise. `--fraction` keeps that share of the blocks, for a shorter test of the same layers.
"""

import argparse
import sys
from pathlib import Path

import torch

from flux_quant import arch
from flux_quant.arch import FluxConfig
from flux_quant.benchmarks.random_weights import DEV, DOUBLE, SINGLE, SPREAD
from flux_quant.console import progress
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.writer import create_checkpoint
from flux_quant.model import Flux


def infos(fraction: float, guidance: bool = True) -> list[TensorInfo]:
    """guidance: FLUX.1 [dev] has it, [schnell] does not."""
    blocks = (max(1, round(count * fraction)) for count in (DOUBLE, SINGLE))
    config = FluxConfig(
        **DEV | {"guidance": guidance}, **dict(zip(("double_blocks", "single_blocks"), blocks, strict=True))
    )
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Flux(config).state_dict().items()}
    return [TensorInfo(name, shapes[name], "bf16") for name in sorted(shapes, key=arch.running_order)]


def make(path: Path, fraction: float = 1.0, seed: int = 0) -> int:
    """Returns the number of parameters."""
    tensors = infos(fraction)
    total, done = sum(info.numel for info in tensors), 0
    generator = torch.Generator().manual_seed(seed)
    with create_checkpoint(path, tensors, {"modelspec.title": "random weights"}) as writer, progress() as report:
        for info in tensors:
            weight = torch.empty(info.shape, dtype=torch.bfloat16).normal_(0, SPREAD, generator=generator)
            writer.write(info.name, (weight + 1 if info.name.endswith("scale") else weight,))
            done += info.numel
            report("writing", done, total)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--fraction", type=float, default=1.0)
    args = parser.parse_args()
    print(f"{args.path}: {make(args.path, args.fraction):,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
