"""What a key of a LoRA file means: which module it changes, which of its rows, and which part of the change it holds.

Every key is read by itself. Its end tells the part (`.lora_down.weight`: the first factor), the rest is looked up in a
table of all spellings of all modules that the model has, made from the model's own names. So names joined by
underscores need no guessing, a small model works, and what is not in the table is reported instead of lost.

    kohya        lora_unet_double_blocks_7_img_attn_qkv       BFL, fused
    diffusers    transformer.transformer_blocks.7.attn.to_q   rows of a BFL module
    XLabs        double_blocks.7.processor.qkv_lora1
    OneTrainer   lora_transformer_transformer_blocks_7_attn_to_q, transformer.double_blocks.7.img_attn.qkv.0

Sources: Comfy-Org/ComfyUI comfy/lora.py, comfy/lora_convert.py and comfy/weight_adapter/; kohya-ss/sd-scripts
networks/lora_flux.py; Nerogar/OneTrainer modules/util/convert/lora/convert_flux_lora.py.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flux_quant.formats import Shape
from flux_quant.layouts import KEY_MAP, SWAPPED_HALVES

TRANSFORMER, T5, CLIP_L = "transformer", "t5", "clip_l"

# --- The end of a key -------------------------------------------------------------------------------------------------

ROLES: dict[str, tuple[str, ...]] = {
    "down": (
        ".lora_down.weight",
        "_lora.down.weight",
        ".lora_A.weight",
        ".lora.down.weight",
        ".lora_A",
        ".lora_linear_layer.down.weight",
        ".lora_A.default.weight",
        ".down.weight",  # XLabs
    ),
    "up": (
        ".lora_up.weight",
        "_lora.up.weight",
        ".lora_B.weight",
        ".lora.up.weight",
        ".lora_B",
        ".lora_linear_layer.up.weight",
        ".lora_B.default.weight",
        ".up.weight",
    ),
    "up_bias": (".lora_B.bias", ".lora_up.bias", ".lora_B.default.bias"),
    "mid": (".lora_mid.weight",),
    "alpha": (".alpha",),
    "magnitude": (
        ".dora_scale",
        ".lora_magnitude_vector",
        ".lora_magnitude_vector.weight",
        ".lora_magnitude_vector.default",
        ".lora_magnitude_vector.default.weight",
    ),
    **{f"lokr_{part}": (f".lokr_{part}",) for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f"hada_{part}": (f".hada_{part}",) for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "diff": (".diff", ".w_norm"),
    "diff_b": (".diff_b", ".b_norm"),
    "set": (".set_weight",),
    "norm": (".scale", ".weight"),  # a norm's new scale; of other modules it would be a whole model's weight
    "reshape": (".reshape_weight",),
}
SUFFIXES = sorted(((end, role) for role, ends in ROLES.items() for end in ends), key=lambda row: -len(row[0]))


def split_key(key: str) -> tuple[str, str] | None:
    """`x.lora_down.weight` -> (`x`, `down`); None for an end that is no part of a change."""
    return next(((key[: -len(end)], role) for end, role in SUFFIXES if key.endswith(end)), None)


# --- The rest of it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Rows of a module, in BFL names or, for text encoders, in Hugging Face's."""

    component: str  # TRANSFORMER, T5 or CLIP_L
    module: str  # without `.weight`
    row_start: int = 0
    row_len: int | None = None  # None where the model's shapes are not known: all rows
    swapped: bool = False  # the file has the rows' halves in the other order


PREFIXES = (  # in front of a module of the transformer, also several of them
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "transformer.",
    "diffusion_model.",
    "model.",
    "base_model.model.",
)
XLABS = {  # spelled after the end of the key is cut off; `linear1` gets its first rows
    "double_blocks.{}.img_attn.qkv": "double_blocks.{}.processor.qkv_lora1",
    "double_blocks.{}.txt_attn.qkv": "double_blocks.{}.processor.qkv_lora2",
    "double_blocks.{}.img_attn.proj": "double_blocks.{}.processor.proj_lora1",
    "double_blocks.{}.txt_attn.proj": "double_blocks.{}.processor.proj_lora2",
    "single_blocks.{}.linear2": "single_blocks.{}.processor.proj",
}
ATTENTION_ROWS = {"single_blocks.{}.linear1": ("single_blocks.{}.processor.qkv", "single_blocks.{}.linear1_qkv")}

