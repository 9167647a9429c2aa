"""Which tensor gets which format: ordered rows (glob, format), the first match wins.

A recipe is put together from the user's rows (`--set`, `--keep`, `--recipe`), the layout that readers of the family and
container expect, and the mix that was asked for. GGUF layouts are those that every reader takes (ComfyUI-GGUF,
diffusers, stable-diffusion.cpp, Forge, llama.cpp): vectors F32, embedders and final layers never quantized and never
BF16. FP8 layouts follow ComfyUI: linears of the blocks FP8, the rest in 16 bits as it comes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from flux_quant.converters.mixes import ALIASES, BASES, Rows, promoted
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS, Shape

KEEP = "keep"  # the source's own format, if it is a plain one
WIDE = "wide"  # the source's own if it has 16 bits, else bf16
BULK = "bulk"  # the format that was asked for
GGUF, SAFETENSORS = ".gguf", ".safetensors"

CLIP: Rows = (("text_model.encoder.layers.*_proj.weight", BULK), ("*.mlp.*.weight", BULK), ("*", WIDE))

# (family, suffix) -> rows after the mix's own; what no row names is bulk. In GGUF all vectors are F32 besides.
LAYOUTS: dict[tuple[str, str], Rows] = {
    ("FLUX.1", GGUF): (
        ("img_in.*", "f32"),
        ("*_in.in_layer.*", "f32"),
        ("final_layer.linear.*", "f32"),
        ("txt_in.*", "f16"),
        ("*_in.out_layer.*", "f16"),
        ("final_layer.adaLN_modulation.1.*", "f16"),
    ),
    ("FLUX.1", SAFETENSORS): (
        ("*.scale", KEEP),
        ("double_blocks.*.weight", BULK),
        ("single_blocks.*.weight", BULK),
        ("*", WIDE),
    ),
    ("FLUX ControlNet", GGUF): (
        ("transformer_blocks.*", BULK),
        ("single_transformer_blocks.*", BULK),
        ("*", "f16"),
    ),
    ("FLUX ControlNet", SAFETENSORS): (
        ("*.norm_[qk].weight", KEEP),
        ("*.norm_added_[qk].weight", KEEP),
        ("transformer_blocks.*.weight", BULK),
        ("single_transformer_blocks.*.weight", BULK),
        ("*", WIDE),
    ),
    ("XLabs ControlNet", GGUF): (("double_blocks.*", BULK), ("single_blocks.*", BULK), ("*", "f16")),
    ("XLabs ControlNet", SAFETENSORS): (
        ("*.scale", KEEP),
        ("double_blocks.*.weight", BULK),
        ("single_blocks.*.weight", BULK),
        ("*", WIDE),
    ),
    ("T5 encoder", GGUF): (("*.relative_attention_bias.weight", "f32"),),
    ("T5 encoder", SAFETENSORS): (
        ("encoder.block.*.SelfAttention.[qkvo].weight", BULK),
        ("encoder.block.*.DenseReluDense.*.weight", BULK),
        ("*", WIDE),
    ),
    ("SDXL", GGUF): (
        ("time_embed.*", "f16"),
        ("label_emb.*", "f16"),
        ("input_blocks.0.0.weight", "f16"),
        ("out.2.weight", "f16"),
    ),
    ("SDXL", SAFETENSORS): (
        ("*_blocks.*.transformer_blocks.*.to_*.weight", BULK),
        ("*_block.*.transformer_blocks.*.to_*.weight", BULK),
        ("*.transformer_blocks.*.ff.net.*.weight", BULK),
        ("*", WIDE),
    ),
    ("CLIP-L", SAFETENSORS): CLIP,
    ("CLIP-G", SAFETENSORS): CLIP,
    ("VAE", SAFETENSORS): (("*", BULK),),
    ("FLUX Redux", SAFETENSORS): (("*.weight", BULK), ("*", WIDE)),
}
PLAIN = ("f32", "f16", "bf16")
FP8 = ("fp8", "fp8_plain")
OFFERED = {  # suffix -> what the bulk can be
    GGUF: tuple(BASES),
    SAFETENSORS: (*FP8, *PLAIN, KEEP),
}
NOT_FP8 = ("VAE",)  # every value of a convolution's weight is used at every pixel: 8 bits show
# Where a format's blocks do not fit the rows, as in llama.cpp (`tensor_type_fallback`).
FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


@dataclass(frozen=True)
class Recipe:
    """`rows` decide; a tensor that its row's format cannot hold takes the first of the fallbacks that can."""

    name: str  # as it was asked for: `q4_k_m`
    format: str  # of the bulk of the weights
    rows: Rows
    fallbacks: tuple[str, ...]  # after the format's own in FALLBACKS
    vectors: str | None = None  # the format of every tensor of fewer than two dimensions

    def choose(self, name: str, shape: Shape, source: str, in_range: Callable[[], bool]) -> tuple[str, str]:
        """The format for a tensor, and the reason where it is not the row's.

        `in_range` tells whether the values survive float16; it may read them, so it is asked only if that matters.
        """
        wanted = self.vectors if self.vectors and len(shape) < 2 else self.wanted(name, source)
        reasons = []
        for candidate in dict.fromkeys((wanted, *fallbacks_of(wanted), *self.fallbacks)):
            fmt = FORMATS[candidate]
            if not fmt.fits(shape):
                reasons.append(f"{candidate} needs rows of a multiple of {fmt.block}, the shape is {list(shape)}")
            elif candidate == "f16" and source != "f16" and not in_range():
                reasons.append("values do not survive float16")
            else:
                return candidate, "; ".join(reasons)
        raise UserError(f"{name} {list(shape)} cannot be stored: {'; '.join(reasons)}")

    def wanted(self, name: str, source: str) -> str:
        """What the first matching row says, for a tensor that is stored as `source`."""
        row = next(format_name for glob, format_name in self.rows if fnmatchcase(name, glob))
        if row == BULK:
            return self.format
        if row == KEEP:
            return source if FORMATS[source].is_plain else self.fallbacks[0]
        if row == WIDE:
            return source if source in ("f16", "bf16") else self.fallbacks[0]
        return row


