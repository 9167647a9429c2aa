"""What decoding in tiles costs in likeness: the bundled VAE against one piece, with shared statistics and without.

python -I -m flux_quant.benchmarks.vae_tiles [--save]
"""

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from flux_quant.arch import LATENT_SCALE, LATENT_SHIFT
from flux_quant.benchmarks.machine import write_result
from flux_quant.benchmarks.metrics import psnr
from flux_quant.components import BUNDLED, find_components
from flux_quant.drawing import vae
from flux_quant.loading import load_vae

HEIGHT, WIDTH = 256, 384  # pixels
COUNTS = (2, 3, 4, 6, 12)
UNITS = (1, 8)  # positions of the latent, pixels of the picture


def discs() -> Tensor:
    """(1, 3, HEIGHT, WIDTH) in 0-1: discs of many colours on white, as the bundled model draws them."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 1, HEIGHT), torch.linspace(0, 1.5, WIDTH), indexing="ij")
    out = torch.ones(3, HEIGHT, WIDTH)
    for centre_y, centre_x, radius, *colour in torch.rand(24, 6, generator=generator).tolist():
        inside = (y - centre_y) ** 2 + (x - 1.5 * centre_x) ** 2 < (0.05 + 0.15 * radius) ** 2
        out = torch.where(inside, torch.tensor(colour)[:, None, None], out)
    return out[None]


@torch.inference_mode()
def measure() -> Iterator[dict[str, object]]:
    """For each number of tiles the PSNR to one piece: `shared` statistics as in use, and each tile's `own`."""
    model = load_vae(find_components(BUNDLED).vae)
    z = vae.encode(model, discs()) / LATENT_SCALE + LATENT_SHIFT

    def run(x: Tensor) -> Tensor:
        return model.decode(x).sample

    def picture(decoded: Tensor) -> Tensor:
        return (decoded / 2 + 0.5).clamp(0, 1)

    whole = picture(run(z))
    for count in COUNTS:
        tiling = next(t for t in vae.tilings(HEIGHT // 8, WIDTH // 8) if t.count == count)
        ways = {
            "shared": vae.with_shared_norms(model, run, z, tiling, UNITS, 3),
            "own": vae.run_tiled(run, z, tiling, *UNITS, 3),
        }
        yield {"tiles": count, **{name: psnr(picture(decoded), whole).item() for name, decoded in ways.items()}}


def sentence(rows: list[dict[str, object]]) -> str:
    """As docs/generating.md says it."""
    found = {row["tiles"]: row for row in rows}
    first, *others = (2, 4, 12)
    text = f"{first} tiles {found[first]['shared']:.1f} dB (without that pass {found[first]['own']:.1f})"
    return ", ".join([text, *(f"{n} tiles {found[n]['shared']:.1f} ({found[n]['own']:.1f})" for n in others)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    rows = list(measure())
    print(sentence(rows))
    if args.save:
        print(f"wrote {write_result('vae_tiles', {'size': [WIDTH, HEIGHT], 'rows': rows})}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
