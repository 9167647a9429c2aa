"""What quantization changes, measured: `flux-quant bench quality`."""

from flux_quant.benchmarks.quality.suite import SUITE

__all__ = ["SUITE"]
