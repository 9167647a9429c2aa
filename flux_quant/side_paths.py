"""From what LoRA files say of one layer to the side path that runs beside it (`adapters.SidePath`)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flux_quant.adapters import BiasChange, Dial, Gain, Other, Piece, SidePath, Up
from flux_quant.converters.lora_math import column_gain, row_gain, slices_of
from flux_quant.converters.lora_records import BIAS_ONLY, Lora, Record
from flux_quant.kernels import dispatch
from flux_quant.linear import QuantLinear

Sourced = Sequence[tuple[int, Lora, Record]]  # changes of one module, with the number of their file


class SidePathBuilder:
    """Factors of all files for one layer, in the order in which they are used."""

    def __init__(self, layer: QuantLinear, weight: Tensor | None, wide: int, dtype: torch.dtype | None) -> None:
        """weight: (N, K) if another one replaces the layer's own."""
        self.layer, self.weight, self.wide, self.dtype = layer, weight, wide, dtype
        self.device = layer.parts[0].device
        self.downs: list[tuple[int, Tensor, int]] = []  # file, first factor, its first rank
        self.ups: dict[tuple[int, int], list[tuple[Piece, Tensor]]] = {}
        self.ranks = 0

    def build(self, changes: Sourced, dial: Dial) -> SidePath:
        others, row_gains, column_gains, biases = [], [], [], []
        for number, _, record in changes:
            if record.bias is not None:
                biases.append(BiasChange(number, record.rows, record.bias.to(self.device, copy=True)))
            if record.kind in (BIAS_ONLY, "set"):
                continue
            row, column = self.gains(record)
            if row is not None:
                row_gains.append(Gain(number, record.rows, row - 1))
            if column is not None:
                column_gains.append(Gain(number, record.rows, column[: self.layer.in_features] - 1))
            if record.kind == "lora":
                self.add_lora(number, record, row, column)
            else:
                factors = {name: self.kept(factor) for name, factor in record.factors.items()}
                others.append(
                    Other(number, record.kind, record.rows, record.columns, record.scale, factors, row, column)
                )
        down = torch.cat([self.padded(factor) for _, factor, _ in self.downs]) if self.downs else None
        ups = [self.up(rows, parts) for rows, parts in self.ups.items()]
        return SidePath(dial, self.layer, down, ups, others, row_gains, column_gains, biases)

    def kept(self, factor: Tensor) -> Tensor:
        """A copy: factors of a file are views of it."""
        return factor.to(self.device, self.dtype or factor.dtype, copy=True).contiguous()

    def padded(self, down: Tensor) -> Tensor:
        """(r, K) -> as many columns as the widest."""
        columns = max(factor.shape[1] for _, factor, _ in self.downs)
        return nn.functional.pad(down, (0, columns - down.shape[1]))

    def add_lora(self, number: int, record: Record, row: Tensor | None, column: Tensor | None) -> None:
        up, down = (record.factors[name].to(self.device) for name in ("up", "down"))
        up = self.kept(up if row is None else up.float() * row[:, None])
        down = self.kept(down if column is None else down.float() * column)
        first = next((f for n, d, f in self.downs if n == number and d.shape == down.shape and d.equal(down)), None)
        if first is None:  # else q, k and v of one file that share it
            first = self.ranks
            self.downs.append((number, down, first))
            self.ranks += len(down)
        piece = Piece(number, record.scale, first, first + len(down))
        self.ups.setdefault((record.row_start, record.row_len), []).append((piece, up))

    def up(self, rows: tuple[int, int], parts: Sequence[tuple[Piece, Tensor]]) -> Up:
        weight = torch.cat([weight for _, weight in parts], dim=1)
        return Up(slice(rows[0], sum(rows)), weight, tuple(piece for piece, _ in parts))

    def gains(self, record: Record) -> tuple[Tensor | None, Tensor | None]:
        """(row gain (n,), column gain (K,)) of a DoRA, float32; see `lora_math`."""
        if record.magnitude is None:
            return None, None
        if self.weight is None:
            self.weight = dispatch.dequantize(self.layer.fmt, self.layer.parts, torch.float32)
        base = nn.functional.pad(self.weight, (0, self.wide - self.weight.shape[1]))
        base = base[record.rows, : record.columns]
        columns = column_gain(base, record)
        if columns is not None:
            return None, columns.flatten()
        found = []
        for first, last, change in slices_of(record, base):
            merged = torch.add(base[first:last], change, alpha=record.scale)
            found.append(row_gain(merged, record.magnitude[first:last]).flatten())
        return torch.cat(found), None
