"""Quantization and low-VRAM runtime toolkit for FLUX.1. Importing this module loads nothing."""

__version__ = "0.1.0"
