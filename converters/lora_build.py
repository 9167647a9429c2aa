"""From the tensors that a LoRA file has for one module to records.

The rules that differ between families end here: scales, factors of convolutions (1 x 1 ones are matrices), rows that
the file has in another order. Shapes are compared with the model's, and what does not fit is an error that names the
key: cutting or padding it, as some programs do, gives pictures that are quietly wrong.

Scale: alpha / rank; a missing alpha, and kohya's 0, mean rank. LoKr has a rank only if one of its matrices is stored
in factors; if both are whole, alpha means nothing (some files carry absurd ones for that reason).
Source: Comfy-Org/ComfyUI comfy/weight_adapter/, KohakuBlueleaf/LyCORIS lycoris/modules/.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from flux_quant.converters.lora_names import TRANSFORMER, Target
from flux_quant.converters.lora_records import BIAS_ONLY, KINDS, Factors, Record
from flux_quant.errors import UserError
from flux_quant.formats import Shape

WIDENED = "img_in"  # the one module whose input may be wider or narrower than the base's: extra latent channels


@dataclass
class Group:
    """What a file has for one target."""

    path: Path
    target: Target
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by role
    keys: dict[str, str] = field(default_factory=dict)  # by role
    default_alpha: tuple[float, bool] | None = (
        None  # from the metadata: alpha, and whether the scale is alpha / sqrt(r)
    )

    def error(self, role: str, what: str) -> UserError:
        return UserError(f"{self.path}: {self.keys[role]} {list(self.tensors[role].shape)} {what}")

    def matrix(self, role: str) -> Tensor:
        """(rows, columns); a 1 x 1 convolution is one too."""
        tensor = self.tensors[role]
        if tensor.ndim < 2 or tensor.numel() != tensor.shape[0] * tensor.shape[1]:
            raise self.error(role, "is not a matrix")
        if not tensor.numel():
            raise self.error(role, "is empty")
        return tensor.reshape(tensor.shape[:2])

    def product_fits(self, left: str, right: str) -> None:
        if self.matrix(left).shape[1] != self.matrix(right).shape[0]:
            raise self.error(right, f"and {self.keys[left]} {list(self.tensors[left].shape)} have different ranks")

    def scale(self, rank: int) -> float:
        """alpha / rank"""
        if "alpha" not in self.tensors:
            alpha, by_root = self.default_alpha or (0, False)
            return alpha / (rank**0.5 if by_root else rank) or 1.0
        if self.tensors["alpha"].numel() != 1:
            raise self.error("alpha", "is not one number")
        alpha = float(self.tensors["alpha"])
        if not isfinite(alpha):
            raise self.error("alpha", f"is {alpha}")
        return alpha / rank or 1.0


def build(group: Group, shapes: Mapping[str, Shape]) -> tuple[list[Record], set[str]]:
    """The records of one target, and the roles that are used in them.

    The first one that changes the weight takes the magnitude, and the change of the bias goes with the first of all.
    """
    records, used = [], set()
    for kind, builder in BUILDERS.items():
        if built := builder(group):
            factors, scale, roles = built
            target = group.target
            record = Record(target.component, target.module, kind, target.row_start, 0, factors, scale, None, None, ())
            rows, columns = KINDS[kind].shape(factors)
            check_shape(group, next(iter(roles)), (rows, columns), shapes)
            record = replace(record, row_len=rows, sources=tuple(group.keys[role] for role in roles))
            records.append(in_module_order(record, group.target.swapped))
            used |= set(roles)
    if "magnitude" in group.tensors and records and records[0].kind != "set":
        records[0] = with_magnitude(group, records[0])
        used.add("magnitude")
    bias_roles = present(group, *(("up_bias", "diff_b") if records and records[0].kind == "lora" else ("diff_b",)))
    if bias_roles and (group.target.component != TRANSFORMER or f"{group.target.module}.bias" in shapes):
        records = with_bias(group, records, bias_roles)
        used |= set(bias_roles)
    if records and records[0].kind in ("lora", "lokr", "loha") and (numbers := present(group, "alpha", "reshape")):
        records[0] = replace(records[0], sources=(*records[0].sources, *(group.keys[role] for role in numbers)))
        used |= set(numbers)
    return records, used


# --- Factors and scale of each kind: (factors, scale, roles), or None if the group has nothing of the kind ---------

Built = tuple[dict[str, Tensor], float, list[str]]


def present(group: Group, *roles: str) -> list[str]:
    return [role for role in roles if role in group.tensors]


def build_lora(group: Group) -> Built | None:
    roles = present(group, "down", "up", "mid")
    if roles[:2] != ["down", "up"]:
        return None
    up, down = group.matrix("up"), group.matrix("down")
    rank = len(down)
    if "mid" in roles:
        check_core(group, "mid", up.shape[1], rank)
        down = group.matrix("mid").float() @ down.float()
    else:
        group.product_fits("up", "down")
    return {"up": up, "down": down}, group.scale(rank), roles


def build_loha(group: Group) -> Built | None:
    roles = present(group, *(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")))
    if len(roles) < 4 or roles[3] != "hada_w2_b":
        return None
    w1_a, w1_b = pair(group, "hada_w1", "hada_t1")
    w2_a, w2_b = pair(group, "hada_w2", "hada_t2")
    if (len(w1_a), w1_b.shape[1]) != (len(w2_a), w2_b.shape[1]):
        raise group.error("hada_w2_b", f"and {group.keys['hada_w1_b']} do not belong to one weight")
    return {"w1_a": w1_a, "w1_b": w1_b, "w2_a": w2_a, "w2_b": w2_b}, group.scale(len(w1_b)), roles


def build_lokr(group: Group) -> Built | None:
    factors, roles, rank = {}, [], None
    for part in ("w1", "w2"):
        whole, left, right = f"lokr_{part}", f"lokr_{part}_a", f"lokr_{part}_b"
        if whole in group.tensors:
            factors[part] = group.matrix(whole)
            roles.append(whole)
        elif left in group.tensors and right in group.tensors:
            middle = "lokr_t2" if part == "w2" else None
            factors[f"{part}_a"], factors[f"{part}_b"] = pair(group, whole, middle)
            roles += [left, right, *present(group, middle)]
            rank = len(group.matrix(right))
        else:
            return None
    return factors, group.scale(rank) if rank else 1.0, roles


def pair(group: Group, name: str, middle: str | None) -> tuple[Tensor, Tensor]:
    """a (N, r), b (r, K). With a core of a 1 x 1 convolution, a is stored transposed, and the core goes into b."""
    left, right = f"{name}_a", f"{name}_b"
    if middle not in group.tensors:
        group.product_fits(left, right)
        return group.matrix(left), group.matrix(right)
    check_core(group, middle, len(group.matrix(left)), len(group.matrix(right)))
    return group.matrix(left).t(), group.matrix(middle).float() @ group.matrix(right).float()


def check_core(group: Group, role: str, left: int, right: int) -> None:
    """(r, r): its product with a factor is as large as the factor."""
    if group.matrix(role).shape != (left, right) or left != right:
        raise group.error(role, f"does not fit its factors of rank {left} and {right}")


def build_diff(group: Group) -> Built | None:
    return dense(group, "diff")


def build_set(group: Group) -> Built | None:
    return dense(group, "set") or dense(group, "norm")


def dense(group: Group, role: str) -> Built | None:
    if role not in group.tensors:
        return None
    tensor = group.tensors[role]
    value = tensor[:, None] if tensor.ndim == 1 and tensor.numel() else group.matrix(role)
    return {"value": value}, 1.0, [role]


BUILDERS = {"lora": build_lora, "lokr": build_lokr, "loha": build_loha, "diff": build_diff, "set": build_set}

# --- What comes on top ------------------------------------------------------------------------------------------------


def with_magnitude(group: Group, record: Record) -> Record:
    """DoRA's lengths: (N,) and (N, 1) are those of rows, (1, K) those of columns."""
    tensor = group.tensors["magnitude"]
    flat = (
        tensor.reshape(tensor.shape[:2]) if tensor.ndim > 2 and tensor.numel() == tensor.shape[:2].numel() else tensor
    )
    if flat.shape in ((record.row_len,), (record.row_len, 1)):
        magnitude = flat.reshape(-1, 1)
        magnitude = exchanged(magnitude) if group.target.swapped else magnitude
    elif flat.shape == (1, record.columns):
        magnitude = flat
    else:
        raise group.error("magnitude", f"fits neither the rows nor the columns of {record.row_len} x {record.columns}")
    return replace(record, magnitude=magnitude, sources=(*record.sources, group.keys["magnitude"]))


