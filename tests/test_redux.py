"""Redux: a picture as words, with diffusers' prior pipeline as the judge."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from flux_quant.cli import main
from flux_quant.components import BUNDLED
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.drawing.redux import load_image_encoder, redux_length, redux_words
from flux_quant.drawing.request import ReduxRequest, parse_redux
from flux_quant.errors import UserError

CONTEXT, WIDTH, SIDE = 128, 128, 42


def random_(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return model.eval()


def siglip() -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = dict(hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
    return random_(
        SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=SIDE, patch_size=14, vision_use_head=False))
    )


def embedder() -> nn.Module:
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    return random_(ReduxImageEncoder(WIDTH, CONTEXT))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("redux")
    values = np.random.default_rng(2).integers(0, 255, (9, 14, 3), dtype=np.uint8)
    Image.fromarray(values).resize((140, 90), Image.Resampling.BICUBIC).save(folder / "seen.png")
    save_file(embedder().state_dict(), folder / "redux.safetensors")
    state = {name.removeprefix("vision_model."): value for name, value in siglip().state_dict().items()}
    state.pop("embeddings.position_ids", None)
    save_file(state, folder / "bare.safetensors")
    save_file({f"vision_model.{name}": value for name, value in state.items()}, folder / "siglip.safetensors")
    return folder


def asked(files: Path, **changes: object) -> ReduxRequest:
    parts = dict(redux=files / "redux.safetensors", encoder=files / "siglip.safetensors", image=files / "seen.png")
    return ReduxRequest(**{**parts, **changes})


def preparation() -> type:
    """SigLIP's own, by Pillow."""
    try:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    except ImportError:
        from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor as SiglipImageProcessorPil
    return SiglipImageProcessorPil


@pytest.mark.parametrize("encoder", ["siglip", "bare"])
def test_words_are_those_of_diffusers(encoder: str, files: Path):
    from diffusers import FluxPriorReduxPipeline

    pipe = FluxPriorReduxPipeline(
        image_encoder=siglip(),
        feature_extractor=preparation()(size={"height": SIDE, "width": SIDE}),
        image_embedder=embedder(),
    )
    expected = pipe.image_embedder(pipe.encode_image(Image.open(files / "seen.png"), "cpu", 1)).image_embeds
    words = redux_words(asked(files, encoder=files / f"{encoder}.safetensors"), CONTEXT)
    assert words.shape == expected.shape == (1, 9, CONTEXT) and redux_length(asked(files)) == 9
    assert (words - expected).norm() < 1e-4 * expected.norm()
    assert torch.equal(redux_words(asked(files, weight=0.5), CONTEXT), words / 2)


def test_packed(files: Path, tmp_path: Path):
    run(make_plan(Conversion(files / "redux.safetensors", tmp_path / "redux.safetensors", "fp8")))
    exact = redux_words(asked(files), CONTEXT)
    words = redux_words(asked(files, redux=tmp_path / "redux.safetensors"), CONTEXT)
    assert 0 < (words - exact).norm() < 0.06 * exact.norm()


def test_refused(files: Path):
    with pytest.raises(UserError, match="redux.safetensors: a Redux for models that read 128 .* reads 64"):
        redux_words(asked(files), 64)
    with pytest.raises(UserError, match="no image encoder of SigLIP"):
        load_image_encoder(files / "redux.safetensors")
    with pytest.raises(UserError, match="siglip.safetensors is no model"):
        redux_words(asked(files, redux=files / "siglip.safetensors"), CONTEXT)
    for text, image, message in (
        ("r:0.5", None, "r needs a picture"),
        (None, Path("x.png"), "x.png: .* needs --redux"),
        ("r:1.2.3", Path("x.png"), "write it as FILE:WEIGHT"),
    ):
        with pytest.raises(UserError, match=message):
            parse_redux(text, image, Path("s") if image else None)
    assert parse_redux(None, None, None) is None
    found = parse_redux("C:\\r.gguf:0.5", Path("x.png"), Path("s"))
    assert (found.redux, found.weight) == (Path("C:\\r.gguf"), 0.5)


def test_a_drawing_reads_the_words(files: Path, tmp_path: Path):
    """Appended to the prompt's tokens: the picture changes with them and with their weight."""
    options = ["--prompt", "red apple", "--model", str(BUNDLED), "--steps", "2", "--size", "96x80", "--no-prompt-cache"]
    more = ["--redux-image", str(files / "seen.png"), "--image-encoder", str(files / "siglip.safetensors")]
    drawn = {}
    for name, given in {"plain": [], "full": more, "half": more}.items():
        weight = {"full": ":1.0", "half": ":0.5"}.get(name)
        redux = ["--redux", f"{files / 'redux.safetensors'}{weight}"] if weight else []
        output = tmp_path / f"{name}.png"
        assert main(["generate", *options, *given, *redux, "-o", str(output)]) == 0
        drawn[name] = np.asarray(Image.open(output)).astype(int)
    assert all(np.abs(drawn[a] - drawn[b]).mean() > 0.5 for a, b in (("plain", "full"), ("full", "half")))
    assert "redux.safetensors:0.5" in Image.open(tmp_path / "half.png").text["flux_quant"]


def test_words_are_the_text_of_diffusers(files: Path):
    """A drawing's text is T5's tokens and the picture's, of the prompt only."""
    from flux_quant.components import find_components
    from flux_quant.drawing.given import Given
    from flux_quant.drawing.request import Request
    from flux_quant.generation import encode, make_drawing
    from flux_quant.loading import load_flux

    bundled = find_components(BUNDLED)
    requests = [Request("red apple", negative="octopus", cfg=2.0), Request("octopus")]
    features = encode(bundled, requests, guided=True)
    words = redux_words(asked(files), CONTEXT)
    config = load_flux(bundled.transformer).config
    drawing = make_drawing(requests[:1], config, features, given=Given(words=words))
    assert torch.equal(drawing.text.txt, torch.cat([features.txt[:1], words], dim=1))
    assert torch.equal(drawing.negative.txt, features.txt[1:])