TEXT_PREFIXES = {  # T5 is the second encoder of FLUX.1 to some and the third of all models to others
    "lora_te_": CLIP_L,
    "lora_te1_": CLIP_L,
    "text_encoder.": CLIP_L,
    "text_encoders.clip_l.": CLIP_L,
    "lora_te2_": T5,
    "lora_te3_": T5,
    "text_encoder_2.": T5,
    "text_encoders.t5xxl.": T5,
}
INNER_PREFIXES = ("transformer.", "base_model.model.")
CLIP_LAYER = "text_model.encoder.layers.{}."
T5_LAYER = "encoder.block.{}.layer."
TEXT_MODULES = {
    CLIP_L: (
        *(f"{CLIP_LAYER}self_attn.{which}_proj" for which in ("q", "k", "v", "out")),
        *(f"{CLIP_LAYER}{which}" for which in ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2")),
        "text_model.final_layer_norm",
    ),
    T5: (
        *(f"{T5_LAYER}0.SelfAttention.{which}" for which in "qkvo"),
        *(f"{T5_LAYER}1.DenseReluDense.{which}" for which in ("wi_0", "wi_1", "wo")),
        *(f"{T5_LAYER}{i}.layer_norm" for i in (0, 1)),
        "encoder.final_layer_norm",
    ),
}
NUMBER = r"(0|[1-9]\d{0,3})"


def text_pattern(template: str) -> str:
    """Dots or underscores; transformers 5 has no `text_model` in CLIP's names."""
    pattern = template.replace(".", "[._]").replace("{}", NUMBER)
    return pattern.replace("text_model[._]", "(?:text_model[._])?")


TEXT_PATTERNS = {
    component: [(re.compile(text_pattern(template)), template) for template in templates]
    for component, templates in TEXT_MODULES.items()
}


class ModuleNames:
    """All spellings of the modules of one model, by the names and shapes of its transformer in BFL naming."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.targets: dict[str, Target] = {}
        for spelling, target in spellings(shapes):
            for text in (spelling, spelling.replace(".", "_")):
                if self.targets.setdefault(text, target) != target:
                    raise ValueError(f"{text} could be {self.targets[text]} or {target}")

    def resolve(self, text: str) -> tuple[Target, str] | None:
        """A key without its end -> what it names, and the module's name in the file without prefixes."""
        for prefix, component in TEXT_PREFIXES.items():
            if text.startswith(prefix):
                return text_module(text.removeprefix(prefix), component)
        for _ in range(len(PREFIXES)):
            if text in self.targets:
                return self.targets[text], text
            text = next((text.removeprefix(prefix) for prefix in PREFIXES if text.startswith(prefix)), text)
        return None


def text_module(text: str, component: str) -> tuple[Target, str] | None:
    for prefix in INNER_PREFIXES:
        text = text.removeprefix(prefix)
    for pattern, template in TEXT_PATTERNS[component]:
        if found := pattern.fullmatch(text):
            return Target(component, template.format(*found.groups())), text
    return None


def spellings(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Target]]:
    """Every name, with dots, that any family of files gives to a module or to a part of its rows."""
    hidden = shapes["img_in.weight"][0]
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        number = re.search(r"_blocks\.(\d+)\.", module)
        pattern = module.replace(f"_blocks.{number[1]}.", "_blocks.{}.", 1) if number else module
        if kind == "bias" or pattern not in KEY_MAP:
            continue
        index = number[1] if number else ""
        rows = shape[0]
        whole = Target(TRANSFORMER, module, 0, rows)
        yield module, whole
        if pattern in XLABS:
            yield XLABS[pattern].format(index), whole
        for spelling in ATTENTION_ROWS.get(pattern, ()):
            yield spelling.format(index), Target(TRANSFORMER, module, 0, 3 * hidden)
        parts = KEY_MAP[pattern]
        for position, part in enumerate(parts):
            first = position * hidden
            last = rows if position == len(parts) - 1 else first + hidden
            target = Target(TRANSFORMER, module, first, last - first, swapped=module == SWAPPED_HALVES)
            yield part.format(index), target
            if len(parts) > 1:  # OneTrainer's slices: 0, 1, 2 are q, k, v, and 3 is the MLP, whichever are there
                yield f"{module}.{position}", target