def with_bias(group: Group, records: list[Record], roles: list[str]) -> list[Record]:
    """`lora_B.bias` is scaled like its matrix, `diff_b` is not."""
    total = None
    for role in roles:
        bias = group.tensors[role].flatten().float() * (records[0].scale if role == "up_bias" else 1.0)
        expected = group.target.row_len or (records[0].row_len if records else len(bias))
        if len(bias) != expected:
            raise group.error(role, f"does not fit {group.target.module}.bias, which has {expected} values here")
        total = bias if total is None else total + bias
    total = exchanged(total) if group.target.swapped else total
    keys = tuple(group.keys[role] for role in roles)
    if records:
        return [replace(records[0], bias=total, sources=(*records[0].sources, *keys)), *records[1:]]
    target = group.target
    return [
        Record(
            target.component, target.module, BIAS_ONLY, target.row_start, len(total), {}, 1.0, None, total, sources=keys
        )
    ]


def check_shape(group: Group, role: str, found: tuple[int, int], shapes: Mapping[str, Shape]) -> None:
    target = group.target
    if target.component != TRANSFORMER:
        return  # their shapes are known when they are fused
    shape = shapes.get(f"{target.module}.weight", shapes.get(f"{target.module}.scale"))
    rows, columns = target.row_len, shape[1] if len(shape) > 1 else 1
    if found[0] == rows and (found[1] == columns or target.module == WIDENED and can_widen(group, found[1], columns)):
        return
    part = "" if rows == shape[0] else f" rows {target.row_start} to {target.row_start + rows - 1} of"
    raise group.error(
        role,
        f"gives a change of {found[0]} x {found[1]} values for{part} {target.module}, where {rows} x {columns} "
        "were expected: the LoRA was made for another model",
    )


