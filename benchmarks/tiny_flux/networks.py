"""What is trained in the tiny model: the transformer and both text encoders, and a help for these encoders.

FLUX.1's text encoders know the world before its transformer is trained. These here start from nothing, so each step
also teaches them, from captions alone, what an emoji looks like: a linear map of CLIP's vector, and one of T5's mean,
must give the latents of its plain picture (`Appearance`; not part of the shipped model).
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from flux_quant.arch import FluxConfig
from flux_quant.benchmarks.tiny_flux.tokenizers import CLIP_LENGTH, CLIP_VOCABULARY, T5_LENGTH, T5_VOCABULARY
from flux_quant.components import find_components
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.model import Flux, image_ids, text_ids

GRID = (6, 6)  # 2 x 2 latent patches of a 96-pixel picture
WIDTH = 128  # of both text encoders
CONFIG = FluxConfig(
    in_channels=64,
    out_channels=64,
    hidden=256,
    head_dim=64,
    mlp=1024,
    context=WIDTH,
    pooled=WIDTH,
    double_blocks=2,
    single_blocks=5,
    guidance=True,
)
T5_CONFIG = T5Config(
    vocab_size=T5_VOCABULARY,
    d_model=WIDTH,
    d_kv=32,
    num_heads=4,
    d_ff=256,
    num_layers=2,
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
    pad_token_id=0,
    eos_token_id=1,
    use_cache=False,
)
CLIP_CONFIG = CLIPTextConfig(
    vocab_size=CLIP_VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=2 * WIDTH,
    num_attention_heads=2,
    num_hidden_layers=2,
    max_position_embeddings=CLIP_LENGTH,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


class Bundle(nn.Module):
    """Everything that is trained here: captions and noisy latents in, velocity out."""

    def __init__(self, tokenizers: Path) -> None:
        super().__init__()
        self.flux = Flux(CONFIG)
        self.t5 = T5EncoderModel(T5_CONFIG)
        self.clip = CLIPTextModel(CLIP_CONFIG)
        self.tokenizers = (
            T5Tokenizer.from_pretrained(tokenizers / "t5"),
            CLIPTokenizer.from_pretrained(tokenizers / "clip"),
        )
        zero_outputs(self.flux)

    def __deepcopy__(self, memo: dict) -> "Bundle":
        raise TypeError("tokenizers do not copy; make a second Bundle and load the state")

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids for T5 (B, 24) and, padded to the longest only (its pooled output does not see padding), CLIP."""
        t5, clip = self.tokenizers
        padded = t5(captions, padding="max_length", max_length=T5_LENGTH, truncation=True, return_tensors="pt")
        return padded.input_ids, clip(captions, padding=True, truncation=True, return_tensors="pt").input_ids

    @property
    def device(self) -> torch.device:
        return self.flux.img_in.weight.device

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """T5 features (B, 24, 128) and the CLIP vector (B, 128)."""
        return self.features(*(ids.to(self.device) for ids in self.tokens(captions)))

    def features(self, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        """As `encode`, of tokens."""
        return self.t5(t5_ids).last_hidden_state, self.clip(clip_ids).pooler_output

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor], t: Tensor, guidance: Tensor) -> Tensor:
        ids = image_ids(*GRID, device=x.device), text_ids(T5_LENGTH, device=x.device)
        return self.flux(x, *text, t, *ids, guidance)


def shipped_state(folder: Path) -> dict[str, Tensor]:
    """The weights of a model folder that `export` made, in a Bundle's names."""
    components = find_components(folder)
    state = {}
    for prefix, path in {"flux.": components.transformer, "t5.": components.t5, "clip.": components.clip}.items():
        with open_checkpoint(path) as reader:
            state |= {prefix + name.removeprefix("text_model."): load(reader, name) for name in reader.tensors}
    return state | {"t5.encoder.embed_tokens.weight": state["t5.shared.weight"]}


class Appearance(nn.Module):
    """What the text features should tell linearly: the latents of the emoji, large, upright, on white."""

    def __init__(self, targets: Tensor) -> None:
        """targets (emoji, 36 * 64), their mean taken away."""
        super().__init__()
        self.register_buffer("targets", targets, persistent=False)
        self.from_t5 = nn.Linear(WIDTH, targets.shape[1])
        self.from_clip = nn.Linear(WIDTH, targets.shape[1])

    def loss(self, text: tuple[Tensor, Tensor], emoji: Tensor) -> Tensor:
        wanted = self.targets[emoji]
        guesses = self.from_t5(text[0].mean(dim=1)), self.from_clip(text[1])
        return sum((guess - wanted).square().mean() for guess in guesses)


def zero_outputs(flux: Flux) -> None:
    """Start every block as the identity and the output at zero."""
    for name, module in flux.named_modules():
        if name.endswith(("mod.lin", "modulation.lin", "adaLN_modulation.1")) or name == "final_layer.linear":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
