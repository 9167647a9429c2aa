"""Moved to `flux_quant.generation`: the name is that of a function, `flux_quant.pipeline(...)`. To be removed."""

from flux_quant.generation import *  # noqa: F403
