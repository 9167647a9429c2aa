"""The FLUX.1 transformer in BFL names: our engine.

Text and image tokens pass through double blocks (own weights, joint attention) and then, concatenated, through single
blocks. Every block is steered by a vector made of timestep, guidance and pooled text: its modulation gives shift,
scale and gate. Matches black-forest-labs/flux `model.py` and diffusers' `FluxTransformer2DModel`.

Letters: B batch, S image tokens, T text tokens, L = T + S, D hidden width, H heads, C channels of a head.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_quant.arch import FluxConfig
from flux_quant.kernels import fused

TIME_CHANNELS = 256

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> what they attend to, all of them (B, H, L, C)


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Looked up at every call: people put a faster one in torch's place."""
    return F.scaled_dot_product_attention(q, k, v)


class Modulation(NamedTuple):
    """What a block does to a normalised stream: (1 + scale) * x + shift before, gate * y after; each (B, 1, D)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


StepModulation = Mapping[nn.Module, Tensor]  # rows (B, N) of every modulation linear: `modulation` evaluates them
Steering = Tensor | StepModulation  # vec (B, D), or what the modulation linears make of it, evaluated beforehand


class Residuals(NamedTuple):
    """What ControlNets add to the image tokens after each block of the model, (B, S, D) each; or nothing."""

    double: Sequence[Tensor] = ()
    single: Sequence[Tensor] = ()


NO_RESIDUALS = Residuals()


def plus(x: Tensor, residual: Tensor) -> Tensor:
    """x + residual, within the range of float16 where that is the dtype: ControlNets reach beyond it."""
    return finite(x + residual)


def finite(x: Tensor) -> Tensor:
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest) if x.dtype == torch.float16 else x


def steered(linear: nn.Module, steering: Steering) -> Tensor:
    """(B, 1, N): what a modulation linear makes of the steering vector, or its rows where they are given."""
    rows = linear(F.silu(steering)) if isinstance(steering, Tensor) else steering[linear]
    return rows[:, None]


def timestep_embedding(t: Tensor) -> Tensor:
    """t (B,) in 0-1 -> (B, 256) float32: cosines, then sines, of 1000 t at 128 frequencies from 1 down to 1e-4."""
    half = TIME_CHANNELS // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotary_angles(ids: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """ids (L, 3) positions -> cos, sin (L, C / 2) float32; each axis turns its own share of the channel pairs."""
    angles = []
    for axis, channels in enumerate(axes):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=ids.device) / channels
        angles.append(ids[:, axis, None].double() * 10000.0**-exponent)
    joined = torch.cat(angles, dim=1)
    return joined.cos().float(), joined.sin().float()


def modulate(x: Tensor, mod: Modulation) -> Tensor:
    return fused.modulated_norm(x, mod.shift, mod.scale)


class Embedder(nn.Module):
    """linear, SiLU, linear."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(inputs, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class GELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return fused.gelu_(x)


class RMSNorm(nn.Module):
    """Holds the scale; `fused.heads` normalises."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))


class QKNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(channels)
        self.key_norm = RMSNorm(channels)

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        return self.query_norm.scale, self.key_norm.scale


class ModulationLinear(nn.Module):
    """vec (B, D) -> `sets` modulations: rows of the linear are shift, scale, gate of each set in turn."""

    def __init__(self, hidden: int, sets: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden, 3 * sets * hidden)

    @property
    def steered_linear(self) -> nn.Module:
        return self.lin

    def forward(self, vec: Steering) -> list[Modulation]:
        rows = steered(self.lin, vec).split(self.lin.in_features, dim=-1)
        return [Modulation(*rows[i : i + 3]) for i in range(0, len(rows), 3)]


class StreamAttention(nn.Module):
    """The projections of one stream (text or image) around the joint attention of a double block."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden, config.hidden)

    def project(self, x: Tensor) -> fused.Stream:
        """x (B, L, D) -> qkv (B, L, 3 D) and the scales (C,) that its q and k are to be normalised with."""
        return self.qkv(x), *self.norm.scales


