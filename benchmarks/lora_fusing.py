"""How much of a LoRA survives when it is fused into weights that are quantized already.

    python -I -m flux_quant.benchmarks.lora_fusing [--save]

Weights of the bundled model are quantized, unpacked, changed by a random product of rank 16, and quantized again. What
survives is the part of the change that is found along itself; noise is what comes with it, relative to the change. The
last column changes the weights before they are quantized for the first time, as `convert --lora` does.
"""

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from flux_quant.benchmarks.machine import write_result
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.checkpoint import load
from flux_quant.converters.component import open_component
from flux_quant.formats import FORMATS
from flux_quant.kernels import cpu_quantize, dispatch

FORMS = ("bf16", "q8_0", "fp8", "q6_k", "q5_0", "q5_k", "q4_0", "q4_k")
SHARES = (0.005, 0.02, 0.05)  # norm of the change, relative to that of the weight
RANK, MATRICES = 16, 12


def stored(weight: Tensor, name: str) -> Tensor:
    """The weight as a format gives it back."""
    fmt = FORMATS[name]
    parts = fmt.pack(weight) if fmt.block == 1 else cpu_quantize.quantize(name, weight)[0]
    return dispatch.dequantize(fmt, parts, torch.float32)


def survival(weight: Tensor, change: Tensor, name: str, first: bool) -> tuple[float, float]:
    """(part along the change, norm of the rest relative to the change). `first`: quantized before it is changed."""
    base = stored(weight, name)
    found = (stored((base if first else weight) + change, name) - base).flatten().double()
    wanted = change.flatten().double()
    part = float(found @ wanted / (wanted @ wanted))
    return part, float((found - part * wanted).norm() / wanted.norm())


def matrices() -> Iterator[Tensor]:
    reader = open_component(find_components(BUNDLED).transformer, "FLUX.1")
    names = [name for name, info in reader.tensors.items() if "_blocks" in name and len(info.shape) == 2]
    yield from (load(reader, name) for name in names[:: -(-len(names) // MATRICES)])


def mean(name: str, share: float, first: bool = True) -> tuple[float, float]:
    torch.manual_seed(0)
    rows = []
    for weight in matrices():
        change = torch.randn(len(weight), RANK) @ torch.randn(RANK, weight.shape[1])
        rows.append(survival(weight, change * (share * weight.norm() / change.norm()), name, first))
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def table(rows: list[dict[str, object]]) -> list[str]:
    """Lines of Markdown, as docs/lora.md has them."""
    changes = " | ".join(f"change of {100 * share:g} %" for share in SHARES)
    lines = [f"| stored as | {changes} | 2 %, fused before |", "|---" * (len(SHARES) + 2) + "|"]
    for row in rows:
        cells = " | ".join(f"{part:.2f} ({noise:.1f})" for part, noise in row["survives"])
        lines.append(f"| {row['format']} | {cells} |")
    return lines


def measure() -> list[dict[str, object]]:
    """For each format (part, noise) of every share, and of 2 % fused before quantizing."""
    every = {name: [mean(name, share) for share in SHARES] + [mean(name, 0.02, first=False)] for name in FORMS}
    return [{"format": name, "survives": cells} for name, cells in every.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    rows = measure()
    print(*table(rows), sep="\n")
    if args.save:
        print(f"wrote {write_result('lora_fusing', {'shares': SHARES, 'rows': rows})}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
