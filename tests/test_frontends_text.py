"""T5 and CLIP-L from any file as text encoders of pipelines: the same features, devices, dtypes, streamed."""

from pathlib import Path

import pytest
import torch
from small_device import half_memory

import flux_quant
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.errors import UserError
from flux_quant.frontends.transformers import t5_for
from flux_quant.planner.memory import Budget

FILES = find_components(BUNDLED)
PROMPT = "large red apple on a white background"
IDS = torch.arange(2, 26)[None]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def t5():
    return flux_quant.load_text_encoder(FILES.t5, device="cpu")


@pytest.mark.parametrize(
    ("component", "suffix", "name", "bound"),
    [
        ("t5", ".gguf", "q8_0", 0.05),  # llama.cpp's names
        ("t5", ".safetensors", "fp8", 0.1),
        ("t5", ".safetensors", "fp8_plain", 0.1),
        ("clip", ".safetensors", "fp8", 0.1),
    ],
    ids=str,
)
@torch.no_grad()
def test_files_of_every_kind(component: str, suffix: str, name: str, bound: float, tmp_path: Path):
    source, path = getattr(FILES, component), tmp_path / f"model{suffix}"
    run(make_plan(Conversion(source, path, name)))
    own, packed = (flux_quant.load_text_encoder(file, device="cpu") for file in (source, path))
    assert type(own).__name__ == {"t5": "T5EncoderModel", "clip": "CLIPTextModel"}[component]
    assert 0 < error(packed(IDS).last_hidden_state, own(IDS).last_hidden_state) < bound
    assert packed.config.hidden_size == own.config.hidden_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("component", ["t5", "clip"])
@torch.no_grad()
def test_casts(component: str, dtype: torch.dtype):
    """As modules of transformers are cast: by `.to`, with the dtype to be seen."""
    model = flux_quant.load_text_encoder(getattr(FILES, component), device="cpu")
    expected = model(IDS)[0]
    assert model.dtype == expected.dtype == torch.float32 and model.device.type == "cpu"
    model.to(dtype)
    assert model.dtype == dtype
    assert 0 < error(model(IDS)[0].float(), expected) < 0.05
    model.to(torch.float32)
    assert error(model(IDS)[0], expected) < 0.01, "norms and biases were rounded, weights were not"


@torch.no_grad()
def test_streamed(t5):
    """Blocks pass through the stand-in while it encodes; it is where it was moved to."""
    lines, memory = [], half_memory()
    memory.log = lines.append
    streamed = t5_for(FILES.t5, memory)
    assert len(lines) == 1 and "T5 streamed" in lines[0]
    mask = torch.ones_like(IDS)
    for _ in range(2):
        found = streamed(IDS, attention_mask=mask, output_hidden_states=True)
        expected = t5(IDS, attention_mask=mask, output_hidden_states=True)
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        assert len(found.hidden_states) == len(expected.hidden_states)
    assert memory.device.allocations, "slots"
    assert streamed.device.type == "cpu"
    streamed.to(torch.bfloat16)
    assert streamed.dtype == torch.bfloat16
    assert error(streamed(IDS)[0].float(), t5(IDS)[0]) < 0.05


@torch.no_grad()
def test_what_does_not_fit_stays_on_the_processor(t5):
    lines, memory = [], half_memory()
    memory.budget, memory.log = Budget(450_000_000, "test"), lines.append
    model = t5_for(FILES.t5, memory)
    assert torch.equal(model(IDS)[0], t5(IDS)[0]) and not memory.device.allocations
    assert len(lines) == 1 and "T5 on the processor: on the GPU it needs" in lines[0]


def test_a_pipeline_encodes_with_them(t5):
    pipe = flux_quant.pipeline(BUNDLED, device="cpu")
    expected = pipe.encode_prompt(PROMPT, PROMPT, max_sequence_length=24)
    pipe.text_encoder_2 = t5_for(FILES.t5, half_memory())
    found = pipe.encode_prompt(PROMPT, PROMPT, max_sequence_length=24)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    "blocks",
    [dict(offload_type="block_level", num_blocks_per_group=1), dict(offload_type="leaf_level")],
    ids=["blocks", "leaves"],
)
def test_offloading_in_groups(t5, blocks: dict):
    from diffusers.hooks import apply_group_offloading

    model, cpu = flux_quant.load_text_encoder(FILES.t5, device="cpu"), torch.device("cpu")
    try:
        apply_group_offloading(model, onload_device=cpu, offload_device=cpu, **blocks)
    except (AttributeError, ValueError) as refused:  # old versions of diffusers ask for an accelerator first
        pytest.skip(str(refused))
    assert torch.equal(model(IDS).last_hidden_state, t5(IDS).last_hidden_state)


@torch.no_grad()
def test_offloading_by_accelerate(t5):
    from accelerate import cpu_offload

    expected = t5(IDS)[0]
    model = flux_quant.load_text_encoder(FILES.t5, device="cpu")
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(model(IDS)[0], expected)


def test_what_is_no_text_encoder():
    with pytest.raises(UserError, match="T5 encoder or CLIP-L is needed here"):
        flux_quant.load_text_encoder(FILES.vae)
    with pytest.raises(UserError, match="T5 encoder is needed here"):
        flux_quant.load_text_encoder(FILES.clip, "t5")
    with pytest.raises(UserError, match="kind bert"):
        flux_quant.load_text_encoder(FILES.clip, "bert")
