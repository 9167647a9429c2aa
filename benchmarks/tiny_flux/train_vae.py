"""Train the autoencoder of the tiny model, in two stages.

Stage 1 trains encoder and decoder together; then the latents are rescaled so that FLUX.1's own scale factor brings them
to unit variance, and the encoder is frozen. Stage 2 (`--decoder-only`) goes on with the decoder alone, at any later
time: latents, and with them the transformer trained on them, do not change.

    python -m flux_quant.benchmarks.tiny_flux.train_vae --minutes 25 --out build/tiny/vae
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from flux_quant.benchmarks.metrics import psnr
from flux_quant.benchmarks.tiny_flux.emoji import EmojiWorld
from flux_quant.generation import choose_device

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SCALE, SHIFT = 0.3611, 0.1159  # FLUX.1's latent constants, which loaders of its VAE have built in
CONFIG = dict(
    block_out_channels=(32, 32, 64, 96),
    layers_per_block=1,
    norm_num_groups=8,  # of 4 channels, as in FLUX.1's first level; of 1 channel they would lose flat colours
    latent_channels=16,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=SCALE,
    shift_factor=SHIFT,
    sample_size=96,
)


def batch(world: EmojiWorld, rng: np.random.Generator, n: int) -> torch.Tensor:
    """n random scenes as (n, 3, 96, 96) float in -1..1."""
    pictures = np.stack([world.render(world.sample(rng)) for _ in range(n)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() * 2 - 1


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + 2 MSE + a quarter of the L1 of the gradients, which keeps edges sharp."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.25 * edges


@torch.no_grad()
def reconstruction_psnr(vae: nn.Module, pictures: torch.Tensor) -> float:
    """Mean over pictures of the PSNR in dB of the reconstruction, peak 1.0."""
    output = torch.cat([vae.decode(vae.encode(p).latent_dist.mode()).sample for p in pictures.split(32)])
    return psnr(output.clamp(-1, 1) / 2, pictures / 2).mean().item()


@torch.no_grad()
def normalise_latents(vae: "AutoencoderKL", pictures: torch.Tensor) -> float:
    """Scale the encoder's output so that SCALE brings it to unit variance, and the decoder's input back. Exact."""
    std = torch.cat([vae.encode(p).latent_dist.mode() for p in pictures.split(32)]).std().item()
    factor = 1 / (std * SCALE)
    mean_rows = slice(0, vae.config.latent_channels)
    vae.encoder.conv_out.weight[mean_rows] *= factor
    vae.encoder.conv_out.bias[mean_rows] *= factor
    vae.encoder.conv_out.bias[mean_rows.stop :] += 2 * math.log(factor)
    vae.decoder.conv_in.weight /= factor
    return std


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="stage 1 goes on from what --out holds")
    parser.add_argument("--decoder-only", action="store_true", help="stage 2: continue the decoder of --out")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from diffusers import AutoencoderKL

    device, _ = choose_device(args.device)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    world = EmojiWorld()
    test = batch(world, np.random.default_rng(12345), 256).to(device)

    continued = args.resume or args.decoder_only
    vae = AutoencoderKL(**CONFIG)
    if continued:
        vae.load_state_dict(AutoencoderKL.from_pretrained(args.out).state_dict())
    vae.to(device)
    trained = list((vae.decoder if args.decoder_only else vae).parameters())
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = torch.optim.swa_utils.AveragedModel(vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "log.jsonl").open("a")
    start, step, last_report = time.monotonic(), 0, 0.0
    while (elapsed := (time.monotonic() - start) / 60) < args.minutes:
        rate = 0.5 * (1 + math.cos(math.pi * min(1.0, elapsed / args.minutes)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (0.01 + 0.99 * rate) * min(1.0, (step + 1) / 100)
        pictures = batch(world, rng, args.batch).to(device)
        with torch.set_grad_enabled(not args.decoder_only):
            posterior = vae.encode(pictures).latent_dist
        latents = posterior.mode() if args.decoder_only else posterior.sample()
        loss = loss_of(vae.decode(latents).sample, pictures)
        if not args.decoder_only:
            loss = loss + 5e-4 * posterior.kl().mean() / latents[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        ema.update_parameters(vae)
        step += 1
        if elapsed - last_report >= 2:
            last_report = elapsed
            row = dict(
                minutes=round(elapsed, 1), step=step, loss=loss.item(), psnr=reconstruction_psnr(ema.module, test[:64])
            )
            print(row, flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
            ema.module.save_pretrained(args.out.with_name(args.out.name + "-running"))
    vae = ema.module
    row = dict(stage=2 if args.decoder_only else 1, minutes=args.minutes, steps=step, batch=args.batch, seed=args.seed)
    row |= dict(threads=args.threads, psnr=reconstruction_psnr(vae, test))
    if not args.decoder_only:
        row["latent_std_before"] = normalise_latents(vae, test)
        row["psnr_after_scaling"] = reconstruction_psnr(vae, test)
    print(row, flush=True)
    log.write(json.dumps(row) + "\n")
    vae.save_pretrained(args.out)


if __name__ == "__main__":
    main()
