"""Prompts become numbers: syntax, tokens, both encoders, and a cache of what they gave."""
