"""All-in-one files, parts and pipeline folders, judged by safetensors, transformers and diffusers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.bundle import merge, merge_folder, split
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.component import components
from flux_quant.converters.container import as_bytes
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.errors import UserError

PARTS = find_components(BUNDLED)
SOURCES = [PARTS.transformer, PARTS.t5, PARTS.clip, PARTS.vae]
PREFIXES = ("model.diffusion_model.", "text_encoders.t5xxl.transformer.", "text_encoders.clip_l.transformer.", "vae.")


def convert(source: Path, target: Path, format_name: str, **options: object) -> Path:
    run(make_plan(Conversion(source, target, format_name, **options)))
    return target


def same_model(one: Path, other: Path, family: str) -> None:
    """Every weight of a family, bit for bit in float32."""
    a, b = (next(c for c in components(open_checkpoint(path)) if c.family.name == family) for path in (one, other))
    assert set(a.tensors) == set(b.tensors)
    for name in a.tensors:
        assert torch.equal(load(a, name), load(b, name)), name


def test_there_and_back(tmp_path):
    fp8 = convert(PARTS.transformer, tmp_path / "fp8.safetensors", "fp8")
    written = merge([PARTS.vae, fp8, PARTS.clip, PARTS.t5], tmp_path / "all.safetensors", force=False)
    stored = load_file(written.path)
    assert all(name.startswith(PREFIXES) for name in stored)
    originals = load_file(fp8)
    for name, tensor in originals.items():
        found = stored[PREFIXES[0] + name]
        assert found.dtype == tensor.dtype and torch.equal(as_bytes(found), as_bytes(tensor)), name
    parts = split(written.path, tmp_path / "parts", force=False)
    assert [part.path.name for part in parts] == [
        "transformer.safetensors",
        "t5xxl.safetensors",
        "clip_l.safetensors",
        "ae.safetensors",
    ]
    assert sum(part.tensors for part in parts) == written.tensors
    assert {n: t.shape for n, t in load_file(parts[0].path).items()} == {n: t.shape for n, t in originals.items()}
    for part, source in zip(parts, [fp8, *SOURCES[1:]], strict=True):
        same_model(part.path, source, part.family)


def test_a_gguf_part_stays_gguf(tmp_path):
    q8 = convert(PARTS.transformer, tmp_path / "q8.gguf", "q8_0")
    (part,) = split(q8, tmp_path / "parts", force=False)
    assert part.path.name == "transformer.gguf"
    same_model(part.path, q8, "FLUX.1")
    with pytest.raises(UserError, match="q8_0 cannot be stored as safetensors"):
        merge([q8, PARTS.vae], tmp_path / "all.safetensors", force=False)
    assert not (tmp_path / "all.safetensors").exists()


def test_pipeline_folder(tmp_path):
    """diffusers and transformers load every part; ours finds the same weights in it; and it can be merged again."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    folder = tmp_path / "pipeline"
    written = merge_folder(SOURCES, folder, PARTS.tokenizers, force=False)
    assert written.bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    pipeline = diffusers.FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert isinstance(pipeline.text_encoder_2, transformers.T5EncoderModel)
    for family, source in zip(("FLUX.1", "T5 encoder", "CLIP-L", "VAE"), SOURCES, strict=True):
        same_model(folder, source, family)
    with open_checkpoint(PARTS.vae) as reader:
        norm = load(reader, "decoder.norm_out.weight")
    assert torch.equal(pipeline.vae.decoder.conv_norm_out.weight, norm)
    merge([folder], tmp_path / "again.safetensors", force=False)
    same_model(tmp_path / "again.safetensors", PARTS.clip, "CLIP-L")
    with pytest.raises(UserError, match="exists and is not empty"):
        merge_folder(SOURCES, folder, PARTS.tokenizers, force=False)
    merge_folder(SOURCES, folder, folder, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "pipeline"]


MISTAKES = {
    "twice": (lambda d: merge([PARTS.vae, PARTS.vae], d / "x.safetensors", False), "both hold a VAE"),
    "container": (lambda d: merge([PARTS.vae], d / "x.gguf", False), "all-in-one files are .safetensors"),
    "incomplete": (lambda d: merge_folder(SOURCES[:3], d / "x", PARTS.tokenizers, False), "missing: vae"),
    "no tokenizers": (lambda d: merge_folder(SOURCES, d / "x", None, False), "needs tokenizers"),
    "wrong tokenizers": (lambda d: merge_folder(SOURCES, d / "x", BUNDLED, False), "holds no folder clip or tokenizer"),
}


@pytest.mark.parametrize(("work", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_leave_nothing(tmp_path, work, message):
    with pytest.raises(UserError, match=message):
        work(tmp_path)
    assert not list(tmp_path.iterdir())
