"""Prompts become what the transformer reads: T5's features of every token, and CLIP-L's one vector.

Each encoder is loaded, used for all prompts that no cache holds, and dropped before the next one comes. As in
black-forest-labs/flux `conditioner.py`: T5 is padded to a fixed length and sees its padding, CLIP's vector is the state
of its end token. Weights of a prompt act on T5's features alone, as in ComfyUI: z' = (z - z0) * weight + z0 for every
token, with z0 the features of the empty prompt at the same place. Text is cut into tokens as a whole, so that a weight
never changes them.

The cache holds encodings of plain text, and where its tokens lie; a prompt whose weights change needs no encoder.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flux_quant.converters.lora_names import CLIP_L, T5
from flux_quant.converters.lora_records import Lora
from flux_quant.errors import UserError
from flux_quant.text.encoders import Placement, clip_states, t5_states
from flux_quant.text.identity import content, identity
from flux_quant.text.prompt_cache import Entry, Key, PromptCache
from flux_quant.text.prompts import Prompt, parse
from flux_quant.text.tokenizers import load_tokenizer, longest, tokenizer_folder, tokens

LONGEST = 512  # tokens of T5; a tokenizer may have been made for fewer
CLIP_LENGTH = 77  # tokens, begin and end among them; what follows is T5's alone
VERSION = 1  # of the encodings: another number where the same prompt gives other values


@dataclass(frozen=True)
class TextOptions:
    """How prompts are encoded."""

    pad_to: int | None = None  # tokens of T5; None is what model and tokenizer were made for
    placement: Placement = Placement()
    cache: PromptCache | None = None
    loras: tuple[tuple[Lora, float], ...] = ()  # with their strengths; what changes an encoder is in its key

    def __post_init__(self) -> None:
        if self.pad_to is not None and self.pad_to < 1:
            raise UserError(f"T5 cannot be padded to {self.pad_to} tokens; at least 1 is needed")


AS_TRAINED = TextOptions()  # on the CPU, in float32, nothing kept


@dataclass(frozen=True)
class TextFeatures:
    """txt (B, T, context) in the dtype of T5's residual stream, pooled (B, pooled) float32, on the CPU."""

    txt: Tensor
    pooled: Tensor

    def __getitem__(self, rows: slice) -> "TextFeatures":
        return TextFeatures(self.txt[rows], self.pooled[rows])


def encode_t5(
    path: Path,
    tokenizers: Path,
    prompts: Sequence[str],
    options: TextOptions = AS_TRAINED,
    most: int = LONGEST,
) -> Tensor:
    """(B, T, context); T is `options.pad_to`, or what the tokenizer was made for, at most `most`."""
    folder = tokenizer_folder(tokenizers, "t5")
    length = options.pad_to or min(most, longest(folder))
    parsed = [parse(prompt) for prompt in prompts]
    empty = [""] if any(prompt.is_weighted for prompt in parsed) else []

    def run(texts: list[str]) -> list[Entry]:
        tokenizer = load_tokenizer(tokenizers, "t5")
        ids, places, cut = zip(*(tokens(tokenizer, text, length) for text in texts), strict=True)
        states = t5_states(path, torch.tensor(ids), options.placement, options.loras)
        notes = ({"places": here, "cut": left} for here, left in zip(places, cut, strict=True))
        return [Entry({"states": rows}, note) for rows, note in zip(states, notes, strict=True)]

    loras = changing(T5, options)
    key = dict(encoder="t5", length=length, precision=options.placement.precision, loras=loras)
    found = encoded([*(prompt.text for prompt in parsed), *empty], run, key, path, folder, options)
    for prompt in parsed:
        if cut := found[prompt.text].notes["cut"]:
            warnings.warn(f"T5 reads {length} tokens, the last {cut} of the prompt are cut off", stacklevel=2)
    return torch.stack([weighted(prompt, found) for prompt in parsed])


def encode_clip(path: Path, tokenizers: Path, prompts: Sequence[str], options: TextOptions = AS_TRAINED) -> Tensor:
    """(B, pooled) float32."""
    folder = tokenizer_folder(tokenizers, "clip")
    texts = [parse(prompt).text for prompt in prompts]

    def run(texts: list[str]) -> list[Entry]:
        tokenizer = load_tokenizer(tokenizers, "clip")
        ids = torch.tensor([tokens(tokenizer, text, CLIP_LENGTH)[0] for text in texts])
        return [Entry({"pooled": row}) for row in clip_states(path, ids, tokenizer.eos_token_id, options.loras)]

    key = dict(encoder="clip", length=CLIP_LENGTH, loras=changing(CLIP_L, options))
    found = encoded(texts, run, key, path, folder, options)
    return torch.stack([found[text].tensors["pooled"] for text in texts])


def changing(component: str, options: TextOptions) -> list[list[object]]:
    """Identity and strength of every LoRA that changes an encoder."""
    memory = options.cache.models if options.cache else None
    touching = ((lora, s) for lora, s in options.loras if any(r.component == component for r in lora.records))
    return [[identity(lora.path, memory), float(strength)] for lora, strength in touching if options.cache]


def weighted(prompt: Prompt, found: dict[str, Entry]) -> Tensor:
    """(T, context): the features of the plain text, every token moved away from those of the empty prompt."""
    entry = found[prompt.text]
    states = entry.tensors["states"]
    if not prompt.is_weighted:
        return states
    empty = found[""].tensors["states"].float()
    weights = torch.tensor(prompt.token_weights(entry.notes["places"]))
    weights = torch.cat([weights, torch.ones(len(states) - len(weights))])[:, None]
    moved = ((states.float() - empty) * weights + empty).to(states.dtype)
    return torch.where(weights == 1, states, finite(moved, prompt.text))


def encoded(
    texts: Iterable[str],
    run: Callable[[list[str]], list[Entry]],
    common: Key,
    path: Path,
    tokenizer: Path,
    options: TextOptions,
) -> dict[str, Entry]:
    """The entries of all texts: from the cache, and the others from `run`, which opens the encoder at `path`."""
    cache, found = options.cache, dict.fromkeys(texts)
    keys = {}
    if cache:
        common = common | dict(
            version=VERSION,
            model=identity(path, cache.models),
            tokenizer=content(tokenizer),
            products=torch.get_float32_matmul_precision(),
        )
        keys = {text: {**common, "text": text} for text in found}
        found |= {text: cache.get(key) for text, key in keys.items()}
    if missing := [text for text, entry in found.items() if entry is None]:
        for text, entry in zip(missing, run(missing), strict=True):
            for states in entry.tensors.values():
                finite(states, text)
            found[text] = entry
            if cache:
                cache.put(keys[text], entry)
    return found


def finite(states: Tensor, text: str) -> Tensor:
    """UserError for features that are no numbers: a damaged encoder, or a weight beyond all measure."""
    if not states.isfinite().all():
        raise UserError(f"the text features of the prompt {text[:40]!r} are not finite")
    return states