class DoubleBlock(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        for stream in ("img", "txt"):
            mlp = nn.Sequential(nn.Linear(config.hidden, config.mlp), GELU(), nn.Linear(config.mlp, config.hidden))
            self.add_module(f"{stream}_mod", ModulationLinear(config.hidden, sets=2))
            self.add_module(f"{stream}_attn", StreamAttention(config))
            self.add_module(f"{stream}_mlp", mlp)

    def forward(
        self, img: Tensor, txt: Tensor, vec: Steering, cos: Tensor, sin: Tensor, attention: Attention = torch_attention
    ) -> tuple[Tensor, Tensor]:
        """img (B, S, D), txt (B, T, D), vec (B, D) or its rows -> img, txt."""
        img_mod, img_mod2 = self.img_mod(vec)
        txt_mod, txt_mod2 = self.txt_mod(vec)
        streams = [self.txt_attn.project(modulate(txt, txt_mod)), self.img_attn.project(modulate(img, img_mod))]
        y = attention(*fused.heads(streams, cos, sin)).transpose(1, 2).flatten(2)
        txt_y, img_y = y.split([txt.shape[1], img.shape[1]], dim=1)
        img = fused.gated_sum(img, img_mod.gate, self.img_attn.proj(img_y))
        img = fused.gated_sum(img, img_mod2.gate, self.img_mlp(modulate(img, img_mod2)))
        txt = fused.gated_sum(txt, txt_mod.gate, self.txt_attn.proj(txt_y))
        txt = fused.gated_sum(txt, txt_mod2.gate, self.txt_mlp(modulate(txt, txt_mod2)))
        return img, txt


class SingleBlock(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.hidden = config.hidden
        self.modulation = ModulationLinear(config.hidden, sets=1)
        self.linear1 = nn.Linear(config.hidden, 3 * config.hidden + config.mlp)  # rows q | k | v | mlp
        self.linear2 = nn.Linear(config.hidden + config.mlp, config.hidden)  # columns attention | mlp
        self.norm = QKNorm(config.head_dim)

    def forward(
        self, x: Tensor, vec: Steering, cos: Tensor, sin: Tensor, attention: Attention = torch_attention
    ) -> Tensor:
        """x (B, L, D), vec (B, D) or its rows -> (B, L, D)."""
        (mod,) = self.modulation(vec)
        wide = self.linear1(modulate(x, mod))
        stream = wide[..., : 3 * self.hidden], *self.norm.scales
        y = attention(*fused.heads([stream], cos, sin))
        y = fused.beside_gelu(y, wide).flatten(0, 1)  # a matrix even if its rows lie apart: takes the shortest way
        return fused.gated_sum(x, mod.gate, self.linear2(y).unflatten(0, x.shape[:2]))


class FinalLayer(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden, config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden, 2 * config.hidden))

    @property
    def steered_linear(self) -> nn.Module:
        return self.adaLN_modulation[1]

    def forward(self, x: Tensor, vec: Steering) -> Tensor:
        shift, scale = steered(self.steered_linear, vec).chunk(2, dim=-1)
        return self.linear(fused.modulated_norm(x, shift, scale))


class Flux(nn.Module):
    """The transformer. Build it on the meta device to load weights into it: see `flux_quant.loading`."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self.img_in = nn.Linear(config.in_channels, config.hidden)
        self.txt_in = nn.Linear(config.context, config.hidden)
        self.time_in = Embedder(TIME_CHANNELS, config.hidden)
        self.vector_in = Embedder(config.pooled, config.hidden)
        self.guidance_in = Embedder(TIME_CHANNELS, config.hidden) if config.guidance else None
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_blocks))
        self.final_layer = FinalLayer(config)

    @property
    def embedders(self) -> tuple[nn.Module, ...]:
        """What makes the steering vector."""
        return tuple(part for part in (self.time_in, self.guidance_in, self.vector_in) if part is not None)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        pooled: Tensor | None,
        timestep: Tensor | None,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        steering: Steering | None = None,
        residuals: Residuals = NO_RESIDUALS,
        attention: Attention = torch_attention,
    ) -> Tensor:
        """The velocity, (B, S, channels out).

        img (B, S, channels in) packed latents; txt (B, T, context) T5 features; pooled (B, pooled) CLIP vector;
        timestep (B,) from 1 (noise) to 0; ids (S, 3) and (T, 3) positions; guidance (B,) scale, for guided models.
        With `steering`, the vector or what the modulations make of it, pooled, timestep and guidance are not used.
        residuals: for every block of a kind, or for none of it. attention: of all blocks.
        """
        vec = self.steering(pooled, timestep, guidance, img.dtype) if steering is None else steering
        cos, sin = rotary_angles(torch.cat([txt_ids, img_ids]), self.config.rope_axes)
        img, txt = self.img_in(img), self.txt_in(txt)
        for i, block in enumerate(self.double_blocks):
            img, txt = block(img, txt, vec, cos, sin, attention)
            if residuals.double:
                img = plus(img, residuals.double[i])
        x = torch.cat([txt, img], dim=1)
        for i, block in enumerate(self.single_blocks):
            x = block(x, vec, cos, sin, attention)
            if residuals.single:
                x[:, txt.shape[1] :] = plus(x[:, txt.shape[1] :], residuals.single[i])
        return self.final_layer(x[:, txt.shape[1] :], vec)

    def steering(self, pooled: Tensor, timestep: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(B, D): the vector that all modulations are made from."""
        vec = self.time_in(timestep_embedding(timestep).to(dtype))
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this model is guidance-distilled and needs a guidance scale, for example 3.5")
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(dtype))
        return vec + self.vector_in(pooled.to(dtype))


def image_ids(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """(rows * columns, 3) float32: (0, row, column) of each 2 x 2 latent patch."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)[None]
    return ids.flatten(0, 1)


def text_ids(tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """(tokens, 3) zeros: text has no place in the image."""
    return torch.zeros(tokens, 3, device=device)


def pack_latents(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h / 2 * w / 2, 4 C): 2 x 2 patches become tokens, channel by channel."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack_latents(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """(B, rows * columns, 4 C) -> (B, C, 2 rows, 2 columns)."""
    b, _, c = tokens.shape
    patches = tokens.view(b, rows, columns, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, c // 4, 2 * rows, 2 * columns)
