"""Redux: a picture as words. SigLIP sees it, two linears make tokens of it, which are appended to those of T5.

    words = redux_words(ReduxRequest(redux_file, siglip_file, Path("fox.png"), weight=0.7), context=4096)

Matches diffusers' `FluxPriorReduxPipeline` with one picture; there the weight scales T5's tokens too, here those of the
picture alone, as a weaker picture is what one wants of it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_quant.arch import count_blocks
from flux_quant.converters.checkpoint import CheckpointReader, open_checkpoint
from flux_quant.converters.component import open_component
from flux_quant.drawing.pictures import flattened, opened
from flux_quant.drawing.request import ReduxRequest
from flux_quant.errors import UserError
from flux_quant.loading import bind, load_quantized_, shapes_of

if TYPE_CHECKING:
    from transformers import SiglipVisionModel

PIXELS = {(14, 27): 384}  # (pixels of a patch, patches of a side) -> pixels of a side, where they are more
HEADS = {1152: 16}  # by width, of SigLIP so400m; the others have heads of 64 channels


class Redux(nn.Module):
    """(B, N, width of the image encoder) -> (B, N, width of T5's features)."""

    def __init__(self, inputs: int, hidden: int, context: int) -> None:
        super().__init__()
        self.redux_up = nn.Linear(inputs, hidden)
        self.redux_down = nn.Linear(hidden, context)

    def forward(self, x: Tensor) -> Tensor:
        return self.redux_down(F.silu(self.redux_up(x)))


def load_redux(path: Path, context: int) -> Redux:
    """For models that read features of that width. UserError for another file, or one for other models."""
    reader = open_component(path, "FLUX Redux")
    up, down = (reader.tensors[f"redux_{end}.weight"].shape for end in ("up", "down"))
    if down[0] != context:
        raise UserError(f"{path}: a Redux for models that read {down[0]} channels of text; this one reads {context}")
    with torch.device("meta"):
        model = Redux(up[1], up[0], context)
    bind(model, reader)
    return model.eval()


def load_image_encoder(path: Path) -> "SiglipVisionModel":
    """SigLIP's tower for pictures, of any SigLIP file; linears stay packed."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    reader = open_checkpoint(path)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in reader.tensors) else ""
    with torch.device("meta"):
        model = SiglipVisionModel(SiglipVisionConfig(**siglip_config(reader, prefix)))
    load_quantized_(model, reader, lambda name: prefix + name.removeprefix("vision_model."))
    embeddings = next(part for part in model.modules() if hasattr(part, "position_embedding"))
    embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return model.eval()


def siglip_config(reader: CheckpointReader, prefix: str) -> dict[str, object]:
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes_of(reader).items() if name.startswith(prefix)}
    try:
        width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        side = round(shapes["embeddings.position_embedding.weight"][0] ** 0.5)
        return dict(
            hidden_size=width,
            intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
            num_hidden_layers=count_blocks(shapes, "encoder.layers."),
            num_attention_heads=HEADS.get(width, width // 64),
            image_size=PIXELS.get((patch, side), patch * side),
            patch_size=patch,
            vision_use_head=False,
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"{reader.path}: no image encoder of SigLIP: {error} is missing or of another shape") from None


@torch.no_grad()
def redux_words(asked: ReduxRequest, context: int) -> Tensor:
    """(1, N, context) float32 on the CPU: 729 tokens with SigLIP so400m."""
    model, encoder = load_redux(asked.redux, context), load_image_encoder(asked.encoder)
    if model.redux_up.in_features != encoder.config.hidden_size:
        there, here = model.redux_up.in_features, encoder.config.hidden_size
        raise UserError(f"{asked.encoder}: an image encoder of width {here}; {asked.redux} reads {there}")
    pixels = for_siglip(asked.image, encoder.config.image_size)
    return asked.weight * model(encoder(pixel_values=pixels).last_hidden_state)


def for_siglip(path: Path, side: int) -> Tensor:
    """(1, 3, side, side) in -1 to 1: stretched to a square, as SigLIP's own preparation does."""
    from PIL.Image import Resampling

    picture = flattened(opened(path)).resize((side, side), Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def redux_length(asked: ReduxRequest) -> int:
    """How many tokens it appends."""
    with open_checkpoint(asked.encoder) as reader:
        name = "embeddings.position_embedding.weight"
        shapes = shapes_of(reader)
        shape = shapes.get(f"vision_model.{name}", shapes.get(name))
    if shape is None:
        raise UserError(f"{asked.encoder}: no image encoder of SigLIP: {name} is missing")
    return shape[0]
