"""The mixes people know by name: Q4_K_M and its relatives, per model family.

A mix is a base format and a few tensors that get more bits. For FLUX.1 and SDXL the rules are those of ComfyUI-GGUF's
patch for llama-quantize (tools/lcpp.patch, `img_tensor_get_type`), for T5 those of llama.cpp (src/llama-quant.cpp,
`llama_tensor_get_type_impl`), so that a file has the types that everybody's file of that name has. For FLUX.1 the
suffix means little: only the fused qkv weights of the double blocks move, and S is uniform.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

Rows = tuple[tuple[str, str], ...]

BASES = {  # name of a mix -> format of the bulk; every GGUF format is also the name of a mix
    "q2_k": "q2_k",
    "q3_k_s": "q3_k",
    "q3_k_m": "q3_k",
    "q3_k_l": "q3_k",
    "q4_k_s": "q4_k",
    "q4_k_m": "q4_k",
    "q5_k_s": "q5_k",
    "q5_k_m": "q5_k",
    "q6_k": "q6_k",
    "iq4_xs": "iq4_xs",
    "iq4_nl": "iq4_nl",
    "q4_0": "q4_0",
    "q4_1": "q4_1",
    "q5_0": "q5_0",
    "q5_1": "q5_1",
    "q8_0": "q8_0",
    "f16": "f16",
    "bf16": "bf16",
    "f32": "f32",
}
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}  # as llama-quantize understands them

Which = Callable[[int, int], bool]  # (i, n): is the i-th of n tensors meant? In running order


def every(i: int, n: int) -> bool:
    return True


def first(count: int) -> Which:
    return lambda i, n: i < count


def first_eighth(i: int, n: int) -> bool:
    return i < n // 8


def more_bits(i: int, n: int) -> bool:
    """The first and the last eighth, and every third between (llama.cpp `use_more_bits`)."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@dataclass(frozen=True)
class Promotion:
    """The tensors that match `glob` and `which` get `format` under the mix `mix`. Of several, the first counts."""

    mix: str
    glob: str
    which: Which
    format: str


def promotions(glob: str, **formats: str | tuple[tuple[Which, str], ...]) -> tuple[Promotion, ...]:
    """One glob under several mixes: a format for all of its tensors, or (which, format) in order."""
    return tuple(
        Promotion(mix, glob, which, name)
        for mix, chosen in formats.items()
        for which, name in ([(every, chosen)] if isinstance(chosen, str) else chosen)
    )


T5_VALUES, T5_DOWN = "*.SelfAttention.v.weight", "*.DenseReluDense.wo.weight"
PROMOTIONS: dict[str, tuple[Promotion, ...]] = {
    "FLUX.1": promotions("double_blocks.*_attn.qkv.weight", q3_k_m="q4_k", q3_k_l="q4_k", q4_k_m="q5_k", q5_k_m="q6_k"),
    "SDXL": (
        *promotions(
            "*.to_v.weight",
            q2_k="q3_k",
            q3_k_m=((first(2), "q5_k"), (every, "q4_k")),
            q3_k_l="q5_k",
            q4_k_s=((first(4), "q5_k"),),
            q4_k_m="q6_k",
            q5_k_m="q6_k",
        ),
        *promotions(
            "*.ff.net.2.weight",
            q3_k_m="q4_k",
            q3_k_l="q5_k",
            q4_k_s="q5_k",
            q4_k_m="q6_k",
            q5_k_m="q6_k",
            q4_0="q4_1",
            q5_0="q5_1",
        ),
    ),
    "T5 encoder": (
        *promotions(
            T5_VALUES,
            q2_k="q3_k",
            q3_k_m=((first(2), "q5_k"), (every, "q4_k")),
            q3_k_l="q5_k",
            q4_k_s=((first(4), "q5_k"),),
            q4_k_m=((more_bits, "q6_k"),),
            q5_k_m=((more_bits, "q6_k"),),
        ),
        *promotions(
            T5_DOWN,
            q2_k="q3_k",
            q3_k_m=((lambda i, n: i < n // 16, "q5_k"), (every, "q4_k")),
            q3_k_l="q5_k",
            q4_k_s=((first_eighth, "q5_k"),),
            q4_k_m=((more_bits, "q6_k"),),
            q5_k_m=((more_bits, "q6_k"),),
            iq4_nl=((first_eighth, "q5_k"),),
            iq4_xs=((first_eighth, "q5_k"),),
        ),
        # llama.cpp takes the embedding for the output matrix, which it keeps at Q6_K or better
        *(
            Promotion(mix, "shared.weight", every, "q8_0" if base == "q8_0" else "q6_k")
            for mix, base in BASES.items()
            if base not in ("f16", "bf16", "f32")
        ),
    ),
}


def promoted(family: str, mix: str, names: Sequence[str]) -> Rows:
    """The rows of a mix for a model whose tensors have these names, in running order."""
    rows: dict[str, str] = {}
    for promotion in PROMOTIONS.get(family, ()):
        if promotion.mix != mix:
            continue
        matching = [name for name in names if fnmatchcase(name, promotion.glob)]
        for i, name in enumerate(matching):
            if promotion.which(i, len(matching)):
                rows.setdefault(name, promotion.format)
    return tuple(rows.items())
