"""Dequantize and multiply: the only package that imports triton or numba."""
