"""The dimensions of models, read off their tensors, and the order in which a model uses them.

Nothing is taken from a variant's nominal size: every dimension comes from tensor shapes, so a small model of the same
architecture works everywhere. Names are canonical ones (`layouts`).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flux_quant.errors import UserError
from flux_quant.layouts import KEY_MAP, OUTER_MAP, count_blocks
from flux_quant.layouts import SWAPPED_HALVES as SWAPPED_HALVES
from flux_quant.naming import Shape

# --- Blocks -----------------------------------------------------------------------------------------------------------

BLOCK = re.compile(
    r"(?:"
    r"double_blocks|single_blocks"  # FLUX.1, BFL
    r"|transformer_blocks|single_transformer_blocks"  # FLUX.1 and its ControlNets, diffusers
    r"|encoder\.block|enc\.blk"  # T5: Hugging Face, llama.cpp
    r"|text_model\.encoder\.layers|encoder\.layers|transformer\.resblocks"  # CLIP: Hugging Face, OpenAI
    r"|input_blocks|output_blocks|down_blocks|up_blocks"  # SDXL: SGM, diffusers
    r")\.\d+|middle_block|mid_block"
)

STAGES = {  # first word of a canonical name -> its turn; everything else comes first
    **{"double_blocks": 1, "single_blocks": 2, "final_layer": 3},
    **{"transformer_blocks": 1, "single_transformer_blocks": 2, "controlnet_blocks": 3, "controlnet_single_blocks": 4},
    **{"encoder": 1, "decoder": 2, "text_model": 1, "text_projection": 2},
    **{"input_blocks": 1, "middle_block": 2, "output_blocks": 3, "out": 4},
}
POSITIONS = {name: position for position, name in enumerate(KEY_MAP)}

# The ten linears outside the blocks: every converter keeps them precise.
OUTSIDE_BLOCKS = tuple(f"{name}.*" for name in OUTER_MAP)


@dataclass(frozen=True)
class FluxConfig:
    """Dimensions of a FLUX.1 transformer, read off its tensors."""

    in_channels: int  # of a packed 2 x 2 latent patch; 64, or more with conditioning channels
    out_channels: int
    hidden: int
    head_dim: int
    mlp: int
    context: int  # width of the T5 features
    pooled: int  # width of the CLIP vector
    double_blocks: int
    single_blocks: int
    guidance: bool

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """Rotary channels for (index, row, column): 16, 56, 56 of FLUX.1's 128, in proportion for other sizes."""
        eighth = self.head_dim // 8
        return eighth, (self.head_dim - eighth) // 2, (self.head_dim - eighth) // 2

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> "FluxConfig":
        """From BFL tensor names and shapes (rows, columns) of the unpacked weights."""
        try:
            hidden, in_channels = shapes["img_in.weight"]
            return cls(
                in_channels=in_channels,
                out_channels=shapes["final_layer.linear.weight"][0],
                hidden=hidden,
                head_dim=shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0],
                mlp=shapes["double_blocks.0.img_mlp.0.weight"][0],
                context=shapes["txt_in.weight"][1],
                pooled=shapes["vector_in.in_layer.weight"][1],
                double_blocks=count_blocks(shapes, "double_blocks."),
                single_blocks=count_blocks(shapes, "single_blocks."),
                guidance="guidance_in.in_layer.weight" in shapes,
            )
        except KeyError as missing:
            raise UserError(f"not a complete FLUX.1 transformer: tensor {missing} is missing") from None
        except (ValueError, IndexError):
            raise UserError("not a FLUX.1 transformer: its matrices have another number of dimensions") from None

    def diffusers(self) -> dict[str, object]:
        """Arguments of diffusers' FluxTransformer2DModel."""
        return dict(
            patch_size=1,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            num_layers=self.double_blocks,
            num_single_layers=self.single_blocks,
            attention_head_dim=self.head_dim,
            num_attention_heads=self.heads,
            joint_attention_dim=self.context,
            pooled_projection_dim=self.pooled,
            guidance_embeds=self.guidance,
            axes_dims_rope=self.rope_axes,
        )


def block_of(name: str) -> str:
    """`double_blocks.3` for a tensor of that block, `outside blocks` for the others."""
    found = BLOCK.match(name)
    return found.group() if found else "outside blocks"


def running_order(name: str) -> tuple[int, int, int, tuple[str | int, ...]]:
    """Sort key of canonical names: embedders, blocks by number, what follows; FLUX.1's also in the order of KEY_MAP."""
    stage = STAGES.get(name.split(".")[0], 0)
    pattern, blocks = re.subn(r"(?<=_blocks\.)\d+", "{}", name.rpartition(".")[0], count=1)
    if pattern not in POSITIONS:
        return stage, 0, len(POSITIONS), natural(name)
    return stage, int(name.split(".")[1]) if blocks else 0, POSITIONS[pattern], natural(name)


def natural(name: str) -> tuple[str | int, ...]:
    """Sorts block 2 before block 10."""
    return tuple(int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", name))


def missing_tensors(names: Collection[str], config: FluxConfig) -> list[str]:
    """BFL names that a transformer of this configuration has and `names` has not."""
    expected = []
    for module in KEY_MAP:
        if module.startswith("guidance_in.") and not config.guidance:
            continue
        kinds = ("scale",) if module.endswith("_norm") else ("weight", "bias")
        blocks = {"double": config.double_blocks, "single": config.single_blocks}.get(module.split("_")[0], 1)
        expected += [f"{module.format(i)}.{kind}" for i in range(blocks) for kind in kinds]
    return [name for name in expected if name not in names]


# --- VAE --------------------------------------------------------------------------------------------------------------

LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159  # model input = (latent - shift) * scale