def fallbacks_of(format_name: str) -> tuple[str, ...]:
    return (FALLBACKS[format_name],) if format_name in FALLBACKS else ()


def build(name: str, family: str, suffix: str, names: Sequence[str] = (), own: Rows = ()) -> Recipe:
    """The recipe `name` for a model of `family` in a file of this suffix.

    names: the model's tensors in running order; own: the user's rows, which come first. UserError if there is no such
    recipe, or files of that kind do not hold it.
    """
    mix = ALIASES.get(name, name)
    check_offered(mix, name, family, suffix)
    bulk = BASES[mix] if suffix == GGUF else mix
    layout = LAYOUTS[family, suffix]
    if bulk == KEEP:
        return Recipe(mix, "bf16", (*own, ("*", KEEP)), ("bf16",))
    if bulk in PLAIN and suffix == SAFETENSORS:  # one format for all, as the published files have it
        layout = (("*", BULK),)
    rows = (*own, *promoted(family, mix, names), *layout, ("*", BULK))
    if suffix == GGUF:
        return Recipe(mix, bulk, rows, ("f16", "f32"), vectors="f32")
    return Recipe(mix, bulk, rows, ("f32",) if bulk in ("f16", "f32") else ("bf16",))


def check_offered(mix: str, name: str, family: str, suffix: str) -> None:
    known = dict.fromkeys(one for offered in OFFERED.values() for one in offered)
    if mix not in known:
        raise UserError(f"unknown format {name}; choose one of {', '.join(known)}")
    if mix not in OFFERED[suffix]:
        suffixes = " or ".join(kind for kind, offered in OFFERED.items() if mix in offered)
        raise UserError(f"{name} is stored in a {suffixes} file; give the output such a name")
    if (family, suffix) not in LAYOUTS:
        raise UserError(f"a {family} is not written as {suffix}; convert it to a .safetensors file")
    if mix in FP8 and family in NOT_FP8:
        raise UserError(f"a {family} in {name} draws visible noise; use bf16 or f32")


# --- The user's own rows ----------------------------------------------------------------------------------------------


def parse_row(text: str) -> tuple[str, str]:
    """`GLOB=FORMAT`. UserError if there is no such format."""
    glob, separator, format_name = text.rpartition("=")
    if not separator or not glob:
        raise UserError(f"{text}: should be GLOB=FORMAT, as in 'double_blocks.*.img_mod.*=q8_0'")
    format_name = format_name.strip().lower()
    format_name = BASES.get(ALIASES.get(format_name, format_name), format_name)
    if format_name not in FORMATS and format_name not in (KEEP, WIDE, BULK):
        raise UserError(f"{text}: unknown format {format_name}; choose one of {', '.join(FORMATS)}, {KEEP}")
    return glob.strip(), format_name


def read_rows(path: Path) -> Rows:
    """A recipe file: one GLOB=FORMAT per line, `#` begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text file") from None
    rows = []
    for number, line in enumerate(lines, 1):
        text = line.split("#", 1)[0].strip()
        if text:
            try:
                rows.append(parse_row(text))
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise UserError(f"{path} holds no row GLOB=FORMAT")
    return tuple(rows)


def check_used(rows: Rows, names: Sequence[str]) -> None:
    """A glob that matches nothing is a typing error, not a wish. UserError with the first one."""
    for glob, _ in rows:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UserError(f"no tensor matches {glob}; the first tensor is {names[0] if names else 'none'}")
