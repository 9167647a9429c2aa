"""Adds the changes of LoRA files to full-precision weights, before these are quantized.

    LoRA  W + s B A          LoHa  W + s (B1 A1) * (B2 A2)          LoKr  W + s kron(w1, w2)
    DoRA  W + strength (m V / |V| - W) with V = W + alpha / rank * change; |V| by row or by column

Every change is taken relative to the weight in the file (or to the value that replaces it), so the order of adapters
does not matter beyond rounding. The sums are float32. Rows are done a slice at a time: the memory is that of the
weight, its copy, and a slice. DoRA: arXiv 2402.09353, and the `dora` layers of huggingface/peft (the norm is that of
the changed weight; ComfyUI takes the unchanged one where magnitudes are per row).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flux_quant.converters.lora_names import TRANSFORMER
from flux_quant.converters.lora_records import KINDS, Lora, Record
from flux_quant.errors import UserError
from flux_quant.formats import Shape

SLICE = 1 << 18  # elements of the change that are made at a time: they stay in the cache
Adapters = Sequence[tuple[Lora, float]]  # with their strengths


def touches(name: str, adapters: Adapters) -> bool:
    return any(lora.touches(name) for lora, _ in adapters)


def new_shape(name: str, shape: Shape, adapters: Adapters) -> Shape:
    """The shape after fusing: a control LoRA needs more input columns than its base has (img_in: 128 for 64)."""
    module, _, kind = name.rpartition(".")
    if kind != "weight" or len(shape) != 2:
        return shape
    return shape[0], max(shape[1], *(lora.widths.get(module, 0) for lora, _ in adapters), 0)


def fused(name: str, weight: Tensor, adapters: Adapters) -> Tensor:
    """weight (N, K), or a bias or norm scale (N,), float32 -> the same with all changes, in `new_shape`.

    The result is `weight` itself if nothing changes it; it is never written into.
    """
    changes = [(lora, record, strength) for lora, strength in adapters for record in lora.changing(name)]
    shape = new_shape(name, tuple(weight.shape), adapters)
    if not changes and shape == weight.shape:
        return weight
    table = weight.float().reshape(len(weight), -1)
    if shape != weight.shape:
        table = torch.nn.functional.pad(table, (0, shape[1] - table.shape[1]))
    is_bias = name.endswith(".bias")
    for lora, record, _ in changes:
        check_fit(lora, record, name, table.shape)
    if not is_bias:
        table = replaced(name, table, changes)
    out = table.clone()
    for _, record, strength in changes:
        if is_bias:
            out[record.rows, 0].add_(record.bias.to(out.device), alpha=strength)
        elif record.kind != "set":
            add_change(out[record.rows, : record.columns], table[record.rows, : record.columns], record, strength)
    return out.view(shape)


def check_fit(lora: Lora, record: Record, name: str, shape: torch.Size) -> None:
    """The reader compares with the transformer's shapes; text encoders are seen here for the first time."""
    columns = shape[1] if name.endswith(".bias") else record.columns
    if record.component == TRANSFORMER:
        fits = record.rows.stop <= shape[0] and columns <= shape[1]
    else:
        fits = (record.row_len, columns) == shape
    if not fits:
        raise UserError(
            f"{lora.path}: {record.sources[0]} changes {record.row_len} x {columns} values of {name}, "
            f"which has {' x '.join(map(str, shape))}: the LoRA was made for another model"
        )


def replaced(name: str, table: Tensor, changes: Sequence[tuple[Lora, Record, float]]) -> Tensor:
    """The values that are given instead of the model's, (N, K) -> (N, K). Two adapters must not disagree."""
    setters = [(lora, record) for lora, record, _ in changes if record.kind == "set"]
    if not setters:
        return table
    out = table.clone()
    for i, (lora, record) in enumerate(setters):
        value = record.factors["value"].to(out)
        for other, earlier in setters[:i]:
            apart = earlier.rows.stop <= record.row_start or record.rows.stop <= earlier.row_start
            if not apart and not torch.equal(out[record.rows], value):
                raise UserError(f"{other.path} and {lora.path} both replace {name}: only one of them can be used")
        out[record.rows] = value
    return out


def add_change(out: Tensor, base: Tensor, record: Record, strength: float) -> None:
    """out (N, K) += strength * change of base (N, K), both float32."""
    gain = column_gain(base, record)
    for first, last, change in slices_of(record, out):
        if record.magnitude is None:
            out[first:last].add_(change, alpha=strength * record.scale)
            continue
        rows = base[first:last]
        merged = torch.add(rows, change, alpha=record.scale)
        lengths = gain if gain is not None else row_gain(merged, record.magnitude[first:last])
        out[first:last].add_(merged.mul_(lengths).sub_(rows), alpha=strength)


def slices_of(record: Record, like: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, last row, unscaled change of these rows), float32 on the device of `like`."""
    step = max(1, SLICE // record.columns)
    dense = "value" in record.factors  # as large as the weight: converted slice by slice
    factors = record.factors if dense else {name: factor.to(like) for name, factor in record.factors.items()}
    for first in range(0, record.row_len, step):
        last = min(first + step, record.row_len)
        yield first, last, KINDS[record.kind].rows(factors, first, last).to(like)


def row_gain(merged: Tensor, magnitude: Tensor) -> Tensor:
    """(n, K), (n, 1) -> (n, 1)"""
    return magnitude.to(merged) / length(merged.square().sum(1, keepdim=True, dtype=torch.float64)).to(merged)


def column_gain(base: Tensor, record: Record) -> Tensor | None:
    """(1, K), if the magnitudes are those of columns: their length needs all rows, so the change is made twice."""
    if record.magnitude is None or record.magnitude.shape == (record.row_len, 1):
        return None
    squares = torch.zeros(1, record.columns, dtype=torch.float64, device=base.device)
    for first, last, change in slices_of(record, base):
        merged = torch.add(base[first:last], change, alpha=record.scale)
        squares += merged.square().sum(0, keepdim=True, dtype=torch.float64)
    return record.magnitude.to(base) / length(squares).to(base)


def length(squares: Tensor) -> Tensor:
    """Never zero: rows of zeros stay zeros."""
    return squares.sqrt().clamp(min=torch.finfo(torch.float32).eps)
