"""What given pictures become: latents to begin with, masks, and what models and ControlNets read beside the noise.

| who reads it | what |
|---|---|
| any model | a picture to begin with, and a mask of where it is drawn anew |
| Canny, Depth | the latents of a hint, beside those that are drawn: twice the channels |
| Fill | the latents of the picture with grey where the mask is, and the mask pixel by pixel: 256 channels |
| any model, by Redux | words of a picture behind those of the prompt (`redux`) |
| Kontext | the tokens of a reference behind those that are drawn, at places of their own |
| ControlNets | the latents of a hint; its pixels (XLabs) |
| Alimama's ControlNets | the latents of the picture with black where the mask is, and where it is kept |

Matches `FluxControlPipeline`, `FluxFillPipeline`, `FluxKontextPipeline` and `FluxControlNetPipeline` of diffusers, and
Alimama's `pipeline_flux_controlnet_inpaint.py`; where those draw a sample of the VAE's distribution we take its mean.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_quant.arch import FluxConfig
from flux_quant.controlnet import Control, ControlNet
from flux_quant.drawing.pictures import KEPT_BELOW, check_same_size, latent_mask, opened, read_mask, read_picture
from flux_quant.drawing.redux import redux_words
from flux_quant.drawing.request import PATCH, ControlRequest, Request
from flux_quant.drawing.sampling import Reference
from flux_quant.errors import UserError
from flux_quant.loading import load_controlnet
from flux_quant.model import image_ids, pack_latents

MASK_CHANNELS = PATCH * PATCH  # of Fill: a token's pixels
PLAIN, HINT, FILL = "text", "hint", "Fill"  # what a model reads beside the noise

Encode = Callable[[Tensor], Tensor]  # pictures (1, 3, H, W) in 0-1 -> latents (1, 16, H / 8, W / 8), on the CPU
Nets = Sequence[tuple[ControlRequest, ControlNet]]


@dataclass(frozen=True)
class Given:
    """What the pictures of a request give to its drawing; all for one picture, which serves a batch."""

    picture: Tensor | None = None  # (1, 3, H, W) in 0-1
    latents: Tensor | None = None  # (1, 16, h, w) of it, to begin with; without them a drawing begins with noise
    mask: Tensor | None = None  # (1, 1, H, W): 1 where it is drawn anew
    blended: bool = True  # where there are latents, what the mask keeps is put back after each step; not by Fill
    beside: Tensor | None = None  # (1, S, channels) that the model reads beside the latents
    reference: Reference | None = None
    controls: tuple[Control, ...] = ()
    words: Tensor | None = None  # (1, N, context) tokens of a picture, behind those of the prompt


def load_nets(request: Request, base: FluxConfig) -> Nets:
    """Each file once, however many hints are for it."""
    files = dict.fromkeys(asked.net for asked in request.controls)
    loaded = {path: load_controlnet(path, base) for path in files}
    return [(asked, loaded[asked.net]) for asked in request.controls]


def kind_of(config: FluxConfig) -> str:
    """What a model reads beside the noise, by its channels. UserError for a number that no known model has."""
    kinds = {0: PLAIN, config.out_channels: HINT, config.out_channels + MASK_CHANNELS: FILL}
    extra = config.in_channels - config.out_channels
    if extra not in kinds:
        raise UserError(f"a model that reads {config.in_channels} channels and writes {config.out_channels} is unknown")
    return kinds[extra]


def from_noise(request: Request, config: FluxConfig, nets: Nets) -> bool:
    """Whether the given picture is shown to the model, which draws it from noise in all steps."""
    shown = kind_of(config) == FILL or any(net.config.inpaints for _, net in nets)
    return shown and request.strength is None and request.denoise is None


def check_given(request: Request, config: FluxConfig, nets: Nets) -> None:
    """UserError if a picture is missing, or one would not be looked at."""
    for complaint in complaints(request, kind_of(config), nets):
        raise UserError(complaint)
    for asked, net in nets:
        try:
            net.number_of(asked.mode)
        except UserError as error:
            raise UserError(f"{asked.net}: {error}") from None


def complaints(request: Request, kind: str, nets: Nets) -> Iterator[str]:
    masked = request.image is not None and request.mask is not None
    if kind == FILL and not masked:
        yield "a Fill model needs a picture and a mask of what is drawn anew (--image, --mask)"
    if kind == HINT and request.control_image is None:
        yield "a Canny or Depth model needs a hint of that kind (--control-image)"
    if kind != HINT and request.control_image is not None:
        yield f"{request.control_image}: nothing reads a control image; give a ControlNet with --controlnet"
    if kind != PLAIN and request.reference is not None:
        yield f"{request.reference}: a reference is for Kontext; this model reads other pictures"
    for asked, net in nets:
        if net.config.inpaints and not masked:
            yield f"{asked.net} paints a picture in and needs it with a mask of where (--image, --mask)"
        if net.config.inpaints and asked.image is not None:
            yield f"{asked.image}: {asked.net} sees the given picture and its mask, no control image"
        if not net.config.inpaints and asked.image is None:
            yield f"{asked.net} needs a hint: one --control-image for all nets, or one for each"


def read_given(request: Request, config: FluxConfig, nets: Nets, encode: Encode) -> Given:
    """Of a request that `check_given` has passed."""
    picture = read_picture(request.image, request.size) if request.image else None
    mask = read_mask(request.mask, request.size) if request.mask else None
    if mask is not None:
        check_same_size(request.image, request.mask)
    kind, noise = kind_of(config), from_noise(request, config, nets)
    beside = None
    if kind == HINT:
        beside = pack_latents(encode(read_picture(request.control_image, request.size)))
    if kind == FILL:
        beside = fill_tokens(picture, mask, encode)
    return Given(
        picture,
        None if picture is None or noise else encode(picture),
        mask,
        blended=kind != FILL,
        beside=beside,
        reference=reference_of(request, encode) if request.reference else None,
        controls=tuple(control_of(asked, net, request, picture, mask, encode) for asked, net in nets),
        words=redux_words(request.redux, config.context) if request.redux else None,
    )


def fill_tokens(picture: Tensor, mask: Tensor, encode: Encode) -> Tensor:
    """(1, S, 64 + 256): grey is 0 to the VAE, and every pixel of the mask a channel of its token."""
    anew = (mask >= KEPT_BELOW).float()
    latents = encode(0.5 + (picture - 0.5) * (1 - anew))
    return torch.cat([pack_latents(latents), pack_latents(F.pixel_unshuffle(anew, 8))], dim=2)


def inpainting_tokens(picture: Tensor, mask: Tensor, encode: Encode) -> Tensor:
    """(1, S, 68): black where it is drawn anew, and a channel that is 1 where it is kept."""
    latents = encode(picture * (mask < KEPT_BELOW))
    return pack_latents(torch.cat([latents, 1 - latent_mask(mask)], dim=1))


def control_of(
    asked: ControlRequest,
    net: ControlNet,
    request: Request,
    picture: Tensor | None,
    mask: Tensor | None,
    encode: Encode,
) -> Control:
    if net.config.inpaints:
        tokens = inpainting_tokens(picture, mask, encode)
    else:
        hint = read_picture(asked.image, request.size)
        tokens = net.tokens(2 * hint - 1) if net.config.from_pixels else pack_latents(encode(hint))
    return Control(net, tokens, asked.scale, asked.span, net.number_of(asked.mode))


def reference_of(request: Request, encode: Encode) -> Reference:
    """Its own shape, the area of the drawing; ids 1 where those of the drawing are 0."""
    latents = encode(read_picture(request.reference, reference_size(request)))
    ids = image_ids(latents.shape[2] // 2, latents.shape[3] // 2)
    ids[:, 0] = 1
    return Reference(pack_latents(latents), ids)


def reference_size(request: Request) -> tuple[int, int]:
    """Width and height in pixels, multiples of 16."""
    width, height = opened(request.reference).size
    shrink = (request.size[0] * request.size[1] / (width * height)) ** 0.5
    return tuple(max(PATCH, round(side * shrink / PATCH) * PATCH) for side in (width, height))
