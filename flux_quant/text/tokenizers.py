"""The tokenizers of T5 and CLIP-L, from files on this machine. They are small; nothing is ever downloaded."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from flux_quant.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDERS = {"t5": ("t5", "tokenizer_2"), "clip": ("clip", "tokenizer")}  # ours, diffusers'
FILES = {"t5": ("tokenizer.json", "spiece.model"), "clip": ("tokenizer.json", "vocab.json")}  # any one of them
REPOSITORY = {"t5": "tokenizer_2", "clip": "tokenizer"}  # folder of the FLUX.1 repository that holds them

Places = list[tuple[int, int]]  # of tokens: first and last character (the one after it) of the text


def tokenizer_folder(root: Path, kind: str) -> Path:
    """kind "t5" or "clip" below `root`, in a folder of one of the names in FOLDERS. UserError that says what to do."""
    folders = [root / name for name in FOLDERS[kind] if (root / name).is_dir()]
    if found := next((folder for folder in folders if any((folder / name).is_file() for name in FILES[kind])), None):
        return found
    advice = f"copy the files of {REPOSITORY[kind]} of the FLUX.1 repository there (no weights, nothing is downloaded)"
    if not folders:
        raise UserError(f"{root}: no folder {' or '.join(FOLDERS[kind])} with the {kind.upper()} tokenizer; {advice}")
    names = " nor ".join(FILES[kind])
    raise UserError(f"{folders[0]}: neither {names} is there: not a {kind.upper()} tokenizer; {advice}")


def load_tokenizer(root: Path, kind: str) -> "PreTrainedTokenizerBase":
    from transformers import CLIPTokenizer, T5Tokenizer

    folder = tokenizer_folder(root, kind)
    loader = T5Tokenizer if kind == "t5" else CLIPTokenizer
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a {kind.upper()} tokenizer ({str(error).splitlines()[0]})") from None


def longest(folder: Path) -> int:
    """Tokens that the tokenizer in `folder` was made for, without loading it; a large number if it does not say."""
    try:
        limit = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("model_max_length")
    except (OSError, ValueError, AttributeError):
        limit = None
    return limit if type(limit) is int and limit > 0 else 1 << 30


def tokens(tokenizer: "PreTrainedTokenizerBase", text: str, length: int) -> tuple[list[int], Places, int]:
    """`length` ids, padded or cut off; where those that were not padded lie in the text; how many were cut off.

    A token that adds itself (the end) lies nowhere: (0, 0).
    """
    whole = tokenizer(text, return_offsets_mapping=True, verbose=False)
    kept = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True)
    ids = list(kept["input_ids"]) + [tokenizer.pad_token_id] * (length - len(kept["input_ids"]))
    return ids, [tuple(place) for place in kept["offset_mapping"]], len(whole["input_ids"]) - len(kept["input_ids"])
