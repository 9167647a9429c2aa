"""T5's vocabulary as GGUF holds it, from `spiece.model` or `tokenizer.json`.

`spiece.model` (a sentencepiece model, a protobuf) is the original. `tokenizer.json` says the same in Hugging Face's
words and has the 100 added tokens `<extra_id_0>` ... among its entries; where both are there, the first is read.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flux_quant.errors import UserError

FILES = ("spiece.model", "tokenizer.model", "tokenizer.json")  # in a folder, in this order
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # the same numbers in sentencepiece and in GGUF
UNIGRAM = 1  # the kind of sentencepiece model that llama.cpp calls "t5"
ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0
SPECIAL = {"<pad>": "padding", "</s>": "eos", "<unk>": "unknown"}  # how GGUF's keys call them


@dataclass(frozen=True)
class Vocabulary:
    """Token number i is `tokens[i]`; scores are log probabilities; types are those of sentencepiece."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    special: Mapping[str, int]  # "eos", "padding", "unknown" -> number of the token
    charsmap: bytes  # the compiled normalization; empty if there is none
    add_space_prefix: bool
    remove_extra_whitespaces: bool

    def metadata(self, rows: int) -> dict[str, object]:
        """The keys `tokenizer.ggml.*`, for an embedding of `rows` rows: tokens that are missing become `[PADn]`."""
        missing = range(len(self.tokens), rows)
        keys: dict[str, object] = {
            "model": "t5",
            "pre": "default",
            "tokens": self.tokens + [f"[PAD{i}]" for i in missing],
            "scores": np.array(self.scores + [PADDING_SCORE] * len(missing), np.float32),
            "token_type": np.array(self.types + [UNUSED] * len(missing), np.int32),
            "add_space_prefix": self.add_space_prefix,
            "remove_extra_whitespaces": self.remove_extra_whitespaces,
        }
        if self.charsmap:
            keys["precompiled_charsmap"] = np.frombuffer(self.charsmap, np.uint8)
        keys |= {f"{name}_token_id": number for name, number in self.special.items()}
        keys |= {"add_bos_token": False, "add_eos_token": True}
        return {f"tokenizer.ggml.{key}": content for key, content in keys.items()}


def read_vocabulary(path: Path) -> Vocabulary:
    """From one of FILES, or from a folder that holds one. UserError if it is none."""
    if path.is_dir():
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{path} holds no T5 tokenizer: neither {' nor '.join(FILES)} is there")
        path = found
    try:
        return from_json(path) if path.suffix == ".json" else from_sentencepiece(path)
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None


def from_sentencepiece(path: Path) -> Vocabulary:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise UserError(f"{path} is no sentencepiece model, or damaged") from None
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if not model.pieces or trainer.model_type != UNIGRAM:
        raise UserError(f"{path} is no unigram model of sentencepiece, which T5's tokenizer is")
    ids = {"eos": trainer.eos_id, "padding": trainer.pad_id, "unknown": trainer.unk_id}
    return Vocabulary(
        tokens=[piece.piece for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        types=[piece.type for piece in model.pieces],
        special={name: number for name, number in ids.items() if number >= 0},
        charsmap=normalizer.precompiled_charsmap,
        add_space_prefix=normalizer.add_dummy_prefix,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
    )


def from_json(path: Path) -> Vocabulary:
    try:
        content = json.loads(path.read_bytes())
        model = content["model"]
        if model["type"] != "Unigram":
            raise UserError(f"{path} is a {model['type']} tokenizer; T5's is Unigram")
        entries = [(str(token), float(score)) for token, score in model["vocab"]]
        added = {str(entry["content"]) for entry in content.get("added_tokens") or ()}
        normalizers, splitters = steps(content["normalizer"]), steps(content["pre_tokenizer"])
        charsmaps = [step["precompiled_charsmap"] for step in normalizers if step["type"] == "Precompiled"]
        spaces = [step for step in splitters if step["type"] == "Metaspace"]
        prefix = any(step.get("prepend_scheme", "always") != "never" for step in spaces)
        charsmap = base64.b64decode(charsmaps[0]) if charsmaps else b""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no tokenizer of Hugging Face's tokenizers library, or damaged") from None
    tokens = [token for token, _ in entries]
    extra = {token for token in added if token not in SPECIAL}
    types = {"<unk>": UNKNOWN, "<pad>": CONTROL, "</s>": CONTROL, **dict.fromkeys(extra, USER_DEFINED)}
    return Vocabulary(
        tokens=tokens,
        scores=[ADDED_SCORE if token in extra else score for token, score in entries],
        types=[types.get(token, NORMAL) for token in tokens],
        special={name: tokens.index(token) for token, name in SPECIAL.items() if token in tokens},
        charsmap=charsmap,
        add_space_prefix=prefix,
        remove_extra_whitespaces=True,  # what its splitting at white space comes to
    )


def steps(part: Mapping) -> list[Mapping]:
    """A normalizer or pre-tokenizer, which may be a sequence of them."""
    return part.get("normalizers") or part.get("pretokenizers") or [part]
