"""Folders, shards, variants, pipelines, splits: which files make one model, and what is said when that is not clear."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_quant.cli import main
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.component import components, open_component
from flux_quant.converters.summary import find_checkpoints, summarize
from flux_quant.errors import UserError
from flux_quant.naming import to_diffusers

ONE = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.ones(3)}
TWO = {"b.weight": torch.arange(8.0).view(2, 4)}


def save_shards(folder: Path, parts: list[dict[str, Tensor]], name: str = "model", index: bool = True) -> list[Path]:
    paths = [folder / f"{name}-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        save_file(part, path, {"format": "pt"})
    if index:
        weight_map = {key: path.name for path, part in zip(paths, parts, strict=True) for key in part}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


def test_shards_are_one_reader(tmp_path):
    paths = save_shards(tmp_path, [ONE, TWO])
    for path in (tmp_path, *paths, tmp_path / "model.safetensors.index.json"):
        with open_checkpoint(path) as reader:
            assert reader.path == path and reader.container == "safetensors" and reader.metadata == {"format": "pt"}
            assert list(reader.tensors) == ["a.bias", "a.weight", "b.weight"]
            assert all(torch.equal(load(reader, name), tensor) for name, tensor in {**ONE, **TWO}.items())
            assert reader.nbytes("b.weight") == 32 and reader.stored_as("b.weight") == "f32"
            reader.forget("b.weight")
            assert load(reader, "b.weight")[1, 3] == 7


def with_index(change):
    def build(folder: Path) -> Path:
        save_shards(folder, [ONE, TWO])
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content)))
        return path

    return build


def renamed(content: dict, old: str, new: str) -> dict:
    return {"weight_map": {key: value.replace(old, new) for key, value in content["weight_map"].items()}}


def missing_shard(folder: Path) -> Path:
    paths = save_shards(folder, [ONE, TWO, {"c": torch.ones(1)}])
    paths[1].unlink()
    return paths[0]


def twice(folder: Path) -> Path:
    return save_shards(folder, [ONE, {"a.bias": torch.ones(3)}])[0]


def number_too_large(folder: Path) -> Path:
    save_file(ONE, folder / "model-00003-of-00002.safetensors")
    return folder / "model-00003-of-00002.safetensors"


def variants(*names: str):
    def build(folder: Path) -> Path:
        for name in names:
            save_file(ONE, folder / name)
        return folder

    return build


def empty_pipeline(folder: Path) -> Path:
    (folder / "model_index.json").write_text("{}")
    return folder


def text(content: str):
    def build(folder: Path) -> Path:
        (folder / "x.index.json").write_text(content)
        return folder / "x.index.json"

    return build


PROBLEMS = {
    "a shard is missing": (missing_shard, "1 of 3 shards are missing, the first is model-00002-of-00003.safetensors"),
    "a name in two files": (twice, "a.bias is in .* and in "),
    "number beyond the count": (number_too_large, "no shard 3 of 2"),
    "index of a missing file": (with_index(lambda c: renamed(c, "00002-of", "00009-of")), "1 of 2 files are missing"),
    "index that leads away": (with_index(lambda c: renamed(c, "model-00001", "../model-00001")), "is not beside it"),
    "index of a missing tensor": (
        with_index(lambda c: {"weight_map": {**c["weight_map"], "c": "model-00001-of-00002.safetensors"}}),
        "1 tensors of the index are in no file, c among them",
    ),
    "index without a map": (with_index(lambda c: {"metadata": {}}), "no weight_map"),
    "index of numbers": (with_index(lambda c: {"weight_map": {"a": 1}}), "no weight_map"),
    "index that is no table": (text("[]"), "not a table"),
    "index that is no JSON": (text("{"), "not JSON"),
    "index nested too deep": (text("[" * 100_000), "not JSON"),
    "nothing": (lambda folder: folder, "holds no model"),
    "two models": (variants("flux.safetensors", "other.safetensors"), "holds 2 models .*name one of the files"),
    "two variants": (variants("m.fp16.safetensors", "m.bf16.safetensors"), "m.bf16.safetensors, m.fp16.safetensors"),
    "one file and shards": (
        lambda folder: variants("model.safetensors")(save_shards(folder, [ONE, TWO], index=False)[0].parent),
        r"model.safetensors, model \(2 shards\).safetensors|model \(2 shards\).safetensors, model.safetensors",
    ),
    "pipeline without models": (empty_pipeline, "none of its folders"),
}


@pytest.mark.parametrize(("build", "message"), PROBLEMS.values(), ids=[name.replace(" ", "-") for name in PROBLEMS])
def test_what_is_said(tmp_path, build, message):
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(build(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("model.fp16.safetensors", "model.safetensors"), "model.safetensors"),
        (("model.fp16.safetensors",), "model.fp16.safetensors"),
        (("model.safetensors", "pytorch_model.bin"), "model.safetensors"),
    ],
)
def test_variants(tmp_path, names, chosen):
    for name in names:
        save_file({name: torch.ones(1)}, tmp_path / name)
    assert list(open_checkpoint(tmp_path).tensors) == [chosen]


def test_sharded_variant(tmp_path):
    """diffusers' names of a variant's shards, beside the full set; each is found by its own name."""
    save_shards(tmp_path, [ONE, TWO], "m.fp16", index=False)
    save_file({"c": torch.ones(1)}, tmp_path / "m.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["c"]
    assert len(open_checkpoint(tmp_path / "m.fp16-00002-of-00002.safetensors").tensors) == 3


# --- Pipelines --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A diffusers pipeline with the bundled model's parts: the transformer in shards, no weights elsewhere."""
    parts = find_components(BUNDLED)
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with open_checkpoint(parts.transformer) as reader:
        state = to_diffusers({name: load(reader, name).bfloat16() for name in reader.tensors})
    names = sorted(state)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae", "scheduler"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    shards = [{n: state[n].contiguous() for n in half} for half in halves]
    save_shards(folder / "transformer", shards, "diffusion_pytorch_model")
    shutil.copy(parts.clip, folder / "text_encoder" / "model.safetensors")
    shutil.copy(parts.t5, folder / "text_encoder_2" / "model.safetensors")
    shutil.copy(parts.vae, folder / "vae" / "diffusion_pytorch_model.safetensors")
    for ours, theirs in (("clip", "tokenizer"), ("t5", "tokenizer_2")):
        shutil.copytree(parts.tokenizers / ours, folder / theirs)
    return folder


