"""The training example for a few steps: factors learn, packed weights stay, files load back."""

import importlib.util
from pathlib import Path

import pytest
import torch

from flux_quant.benchmarks import machine
from flux_quant.benchmarks.bench.record import Row, read_run
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.lora_io import read_lora
from flux_quant.converters.plan import make_plan
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_flux
from flux_quant.lora import apply_, remove_, shapes_in

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_lora.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_lora", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["train_lora"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", ["q8_0", "q4_k_s"])
def test_a_few_steps(example, tmp_path, form):
    components = find_components(BUNDLED)
    run(make_plan(Conversion(components.transformer, tmp_path / "base.gguf", form)))
    model = load_flux(tmp_path / "base.gguf")
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    before = [part.clone() for layer in layers for part in layer.parts]
    data = example.make_data(model, components, example.requests_for(example.NAMES, 3, 2))
    applied, losses = example.train(model, data, 10, 2, 3, rate=1e-2)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    after = [part for layer in layers for part in layer.parts]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    tests = example.requests_for(example.TESTED, 2, 2)
    learned = example.draw(model, components, tests)[1]
    loaded = []
    for path in example.save(applied, model.config.hidden, tmp_path, "x").values():
        remove_(model)
        apply_(model, [(read_lora(path, shapes_in(model)), 1.0)])
        loaded.append(example.draw(model, components, tests)[1])
    remove_(model)
    seen = example.distance(example.draw(model, components, tests)[1], learned)
    assert seen > 0.02
    assert all(example.distance(pictures, learned) < 0.1 * seen for pictures in loaded), "but for bf16 factors"


@pytest.mark.gpu
def test_steps_on_a_device(example):
    """Of the same random numbers, with the same losses."""
    components, losses = find_components(BUNDLED), []
    for device in ("cpu", "cuda"):
        model = load_flux(components.transformer).to(device)
        data = example.make_data(model, components, example.requests_for(example.NAMES, 3, 2))
        applied, seen = example.train(model, data, 4, 2, 3, rate=1e-2)
        assert all(tensor.device.type == device for _, path in applied.paths.values() for tensor in path.tensors)
        losses.append(torch.tensor(seen))
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)


def test_colours(example):
    black, white = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    for pictures, colour in ((black, example.DARK), (white, example.LIGHT)):
        found = example.cyanotype(pictures)[0, :, 0, 0]
        torch.testing.assert_close(found, torch.tensor(colour), atol=1e-4, rtol=0)
    prompts = [request.prompt for request in example.requests_for(example.NAMES, 84, 1)]
    assert len(set(prompts)) > 60 and not any(name in prompt for name in example.TESTED for prompt in prompts)


def committed() -> dict[str, dict]:
    """Format -> the row of the newest committed result."""
    paths = machine.RESULTS.glob("cpu-*/*-train_lora.json")
    run = read_run(max(paths, key=lambda path: path.name))
    return {row.what["format"]: row for row in run.rows if row.what["steps"] == 300}


def test_the_document_has_the_committed_figures():
    text = " ".join((EXAMPLE.parents[1] / "docs" / "lora.md").read_text().split())
    rows = committed()
    q8, q4 = rows["q8_0"], rows["q4_k_s"]
    for row in (q8, q4):
        v = row.values
        assert (row.what["rank"], v["tested"]) == (8, 8) and v["rms_with_kohya"] == pytest.approx(
            v["rms_with_diffusers"], rel=1e-3
        )
    assert (
        f"then {q8.values['rms_with_kohya']:.2f} from what is wanted (root mean square, of 1), and "
        f"{q8.values['rms_without']:.2f} without the LoRA on Q8_0 ({q8.seconds():.0f} s on one core), "
        f"{q4.values['rms_with_kohya']:.2f} and {q4.values['rms_without']:.2f} on Q4_K_S ({q4.seconds():.0f} s)"
    ) in text


def test_rows_of_several_formats_stand_in_one_file(example, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--format", "q8_0", "--out", "/scratch/ann/x", "--save"])
    for name, seconds in (("q8_0", 3.0), ("q4_k_s", 4.0), ("q8_0", 5.0)):
        path = example.keep(Row({"format": name}, samples={"seconds": [seconds]}), tmp_path)
    run = read_run(path)
    assert [(row.what["format"], row.seconds()) for row in run.rows] == [("q8_0", 5.0), ("q4_k_s", 4.0)]
    assert run.command == run.rows[0].rerun == "python examples/train_lora.py --format q8_0 --save"
