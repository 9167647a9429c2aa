"""Fits the linear preview to the bundled model: python -m flux_quant.benchmarks.preview_factors

Draws the demo's pictures with four seeds each, decodes them, prints the row for `flux_quant.drawing.preview.FACTORS`.
"""

from dataclasses import replace
from pprint import pprint

import torch
from torch import Tensor

from flux_quant.benchmarks.demo import GUIDANCE, PROMPTS, SIZE
from flux_quant.components import BUNDLED, find_components
from flux_quant.drawing.preview import Factors, fit
from flux_quant.drawing.vae import decode
from flux_quant.generation import Request, denoise_batch, encode
from flux_quant.loading import load_flux, load_vae

SOURCE = "the bundled model's VAE: fitted by benchmarks/preview_factors.py"
SEEDS, STEPS = 4, 8


def samples(seeds: int = SEEDS, steps: int = STEPS) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Latents, the pictures they decode to, and the widths of the VAE."""
    components = find_components(BUNDLED)
    model, vae = load_flux(components.transformer), load_vae(components.vae)
    requests = [Request(prompt, steps=steps, guidance=GUIDANCE, size=SIZE) for prompt in PROMPTS]
    features = encode(components, requests, guided=model.config.guidance)
    latents = torch.cat(
        [denoise_batch(model, features, [replace(r, seed=seed) for r in requests]) for seed in range(seeds)]
    )
    return latents, decode(vae, latents), tuple(vae.config.block_out_channels)


def main() -> None:
    latents, pictures, widths = samples()
    factors: Factors = fit(latents, pictures, SOURCE)
    pprint({widths: factors}, width=110)


if __name__ == "__main__":
    main()
