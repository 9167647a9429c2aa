"""What a LoRA file is, by its keys alone, and what in it cannot be used.

`describe` needs no model: names are those of FLUX.1, and shapes are not compared. Families are told by how each key is
spelled; a file that mixes several is named by the most frequent.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flux_quant.converters.checkpoint import FileReader, open_checkpoint
from flux_quant.converters.lora_names import ROLES, TRANSFORMER, ModuleNames, split_key
from flux_quant.converters.lora_records import Lora, Record
from flux_quant.errors import UserError
from flux_quant.layouts import KEY_MAP

FAMILIES = (  # how keys are spelled, first match
    ("XLabs", r"(double|single)_blocks\.\d+\.processor\."),
    ("BFL control LoRA", r"(double|single)_blocks\.\d+\..*(query|key)_norm\.scale$"),
    ("kohya", r"lora_(unet|te1|te3)_"),
    ("OneTrainer", r"lora_(transformer|te2?)_|transformer\.(double|single)_blocks\.\d+\..*\.\d\.lora_"),
    ("LyCORIS (SimpleTuner)", r"lycoris_"),
    ("fal", r"base_model\.model\."),
    ("ai-toolkit or ComfyUI", r"diffusion_model\.|text_encoders\."),
    ("diffusers (PEFT)", r"(transformer|text_encoder(_2)?)\."),
    ("BFL names", r"(double|single)_blocks\.\d+\.|(img|txt|time|vector|guidance)_in\.|final_layer\."),
    ("diffusers names (DiffSynth)", r"(single_)?transformer_blocks\.\d+\.|x_embedder|context_embedder|norm_out"),
)
KINDS_BY_ROLE = {"down": "LoRA", "lokr": "LoKr", "hada": "LoHa", "magnitude": "DoRA", "diff": "diff", "set": "set"}
FACTORS = re.compile(r"down|up|lokr_.*|hada_.*")  # roles that mean nothing alone
NEEDED = (("down", "up"), ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"), ("hada_w1_a", "hada_w1_b"))
PRECISION_KEYS = ("ss_full_bf16", "ss_full_fp16", "ss_fp8_base", "ss_mixed_precision", "ss_base_model_quantized")
HIDDEN, BLOCKS = 3072, (19, 38)


@dataclass(frozen=True)
class LoraReport:
    path: Path
    family: str
    kinds: Mapping[str, int]  # "LoRA", "LoKr" ... -> targets
    modules: Mapping[str, int]  # component -> modules that are changed
    ranks: tuple[int, int] | None  # lowest and highest
    unmatched: tuple[str, ...]  # keys that belong to nothing in FLUX.1
    partial: tuple[str, ...]  # keys whose other half is missing
    colliding: tuple[tuple[str, str], ...]  # keys that mean the same
    precision: str | None  # of the base in training, where the metadata tell

    def lines(self) -> list[tuple[str, str]]:
        """Rows of a table."""
        rows = [
            ("family", self.family),
            ("kinds", ", ".join(f"{name} ({count})" for name, count in self.kinds.items())),
            ("modules", ", ".join(f"{count} of {name}" for name, count in self.modules.items())),
        ]
        if self.ranks:
            low, high = self.ranks
            rows.append(("rank", str(low) if low == high else f"{low} to {high}"))
        for name in ("unmatched", "partial", "colliding"):
            if found := getattr(self, name):
                first = found[0] if isinstance(found[0], str) else " and ".join(found[0])
                rows.append((f"{name} keys", f"{len(found)}, {first} among them"))
        return [*rows, ("trained on", self.precision)] if self.precision else rows


def describe(path: Path) -> LoraReport | None:
    """None for a file that is no LoRA for FLUX.1."""
    with open_checkpoint(path) as reader:
        if not isinstance(reader, FileReader):
            return None
        keys = [*reader.tensors, *reader.foreign]
        shapes = {name: info.shape for name, info in (*reader.tensors.items(), *reader.foreign.items())}
        metadata = dict(reader.metadata)
    if not any(FACTORS.fullmatch(split_key(key)[1]) for key in keys if split_key(key)):
        return None
    names = ModuleNames(flux_names())
    groups: dict[object, dict[str, str]] = {}
    unmatched, colliding, ranks = [], [], []
    for key in keys:
        parts = split_key(key)
        found = names.resolve(parts[0]) if parts else None
        if found is None:
            unmatched.append(key)
            continue
        roles = groups.setdefault(found[0], {})
        if parts[1] in roles:
            colliding.append((roles[parts[1]], key))
        roles.setdefault(parts[1], key)
        ranks += [shapes[key][0]] if parts[1] == "down" else []
    if not groups:
        return None
    kinds = Counter(
        kind for roles in groups.values() for start, kind in KINDS_BY_ROLE.items() if has_role(roles, start)
    )
    modules = Counter(component for component, _ in {(target.component, target.module) for target in groups})
    partial = tuple(key for roles in groups.values() for key in halves(roles))
    ends = (min(ranks), max(ranks)) if ranks else None
    family = family_of(keys)
    return LoraReport(
        path,
        family,
        dict(kinds),
        dict(modules),
        ends,
        tuple(unmatched),
        partial,
        tuple(colliding),
        precision_of(metadata),
    )


def has_role(roles: Iterable[str], start: str) -> bool:
    return any(role.startswith(start) and role != "diff_b" for role in roles)


def halves(roles: Mapping[str, str]) -> list[str]:
    """Keys of factors without the other one, by the roles of one target."""
    pairs = [*NEEDED, *(pair[::-1] for pair in NEEDED)]
    return [roles[here] for here, there in pairs if here in roles and there not in roles]


def family_of(keys: Iterable[str]) -> str:
    """A control LoRA is told by its norms, which other keys outnumber."""
    found = Counter(next((name for name, start in FAMILIES if re.match(start, key)), "unknown") for key in keys)
    return "BFL control LoRA" if found["BFL control LoRA"] else found.most_common(1)[0][0]


def precision_of(metadata: Mapping[str, object]) -> str | None:
    """kohya writes ss_*, ai-toolkit its configuration; others nothing."""
    found = [f"{key[3:]}={metadata[key]}" for key in PRECISION_KEYS if metadata.get(key) not in (None, "None", "False")]
    try:
        config = json.loads(str(metadata.get("training_info", "{}")))
        software = json.loads(str(metadata.get("software", "{}"))).get("name")
    except (ValueError, AttributeError, RecursionError):
        config, software = {}, None
    if isinstance(config, dict) and config.get("quantize"):
        found.append(f"quantize={config['quantize']}")
    return ", ".join([*found, *([f"by {software}"] if software and found else [])]) or None


def flux_names() -> dict[str, tuple[int, ...]]:
    """Names of a whole FLUX.1 [dev] with the shapes that decide about rows."""
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern in KEY_MAP:
        count = dict(zip(("double_blocks", "single_blocks"), BLOCKS, strict=True)).get(pattern.split(".")[0], 1)
        rows = {"img_mlp.0": 4, "txt_mlp.0": 4, "qkv": 3, "_mod.lin": 6, "modulation.lin": 3, "linear1": 7}
        times = next((times for end, times in rows.items() if pattern.endswith(end)), 1)
        times = 2 if "adaLN" in pattern else times
        for i in range(count):
            kind = "scale" if pattern.endswith("_norm") else "weight"
            shapes[f"{pattern.format(i)}.{kind}"] = (times * HIDDEN, HIDDEN)
    return shapes


def key_of(record: Record, factor: str) -> str:
    """The key of the file that a factor came from."""
    wanted = {"value": ("diff", "set", "norm"), "bias": ("up_bias", "diff_b")}.get(factor, (factor,))
    for source in record.sources:
        role = (split_key(source) or ("", ""))[1]
        if role in wanted or role.endswith(f"_{factor}"):
            return source
    return record.sources[0]


def check_complete(lora: Lora) -> None:
    """UserError for a factor without its other half, and for a file whose changes are of another model."""
    roles = {key: split_key(key) for key in lora.unused}
    factors = {key: parts for key, parts in roles.items() if parts and FACTORS.fullmatch(parts[1])}
    keys = {*lora.unused, *(source for record in lora.records for source in record.sources)}
    for key, (module, role) in factors.items():
        partners = [there for pair in NEEDED for here, there in (pair, pair[::-1]) if here == role]
        ends = [end for partner in partners for end in ROLES[partner]]
        if partners and not any(f"{module}{end}" in keys for end in ends):
            raise UserError(f"{lora.path}: {key} has no other half ({ends[0]}); the file is incomplete")
    if factors and not any(record.component == TRANSFORMER for record in lora.records):
        raise UserError(f"{lora.path}: {next(iter(factors))} has no place in FLUX.1; the LoRA is for another model")
