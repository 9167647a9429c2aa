"""FLUX.1's autoencoder in plain torch, in the names of its file: to train and to judge with where diffusers is missing.

Matches black-forest-labs/flux `modules/autoencoder.py` and diffusers' `AutoencoderKL`; every dimension comes from the
tensors' shapes, as in `configs.vae_config`.

Letters: B pictures, C channels of a level, H x W pixels, h x w positions of the latent.
"""

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from flux_quant.arch import LATENT_SCALE, LATENT_SHIFT
from flux_quant.configs import vae_config
from flux_quant.converters.checkpoint import load
from flux_quant.converters.component import open_component
from flux_quant.loading import fill, shapes_of

EPS = 1e-6
CHANNELS_OF_A_GROUP = 4


def norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=EPS)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inputs, groups), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs, groups), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """Of one head, between all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(channels, groups)
        for name in ("q", "k", "v", "proj_out"):
            self.add_module(name, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).flatten(2).transpose(1, 2)[:, None].contiguous() for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(y)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """`block`s in a row, and what changes the size after them: `downsample` or `upsample`."""

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int, **resize: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(blocks))
        self.last = next(iter(resize), None)
        for name, module in resize.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.last is None else self.get_submodule(self.last)(x)


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = (ResBlock(channels, channels, groups) for _ in range(2))
        self.attn_1 = Attention(channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, widths: Sequence[int], blocks: int, latents: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        before = [widths[0], *widths[:-1]]
        last = len(widths) - 1
        self.down = nn.ModuleList(
            Level(before[i], width, blocks, groups, **({} if i == last else {"downsample": Downsample(width)}))
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out, self.conv_out = norm(widths[-1], groups), nn.Conv2d(widths[-1], 2 * latents, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, widths: Sequence[int], blocks: int, latents: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latents, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        before = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Level(before[i], width, blocks + 1, groups, **({} if i == 0 else {"upsample": Upsample(width)}))
            for i, width in enumerate(widths)
        )
        self.norm_out, self.conv_out = norm(widths[0], groups), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    def __init__(self, widths: Sequence[int], blocks: int, latents: int) -> None:
        """blocks: of a level of the encoder; the decoder has one more."""
        super().__init__()
        groups = widths[0] // CHANNELS_OF_A_GROUP
        self.encoder = Encoder(widths, blocks, latents, groups)
        self.decoder = Decoder(widths, blocks, latents, groups)

    def encode(self, pictures: Tensor) -> Tensor:
        """pictures (B, 3, H, W) in 0-1 -> normalised latents (B, 16, h, w): the mean of the distribution."""
        mean, _ = self.encoder(pictures * 2 - 1).chunk(2, dim=1)
        return (mean - LATENT_SHIFT) * LATENT_SCALE

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse; pictures may reach a little beyond 0-1."""
        return self.decoder(self.unscaled(latents)) / 2 + 0.5

    @staticmethod
    def unscaled(latents: Tensor) -> Tensor:
        """What the decoder reads."""
        return latents / LATENT_SCALE + LATENT_SHIFT


def load_autoencoder(path: str | Path) -> Autoencoder:
    """Of an `ae.safetensors`, in float32, without gradients. UserError if the file is none."""
    reader = open_component(path, "VAE")
    config = vae_config(shapes_of(reader))
    model = Autoencoder(config["block_out_channels"], config["layers_per_block"], config["latent_channels"])
    fill(model, {name: load(reader, name) for name in reader.tensors}, reader.path)
    return model.eval()
