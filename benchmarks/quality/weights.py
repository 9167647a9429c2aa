"""What quantization changed in the weights themselves, read from the two files."""

import os
from math import prod
from pathlib import Path

from flux_quant.benchmarks.bench.record import Scalar
from flux_quant.converters.quantize import Deviation
from flux_quant.converters.verify import diff


def weight_figures(source: Path, target: Path) -> dict[str, Scalar]:
    """Of the tensors whose values changed; the bits are those of the whole file."""
    rows = diff(source, target).rows
    changed = {row.name: row.deviation for row in rows if row.deviation is not None and row.deviation.noise}
    nbytes = os.path.getsize(target)
    parameters = sum(prod(row.shape) for row in rows)
    out: dict[str, Scalar] = {"file_bytes": nbytes, "bits_per_weight": 8 * nbytes / parameters}
    if changed:
        worst = min(changed, key=lambda name: changed[name].snr)
        out |= {
            "weight_snr_db": sum(changed.values(), Deviation()).snr,
            "weight_snr_db_worst": changed[worst].snr,
            "weight_worst_tensor": worst,
        }
    return out
