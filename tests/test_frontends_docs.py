"""The Python of docs/diffusers.md runs: with the bundled model under the names that the page uses."""

import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from test_frontends_lora import write_lora

import flux_quant
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan

PAGE = Path(__file__).parents[1] / "docs" / "diffusers.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the page names."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    files = find_components(BUNDLED)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BUNDLED, "ComfyUI/models")
    run(make_plan(Conversion(files.transformer, Path("flux1-dev-Q4_K_S.gguf"), "q4_k_s")))
    run(make_plan(Conversion(files.t5, Path("t5-v1_1-xxl-encoder-Q8_0.gguf"), "q8_0")))
    flux_quant.pipeline(BUNDLED, device="cpu", dtype=torch.float32).save_pretrained("FLUX.1-dev")
    small = dict(num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2)
    own = FluxTransformer2DModel(**small, axes_dims_rope=(4, 14, 14), joint_attention_dim=32, pooled_projection_dim=32)
    own.save_pretrained("FLUX.1-dev/own")
    T5EncoderModel(T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2)).save_pretrained(
        "FLUX.1-dev/text_encoder_2"
    )
    write_lora(Path("style.safetensors"), 0)
    whole = FluxPipeline.__call__

    def at_once(self, prompt: str, num_inference_steps: int) -> object:
        """One small picture in two steps."""
        assert num_inference_steps == 20
        return whole(self, prompt, num_inference_steps=2, width=96, height=96, max_sequence_length=24)

    monkeypatch.setattr(FluxPipeline, "__call__", at_once)
    return tmp_path


@pytest.mark.slow
def test_the_page_runs(folder: Path):
    names: dict[str, object] = {}
    assert len(blocks()) == 5
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="vram=")
        for block in blocks():
            exec(compile(block, str(PAGE), "exec"), names)
    assert names["image"].size == (96, 96)
    assert sorted(path.name for path in (folder / "packed").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_public_names_are_on_the_page():
    text = PAGE.read_text()
    assert all(f"{name}" in text for name in flux_quant.__all__ if name != "UserError")
