"""Adapters: the engine and its kernels inside diffusers, transformers and ComfyUI."""
