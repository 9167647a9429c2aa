"""Prompts become what the transformer reads: T5's features of every token, and CLIP-L's one vector.

Each encoder is loaded, used for all prompts and dropped before the next one comes. As in black-forest-labs/flux
`conditioner.py`: T5 is padded to a fixed length and sees its padding, CLIP's vector is the state of its end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flux_quant.errors import UserError
from flux_quant.loading import load_clip, load_t5

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDERS = {"t5": ("t5", "tokenizer_2"), "clip": ("clip", "tokenizer")}  # ours, diffusers'
FILES = {"t5": ("tokenizer.json", "spiece.model"), "clip": ("tokenizer.json", "vocab.json")}  # any one of them
LONGEST = 512  # tokens of T5; a tokenizer may allow fewer


@dataclass(frozen=True)
class TextFeatures:
    """txt (B, T, context), pooled (B, pooled): float32 on the CPU."""

    txt: Tensor
    pooled: Tensor

    def __getitem__(self, rows: slice) -> "TextFeatures":
        return TextFeatures(self.txt[rows], self.pooled[rows])


def load_tokenizer(root: Path, kind: str) -> "PreTrainedTokenizerBase":
    """kind "t5" or "clip" from `root`, in a folder of one of the names in FOLDERS."""
    from transformers import CLIPTokenizer, T5Tokenizer

    folder = next((root / name for name in FOLDERS[kind] if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{root}: no folder {' or '.join(FOLDERS[kind])} with the {kind.upper()} tokenizer")
    if not any((folder / name).is_file() for name in FILES[kind]):
        raise UserError(f"{folder}: neither {' nor '.join(FILES[kind])} is there: not a {kind.upper()} tokenizer")
    loader = T5Tokenizer if kind == "t5" else CLIPTokenizer
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a {kind.upper()} tokenizer ({str(error).splitlines()[0]})") from None


@torch.no_grad()
def encode_t5(path: Path, tokenizers: Path, prompts: Sequence[str], length: int | None = None) -> Tensor:
    """(B, T, context); T is `length`, or what the tokenizer was made for, at most 512."""
    tokenizer = load_tokenizer(tokenizers, "t5")
    length = min(length or LONGEST, tokenizer.model_max_length)
    ids = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return load_t5(path)(ids).last_hidden_state


@torch.no_grad()
def encode_clip(path: Path, tokenizers: Path, prompts: Sequence[str]) -> Tensor:
    """(B, pooled)."""
    tokenizer = load_tokenizer(tokenizers, "clip")
    ids = tokenizer(list(prompts), padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return load_clip(path, tokenizer.eos_token_id)(ids).pooler_output