def test_pipeline_is_like_an_all_in_one_file(pipeline):
    with open_checkpoint(pipeline / "model_index.json") as reader:
        found = {component.prefix: component for component in components(reader)}
        assert {prefix: component.family.name for prefix, component in found.items()} == {
            "transformer/": "FLUX.1",
            "text_encoder/": "CLIP-L",
            "text_encoder_2/": "T5 encoder",
            "vae/": "VAE",
        }
        assert not any(component.ignored for component in found.values())
        assert sum(len(component.places) for component in found.values()) < len(reader.tensors)  # qkv are joined
        name = "text_encoder_2/shared.weight"
        assert torch.equal(load(found["text_encoder_2/"], "shared.weight"), load(reader, name))


def test_every_component_of_a_pipeline(pipeline):
    bundled = find_components(BUNDLED)
    for path, family in (
        (bundled.transformer, "FLUX.1"),
        (bundled.t5, "T5 encoder"),
        (bundled.clip, "CLIP-L"),
        (bundled.vae, "VAE"),
    ):
        with open_component(path, family) as expected, open_component(pipeline, family) as found:
            assert found.tensors.keys() == expected.tensors.keys()
            for name in expected.tensors:
                assert torch.equal(load(found, name), load(expected, name)), name


def test_models_are_found_in_a_pipeline(pipeline):
    found = find_components(pipeline)
    assert found.transformer.parent == pipeline / "transformer" and found.tokenizers == pipeline
    assert (found.t5.parent, found.clip.parent) == (pipeline / "text_encoder_2", pipeline / "text_encoder")
    assert find_components(pipeline / "transformer").vae == found.vae


def test_inspect(pipeline, capsys):
    assert main(["inspect", str(pipeline), "--json"]) == 0
    found = {Path(row["path"]).name: row for row in json.loads(capsys.readouterr().out)}
    assert list(found) == ["transformer", "text_encoder", "text_encoder_2", "vae"]
    transformer = found["transformer"]
    assert (transformer["family"], transformer["naming"]) == ("FLUX.1 dev", "diffusers")
    shards = list((pipeline / "transformer").glob("*.safetensors"))
    assert transformer["bytes"] == sum(shard.stat().st_size for shard in shards) and len(shards) == 2
    assert main(["inspect", str(pipeline)]) == 0
    assert "text_encoder_2" in capsys.readouterr().out
    index = pipeline / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert main(["inspect", str(index)]) == 0
    assert "FLUX.1 dev, diffusers names" in capsys.readouterr().out


def test_each_model_is_listed_once(tmp_path, pipeline):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    save_file(ONE, tmp_path / "one.safetensors")
    save_shards(tmp_path / "deep", [ONE, TWO], "two")
    save_file(ONE, tmp_path / "deep" / "er" / "three.safetensors")
    shutil.copytree(pipeline, tmp_path / "pipe")
    torch.save(ONE, tmp_path / "deep" / "training.pt")
    found = [str(path.relative_to(tmp_path)) for path in find_checkpoints(tmp_path)]
    assert found == [
        "one.safetensors",
        "deep/two-00001-of-00002.safetensors",
        "deep/er/three.safetensors",
        *(f"pipe/{name}" for name in ("transformer", "text_encoder", "text_encoder_2", "vae")),
    ]
    assert summarize(tmp_path / found[1]).tensors == 3


# --- GGUF in parts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path) -> list[Path]:
    """Written by gguf's own splitter."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "flux", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}.weight", torch.full((4, 32), float(i)).numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return sorted(tmp_path.glob("*.gguf"))


def test_split_gguf(split):
    assert [path.name for path in split] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path in (split[0], split[2], split[0].parent):
        with open_checkpoint(path) as reader:
            assert reader.container == "GGUF" and reader.metadata["general.architecture"] == "flux"
            assert [load(reader, f"t{i}.weight")[0, 0].item() for i in range(5)] == [0, 1, 2, 3, 4]


def test_split_gguf_that_is_incomplete(split, tmp_path):
    renamed = shutil.copy(split[1], tmp_path / "other.gguf")
    with pytest.raises(UserError, match=r"part 1 \(from 0\) of 3, its name says"):
        open_checkpoint(renamed)
    shutil.copy(split[0], split[1])
    with pytest.raises(UserError, match=r"is part 0 \(from 0\) of 3"):
        open_checkpoint(split[0])
    split[2].unlink()
    with pytest.raises(UserError, match="1 of 3 shards are missing"):
        open_checkpoint(split[0])


def test_split_gguf_of_fewer_tensors(split):
    """A part of another model under the right name and number."""
    content = split[1].read_bytes()
    key = b"split.tensors.count" + (5).to_bytes(4, "little")  # an int32
    at = content.index(key) + len(key)
    split[1].write_bytes(content[:at] + (9).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(UserError, match="5 tensors in all parts where 9 are promised"):
        open_checkpoint(split[0])
