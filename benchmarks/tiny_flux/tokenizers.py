"""Train the two tokenizers of the tiny model on its captions: T5's (sentencepiece unigram) and CLIP's (byte BPE).

Both are saved in the form in which FLUX.1's own tokenizers are published, and load through transformers.
"""

import json
from io import BytesIO
from pathlib import Path

import numpy as np

from flux_quant.benchmarks.tiny_flux.emoji import EmojiWorld

T5_VOCABULARY, CLIP_VOCABULARY = 1024, 1536
T5_LENGTH, CLIP_LENGTH = 24, 77  # padded length of T5 in training and inference; CLIP's pooled output ignores padding


def corpus(world: EmojiWorld, per_emoji: int = 30) -> list[str]:
    """Random captions, every emoji named equally often."""
    rng = np.random.default_rng(0)
    scenes = (world.sample(rng) for _ in range(per_emoji * len(world)))
    return [world.random_caption(scene, rng) for scene in scenes] + world.names * per_emoji


def train_t5(captions: list[str], folder: Path) -> None:
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        vocab_size=T5_VOCABULARY,
        model_type="unigram",
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",  # upper and lower case are one
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    write_config(folder, "T5Tokenizer", T5_LENGTH, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", extra_ids=0)


def train_clip(captions: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    write_config(folder, "CLIPTokenizer", CLIP_LENGTH, **special, pad_token="<|endoftext|>")


def write_config(folder: Path, kind: str, length: int, **settings: object) -> None:
    """tokenizer_config.json, and tokenizer.json, which loads without sentencepiece."""
    import transformers

    text = json.dumps({"tokenizer_class": kind, "model_max_length": length, **settings}, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n")
    getattr(transformers, kind).from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
