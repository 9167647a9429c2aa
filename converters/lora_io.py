"""Reads LoRA files of every family that exists for FLUX.1 into one kind of record.

    lora = read_lora(path, shapes)      shapes: names and shapes of the transformer, in BFL naming
    lora.records, lora.unused           what it changes, and every key that found no place

`lora_of` does the same for tensors in memory.

No family is guessed: each key is read by itself (lora_names), the parts of one module become records (lora_build).
What cannot be right ends here with the first key concerned: a file for another model, a whole model instead of a
LoRA, two keys for the same thing.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from math import isfinite
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from flux_quant.converters.checkpoint import FileReader, load, open_checkpoint
from flux_quant.converters.lora_build import WIDENED, Group, build
from flux_quant.converters.lora_names import CLIP_L, T5, TRANSFORMER, ModuleNames, Target, split_key
from flux_quant.converters.lora_records import BIAS_ONLY, Lora, Record
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS, Shape

PEFT_METADATA = "lora_adapter_metadata"
PEFT_PREFIXES = {TRANSFORMER: "transformer.", CLIP_L: "text_encoder.", T5: "text_encoder_2."}


def parse_lora_option(text: str) -> tuple[Path, float]:
    """`FILE:STRENGTH` or `FILE` (strength 1). `C:\\x.safetensors` is a file."""
    head, colon, tail = text.rpartition(":")
    if not colon or len(head) < 2 or not Path(head).suffix and not is_number(tail):
        return Path(text), 1.0
    if not is_number(tail):
        if Path(tail).suffix:  # a colon in a directory or file name
            return Path(text), 1.0
        raise UserError(f"--lora {text}: {tail!r} is not a strength; write FILE:STRENGTH, for instance {head}:0.8")
    if not isfinite(float(tail)) or float(tail) == 0:
        raise UserError(f"--lora {text}: a strength of {tail} makes no sense; leave the option out")
    return Path(head), float(tail)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Source(NamedTuple):
    """Where the tensors of a LoRA are; `path` names it in messages."""

    path: Path
    keys: list[str]
    metadata: Mapping[str, object]
    tensor: Callable[[str], Tensor]


def read_lora(path: str | Path, shapes: Mapping[str, Shape]) -> Lora:
    """All changes of a file for a transformer of these names and shapes (BFL), and for its text encoders."""
    path = Path(path)
    reader = open_checkpoint(path)
    if not isinstance(reader, FileReader):
        raise UserError(f"{path} is more than one file; name the file of the LoRA")
    keys = [*reader.tensors, *reader.foreign]
    return lora_of(Source(path, keys, reader.metadata, partial(stored, reader)), shapes)


def lora_of(source: Source, shapes: Mapping[str, Shape]) -> Lora:
    """The same of tensors that are already there."""
    alphas = PeftAlphas(source.path, source.metadata)
    names = ModuleNames(shapes)
    groups: dict[Target, Group] = {}
    unused = [key for key in source.keys if not place(key, source, names, alphas, groups)]
    built: list[list[Record]] = []
    for group in groups.values():
        found, used = build(group, shapes)
        built.append(found)
        unused += [key for role, key in group.keys.items() if role not in used]
    check_overlaps(source.path, built)
    records = [record for found in built for record in found]
    check_whole(source.path, source.keys, records)
    return Lora(source.path, tuple(records), unused, widths(records, shapes), source.metadata)


def place(key: str, source: Source, names: ModuleNames, alphas: "PeftAlphas", groups: dict[Target, Group]) -> bool:
    """Put a key into the group of its target; False if it has none."""
    parts = split_key(key)
    found = parts and names.resolve(parts[0])
    if not found:
        return False
    (target, own_name), role = found, parts[1]
    tensor = source.tensor(key)
    whole_number = not tensor.is_floating_point() and role not in ("alpha", "reshape")
    if whole_number or role == "norm" and not (target.component == TRANSFORMER and target.module.endswith("_norm")):
        return False
    group = groups.setdefault(target, Group(source.path, target, default_alpha=alphas.of(target.component, own_name)))
    if role in group.keys:
        raise UserError(f"{source.path}: {group.keys[role]} and {key} mean the same; the file holds two LoRAs")
    group.keys[role], group.tensors[role] = key, tensor
    return True


def stored(reader: FileReader, key: str) -> Tensor:
    """A view of the file where the type is one to compute with."""
    if key in reader.foreign:  # F64 and whole numbers: alphas, shapes
        return reader.mapped.tensor(reader.places[key][0])
    info = reader.tensors[key]
    return reader.read(key)[0] if FORMATS[info.format].is_plain else load(reader, key)


def check_whole(path: Path, keys: list[str], records: list[Record]) -> None:
    """There is a change at all, and it is not that of a whole model, whose norms alone would be understood."""
    if not records:
        first = keys[0] if keys else "the file is empty"
        raise UserError(f"{path}: no key belongs to a LoRA for this model (first key: {first})")
    if all(source.endswith(("_norm.scale", ".weight")) and r.kind == "set" for r in records for source in r.sources):
        raise UserError(f"{path} is no LoRA: its keys are those of a model (first key: {keys[0]})")


def check_overlaps(path: Path, built: list[list[Record]]) -> None:
    """Records of different targets that change the same rows: the same thing under two names would count twice."""
    seen: dict[tuple[str, str], list[Record]] = {}
    for records in built:
        changed = [(record, part) for record in records for part in ("weight", "bias") if record.changes(part)]
        for record, part in changed:
            for other in seen.get((record.module, part), ()):
                if record.row_start < other.rows.stop and other.row_start < record.rows.stop:
                    raise UserError(
                        f"{path}: {other.sources[0]} and {record.sources[0]} change the same rows of {record.module}; "
                        "the file holds two LoRAs"
                    )
        for record, part in changed:
            seen.setdefault((record.module, part), []).append(record)


def widths(records: list[Record], shapes: Mapping[str, Shape]) -> dict[str, int]:
    columns = max((r.columns for r in records if r.module == WIDENED and r.kind != BIAS_ONLY), default=0)
    return {WIDENED: columns} if columns > shapes[f"{WIDENED}.weight"][1] else {}


class PeftAlphas:
    """Alphas that PEFT keeps in the header: one for a component, others by the end of a module's name."""

    def __init__(self, path: Path, metadata: Mapping[str, object]) -> None:
        try:
            table = json.loads(str(metadata.get(PEFT_METADATA, "{}")))
            self.rows = {component: self.row(table, prefix) for component, prefix in PEFT_PREFIXES.items()}
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path}: the entry {PEFT_METADATA} of the header is damaged") from None

    @staticmethod
    def row(table: dict, prefix: str) -> tuple[float | None, dict[str, float], bool]:
        """(alpha, alphas by module, scale by the root of the rank)"""

        def number(value: object) -> float:
            if not isfinite(float(value)):
                raise ValueError
            return float(value)

        alpha = table.get(f"{prefix}lora_alpha")
        patterns = table.get(f"{prefix}alpha_pattern") or {}
        patterns = {re.sub(r"[\\^$]", "", name): number(value) for name, value in patterns.items()}
        return None if alpha is None else number(alpha), patterns, bool(table.get(f"{prefix}use_rslora"))

    def of(self, component: str, module: str) -> tuple[float, bool] | None:
        """(alpha, whether the scale is alpha / sqrt(rank)) of a module by its name in the file; None if unknown."""
        alpha, patterns, by_root = self.rows[component]
        for name, value in patterns.items():
            if module == name or module.endswith(f".{name}"):
                return value, by_root
        return None if alpha is None else (alpha, by_root)
