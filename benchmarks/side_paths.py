"""What a LoRA beside a packed layer costs, against its share of the arithmetic.

    python -I -m flux_quant.benchmarks.side_paths [--rows 4608] [--formats bf16,q8_0,q4_k] [--small] [--save]

Each layer alone and with a LoRA of each rank on all of its rows, timed in turns. `share` is what the LoRA adds to the
products, r (N + K) / N K; `cost` what it adds to the time of the layer; `times` the one by the other.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from flux_quant.benchmarks.journal import FAILURES, Journal
from flux_quant.benchmarks.random_weights import on_device, random_parts
from flux_quant.benchmarks.timing import compare, copies_for
from flux_quant.converters.lora_names import TRANSFORMER
from flux_quant.converters.lora_records import Lora, Record
from flux_quant.linear import QuantLinear
from flux_quant.lora import apply_

LAYERS = {"proj": (3072, 3072), "qkv": (9216, 3072), "linear1": (21504, 3072), "linear2": (3072, 15360)}
SMALL = {"qkv": (768, 256)}
RANKS = (16, 64, 128)
ONE_LAYER = 4.0  # seconds that have to be left


def lora_for(shape: tuple[int, int], rank: int) -> Lora:
    n, k = shape
    factors = {"down": torch.randn(rank, k) / k**0.5, "up": torch.randn(n, rank) / rank**0.5}
    record = Record(TRANSFORMER, "0", "lora", 0, n, factors, 1.0, None, None, ("random",))
    return Lora(Path("random"), (record,), [], {}, {})


def packed(shape: tuple[int, int], form: str, device: torch.device) -> QuantLinear:
    """Random values, in the order that the device loads fastest."""
    fmt = on_device(form, device)
    return QuantLinear.from_parts(fmt, random_parts(fmt, shape, device), torch.zeros(shape[0], device=device))


def measure(shape: tuple[int, int], form: str, rows: int, device: torch.device, dtype: torch.dtype) -> list[dict]:
    first = packed(shape, form, device)
    copies = copies_for(sum(part.nbytes for part in first.parts), device)
    x = torch.randn(rows, shape[1], device=device, dtype=dtype)
    contenders = {}
    for rank in (0, *RANKS):
        models = []
        for _ in range(copies):
            layer = QuantLinear.from_parts(first.fmt, [part.clone() for part in first.parts], first.bias.data.to(dtype))
            models.append(nn.Sequential(layer))
            if rank:
                apply_(models[-1], [(lora_for(shape, rank), 0.8)], dtype=dtype)
        contenders[str(rank)] = lambda i, models=models: models[i](x)
    with torch.no_grad():
        times = compare(contenders, copies, device)
    alone, out = times["0"], []
    for rank in RANKS:
        share = rank * sum(shape) / (shape[0] * shape[1])
        cost = times[str(rank)].median / alone.median - 1
        numbers = {"share": round(share, 4), "cost": round(cost, 4), "times": round(cost / share, 2)}
        out.append({"rank": rank, **numbers, "alone": alone.row(), **times[str(rank)].row()})
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4608)
    parser.add_argument("--formats", default="bf16,q8_0,q4_k")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no layer after them")
    parser.add_argument("--small", action="store_true", help="small layers, few rows")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, layers = 64 if options.small else options.rows, {}
    journal = Journal("side_paths", options.seconds, options.save, facts={"rows_of_input": rows, "layers": layers})
    for form in options.formats.split(","):
        for name, shape in (SMALL if options.small else LAYERS).items():
            what = {"format": form, "layer": name}
            if journal.left < ONE_LAYER:
                journal.skip(what, "no time was left")
                continue
            try:
                layers[f"{form} {name}"] = found = measure(shape, form, rows, device, dtype)
            except FAILURES as error:
                journal.skip(what, f"{type(error).__name__}: {error}")
                continue
            journal.write()
            text = ", ".join(f"rank {row['rank']}: {row['cost']:.1%} for {row['share']:.1%}" for row in found)
            print(f"{form} {name}: {found[0]['alone']['us']:.0f} us alone; {text}")
    if options.save:
        print(f"wrote {journal.path}")
    return 0 if layers else 1


if __name__ == "__main__":
    sys.exit(main())
