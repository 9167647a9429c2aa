"""Model files in, model files out: the only package that touches checkpoints."""