def can_widen(group: Group, found: int, columns: int) -> bool:
    """Control LoRAs double the input (the added columns start from zero); a LoRA of the base fits a wider model."""
    return found in (2 * columns, declared_width(group)) and found > columns or columns % found == 0


def declared_width(group: Group) -> int:
    """Columns by `reshape_weight` (rows, columns); 0 without."""
    wanted = group.tensors.get("reshape")
    return int(wanted.flatten()[1].long()) if wanted is not None and wanted.numel() == 2 else 0


def exchanged(tensor: Tensor) -> Tensor:
    """The two halves of the rows change places."""
    return torch.cat(tensor.chunk(2)[::-1])


def in_module_order(record: Record, swapped: bool) -> Record:
    """The factors of the same change with its halves exchanged, for the one module that diffusers stores like that."""
    return replace(record, **swapped_factors(record)) if swapped else record


def swapped_factors(record: Record) -> dict[str, object]:
    factors = dict(record.factors)
    if record.kind == "lokr":
        return swapped_lokr(factors, record)
    for name in {"lora": ("up",), "loha": ("w1_a", "w2_a")}.get(record.kind, ("value",)):
        factors[name] = exchanged(factors[name])
    return {"factors": factors}


def swapped_lokr(factors: Factors, record: Record) -> dict[str, object]:
    """Halves of the change are halves of w1, or of w2 if w1 has one row; with an odd w1 no product has them."""
    one, two = ("w1" if "w1" in factors else "w1_a"), ("w2" if "w2" in factors else "w2_a")
    if len(factors[one]) % 2 == 0:
        return {"factors": {**factors, one: exchanged(factors[one])}}
    if len(factors[one]) == 1:
        return {"factors": {**factors, two: exchanged(factors[two])}}
    change = KINDS["lokr"].rows({name: factor.float() for name, factor in factors.items()}, 0, record.row_len)
    return {"kind": "diff", "factors": {"value": exchanged(change)}}
