"""What stable-diffusion.cpp wants beside a transformer, made so that its pictures tell what the transformer did.

CLIP-L of zeros: its pooled vector is zero, and without a T5 the words are 256 zero vectors. An autoencoder (TAE) whose
convolutions hand three of the 16 latent channels through to red, green and blue: it begins with 3 tanh(z / 3), so a
pixel is 0.5 + tanh(z / 3) / 2, for 8 x 8 pixels of each latent position.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from flux_quant.converters.container import TensorInfo
from flux_quant.converters.gguf_io import model_metadata
from flux_quant.converters.writer import create_checkpoint
from flux_quant.formats import FORMATS

WORDS = 256  # zero vectors, one chunk of its T5
CHANNELS = 64  # of the autoencoder
SHOWN = 3  # latent channels that its pictures show
WIDTH, HEADS_MLP, LAYERS, VOCABULARY, PLACES = 768, 3072, 12, 49408, 77  # CLIP-L
CLIP_FORMAT = "q4_0"  # zeros in any format; this one is small


def clip_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    top = "text_model."
    yield f"{top}embeddings.token_embedding.weight", (VOCABULARY, WIDTH)
    yield f"{top}embeddings.position_embedding.weight", (PLACES, WIDTH)
    linears = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (HEADS_MLP, WIDTH), "mlp.fc2": (WIDTH, HEADS_MLP)}
    for i in range(LAYERS):
        for name, shape in linears.items():
            yield f"{top}encoder.layers.{i}.{name}.weight", shape
            yield f"{top}encoder.layers.{i}.{name}.bias", shape[:1]
        for name in ("layer_norm1", "layer_norm2"):
            yield f"{top}encoder.layers.{i}.{name}.weight", (WIDTH,)
            yield f"{top}encoder.layers.{i}.{name}.bias", (WIDTH,)
    for kind in ("weight", "bias"):
        yield f"{top}final_layer_norm.{kind}", (WIDTH,)


def write_clip(path: Path) -> None:
    """69 MB of zeros, as GGUF."""
    infos = [TensorInfo(name, shape, CLIP_FORMAT if len(shape) == 2 else "f32") for name, shape in clip_shapes()]
    with create_checkpoint(path, infos, model_metadata("clip", CLIP_FORMAT), force=True) as writer:
        for info in infos:
            fmt = FORMATS[info.format]
            parts = (torch.zeros(part.shape(info.shape), dtype=part.dtype) for part in fmt.parts)
            writer.write(info.name, tuple(parts))


def convolution(outputs: int, inputs: int, taps: Iterable[tuple[int, int, float]] = ()) -> Tensor:
    """(outputs, inputs, 3, 3), zero but for the middle of these (output, input, value)."""
    weight = torch.zeros(outputs, inputs, 3, 3)
    for output, given, value in taps:
        weight[output, given, 1, 1] = value
    return weight


def autoencoder() -> dict[str, Tensor]:
    """The decoder's tensors by name; its blocks add zero, so each hands through what is not negative."""
    channels = [(i, i, 1.0) for i in range(CHANNELS)]
    signs = [(2 * i + k, i, 1.0 - 2 * k) for i in range(SHOWN) for k in (0, 1)]  # both signs: rectifiers follow
    shown = [(i, 2 * i + k, (0.5 - k) / 3) for i in range(SHOWN) for k in (0, 1)]
    out = {"0.weight": convolution(CHANNELS, 16, signs), "0.bias": torch.zeros(CHANNELS)}
    for i in (2, 3, 4, 7, 8, 9, 12, 13, 14, 17):
        for k in (0, 2, 4):
            out[f"{i}.conv.{k}.weight"] = convolution(CHANNELS, CHANNELS)
            out[f"{i}.conv.{k}.bias"] = torch.zeros(CHANNELS)
    for i in (6, 11, 16):  # behind an enlargement each
        out[f"{i}.weight"] = convolution(CHANNELS, CHANNELS, channels)
    out |= {"18.weight": convolution(SHOWN, CHANNELS, shown), "18.bias": torch.full((SHOWN,), 0.5)}
    return {f"decoder.layers.{name}": value for name, value in out.items()}


def write_autoencoder(path: Path) -> None:
    tensors = autoencoder()
    infos = [TensorInfo(name, tuple(value.shape), "f16") for name, value in tensors.items()]
    with create_checkpoint(path, infos, {}, force=True) as writer:
        for info in infos:
            writer.write(info.name, (tensors[info.name].half(),))


def shown(latents: Tensor) -> Tensor:
    """latents (16, h, w) -> pixels (8 h, 8 w, 3) in 0 to 255, not rounded: what it has to show of them."""
    pixels = 255 * (0.5 + torch.tanh(latents[:SHOWN] / 3) / 2)
    return pixels.repeat_interleave(8, 1).repeat_interleave(8, 2).permute(1, 2, 0)


def read_back(picture: Tensor) -> Tensor:
    """picture (8 h, 8 w, 3) uint8 -> three channels of the latents (3, h, w), as well as 8 bits tell."""
    middle = picture[4::8, 4::8].permute(2, 0, 1).float() / 255
    return 3 * torch.atanh((2 * middle - 1).clamp(-0.999, 0.999))
