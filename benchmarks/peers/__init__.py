"""Other programs on the same work beside ours: same files, same latents, same threads, measured in turns."""

from flux_quant.benchmarks.peers.suite import SUITE

__all__ = ["SUITE"]
