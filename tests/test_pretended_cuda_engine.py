"""Everything that draws, on the pretended CUDA device, against the processor: whole, streamed, through frontends.

What is found: tensors left on the processor, dtypes that meet, calls of CUDA's functions that torch refuses, branches
for CUDA that nothing else runs. Triton is switched off but where its kernels, interpreted, are looked at.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pretended_cuda import pretended_cuda
from pretended_cuda_runtime import Runtime
from small_device import HalfMemory
from test_frontends_generic import made, t5
from test_lora_runtime import everywhere, saved

import flux_quant
import side_paths
from flux_quant import model as engine
from flux_quant import runtime as low_vram
from flux_quant.components import BUNDLED, find_components
from flux_quant.drawing.request import Request
from flux_quant.drawing.schedules import SCHEDULES
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.frontends.transformers import t5_for
from flux_quant.generation import choose_device, generate, previewer
from flux_quant.kernels import dispatch, tables
from flux_quant.kernels.fallback import SWITCH
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_flux, load_t5
from flux_quant.lora import apply_, remove_
from flux_quant.planner import doctor, rates
from flux_quant.planner.gpus import find_gpu
from given_files import PROMPT, SIZE, control, write_files
from lora_checks import HIDDEN, floats, random, reader, shapes_of

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
    pytest.mark.filterwarnings("ignore"),
]
COMPONENTS = find_components(BUNDLED)
ASKED = dict(prompt=PROMPT, size=(64, 48), steps=2, seed=4)
EFFORT = rates.Effort(seconds=0.0, cpu_side=16, copy_bytes=1 << 14, disk_bytes=1 << 14)
LAYER = dict(M=32, K=64, N=48, FLUX_TOKENS=8)
ROUNDED, ROUGH = 3, 16  # of 255, on average: activations in bfloat16, products of 8 bits


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SWITCH, "1")
    for name, value in LAYER.items():
        monkeypatch.setattr(rates, name, value)
    monkeypatch.setattr(low_vram, "diagnose", lambda: doctor.diagnose(effort=EFFORT))
    with pretended_cuda() as runtime:
        yield runtime


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_files(tmp_path_factory.mktemp("given"))
    saved(folder, everywhere(load_flux(COMPONENTS.transformer), size=0.02))
    return folder


def given(files: Path, mask: bool = False, **more: object) -> dict[str, object]:
    return dict(image=files / "given.png", mask=files / "mask.png" if mask else None, size=SIZE, **more)


DRAWINGS: dict[str, Callable[[Path], dict[str, object]]] = {
    **{name: lambda _, name=name: dict(scheduler=name) for name in SCHEDULES},
    "negative, two seeds": lambda _: dict(negative="cat", cfg=2.0, seeds=(1, 2)),
    "weighted words": lambda _: dict(prompt="large (red:1.4) apple"),
    "image to image": lambda files: given(files, strength=0.6),
    "mask": lambda files: given(files, mask=True, denoise=0.8),
    "reference": lambda files: dict(reference=files / "given.png"),
    "controlnet": lambda files: dict(controls=(control(files, scale=0.4),), size=SIZE),
    "union, half of the steps": lambda files: dict(controls=(control(files, "union", mode="tile", span=(0.0, 0.5)),)),
    "inpainting net": lambda files: given(files, mask=True, controls=(control(files, "inpainting", image=None),)),
    "lora": lambda files: dict(loras=((files / "lora.safetensors", 0.7),)),
}


def pixels(result: object) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images]).astype(int)


def apart(found: object, expected: object) -> float:
    return np.abs(pixels(found) - pixels(expected)).mean()


@pytest.mark.parametrize("name", DRAWINGS)
def test_pictures_are_those_of_the_processor(name: str, card: Runtime, files: Path):
    request = Request(**{**ASKED, **DRAWINGS[name](files)})
    expected = generate(COMPONENTS, request)
    assert apart(generate(COMPONENTS, request, "cuda"), expected) < 0.1
    if name == "lora":
        assert apart(generate(COMPONENTS, replace(request, loras=()), "cuda"), expected) > 0.1
    place, dtype = choose_device("auto")
    assert (place.type, dtype) == ("cuda", torch.bfloat16)
    assert apart(generate(COMPONENTS, request, place, dtype), expected) < ROUNDED


def test_a_tensor_left_on_the_processor_is_found(card: Runtime, monkeypatch: pytest.MonkeyPatch):
    from flux_quant.drawing import sampling

    monkeypatch.setattr(sampling, "text_ids", lambda tokens, device: engine.text_ids(tokens))
    with pytest.raises(RuntimeError, match="same device"):
        generate(COMPONENTS, Request(**ASKED), "cuda")


def test_previews(card: Runtime, tmp_path: Path):
    generate(COMPONENTS, Request(**ASKED), "cuda", callback=previewer(tmp_path / "seen.png", COMPONENTS.vae))
    assert (tmp_path / "seen.png").exists()


def memory_of(half: bool = True, vram: str | None = "6GB") -> low_vram.Memory:
    """Of a card as fast as a real one, so that T5 goes there; half of the blocks stream."""
    memory = low_vram.Memory.of(choose_device("cuda")[0], vram, "2GB", lambda line: None)
    fast = replace(find_gpu("rtx-4090").machine(), total=memory.machine.total, usable=memory.machine.usable)
    fields = {**vars(memory), "machine": fast}
    return (HalfMemory if half else low_vram.Memory)(**fields)


@pytest.mark.parametrize("compute", ["16-bit", "int8", "fp8"])
def test_streamed_pictures(compute: str, card: Runtime):
    request = Request(**ASKED)
    expected = generate(COMPONENTS, request)
    result = generate(COMPONENTS, request, "cuda", torch.bfloat16, memory=memory_of(), compute=compute)
    assert apart(result, expected) < (ROUNDED if compute == "16-bit" else ROUGH)
    assert result.metrics["loads"] > 8 and result.metrics["misses"] == 0 and result.metrics["pinned_bytes"]
    assert not card.pinned, "registered memory is given back"
    assert card.fraction == 1.0


def test_a_card_that_is_full_gets_a_smaller_plan(card: Runtime, monkeypatch: pytest.MonkeyPatch):
    memory, take, refused = memory_of(half=False, vram=None), card.take, []

    def full(nbytes: int) -> torch.Tensor:
        if memory.readings.now() > low_vram.CONTEXT + (8 << 20) and len(refused) < 2 and nbytes > 1_500_000:
            refused.append(nbytes)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return take(nbytes)

    monkeypatch.setattr(card, "take", full)
    request = Request(**ASKED)
    result = generate(COMPONENTS, request, "cuda", torch.float32, memory=memory)
    assert len(refused) == 2 and len(result.metrics["changes"]) == 2
    assert apart(result, generate(COMPONENTS, request)) < ROUNDED


def test_pipelines_of_diffusers(card: Runtime):
    def drawn(**how: object) -> np.ndarray:
        pipe = flux_quant.pipeline(BUNDLED, dtype=torch.float32, **how)
        pipe.set_progress_bar_config(disable=True)
        pipe = pipe.to("cuda") if how == {} else pipe
        generator = torch.Generator().manual_seed(4)
        return pixels(pipe(PROMPT, height=48, width=64, num_inference_steps=2, generator=generator))

    expected = drawn(device="cpu")
    for how in ({}, {"vram": "4GB"}):
        assert np.abs(drawn(**how) - expected).mean() < 0.1


def test_saved_transformers_are_read_to_a_device(card: Runtime, tmp_path: Path):
    transformer = flux_quant.load(COMPONENTS.transformer, device="cuda")
    transformer.to("cuda").save_pretrained(tmp_path)
    for where in ("cuda", torch.device("cuda", 0), {"": "cuda:0"}, "auto"):
        found = type(transformer).from_pretrained(tmp_path, device_map=where).state_dict()
        assert all(found[name].is_cuda and found[name].equal(x) for name, x in transformer.state_dict().items())
    with pytest.raises(UserError, match="as a whole"):
        type(transformer).from_pretrained(tmp_path, device_map={"single_blocks": "cuda", "double_blocks": "cpu"})


def test_text_encoders(card: Runtime):
    words = torch.arange(1, 8)[None]
    expected = load_t5(COMPONENTS.t5)(words)[0]
    for budget in ("6GB", "450MB"):  # it streams, or stays in RAM and works there
        encoder, before = t5_for(COMPONENTS.t5, memory_of(half=False, vram=budget)).cuda(), card.total
        for ids in (words, words.cuda()):
            found = encoder(ids)[0]
            assert found.device == ids.device and encoder.device.type == "cuda"
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
        assert (card.total - before > 1 << 20) == (budget == "6GB")
    for kind in ("t5", "clip"):
        encoder = flux_quant.load_text_encoder(getattr(COMPONENTS, kind), kind).cuda()
        assert encoder(words.cuda())[0].dtype == torch.bfloat16


def test_other_models(card: Runtime):
    model, call = made(t5)
    flux_quant.quantize_(model, "q8_0")
    expected, words = call(model), torch.arange(12, device="cuda")[None]
    with flux_quant.stream_(model, vram="3GB"):
        torch.testing.assert_close(model(words)[0].cpu(), expected, rtol=1e-4, atol=1e-4)
    assert not any(tensor.is_cuda for tensor in model.state_dict().values())


def test_doctor(card: Runtime, tmp_path: Path):
    report = doctor.diagnose(tmp_path, effort=EFFORT)
    assert report.gpu.capability == (9, 0) and SWITCH in report.gpu.triton
    assert set(report.gpu.flops) == {"fp16", "bf16", "int8", "fp8"}
    assert doctor.diagnose(tmp_path).gpu.total == report.gpu.total
    assert doctor.lines_of(report) and doctor.machine_of(report).usable == report.gpu.free


LORAS = side_paths.KINDS | {  # the layer that is looked at, tensors of the file
    "norm": (side_paths.QKV, {"lora_unet_double_blocks_0_img_attn_norm_key_norm.w_norm": random(128)}),
}


@pytest.mark.parametrize("form", ["bf16", "q4_0 planar", "q4_k as int8"])
@torch.no_grad()
def test_loras_go_and_leave_with_the_model(form: str, card: Runtime, tiny_flux: dict, tmp_path: Path):
    """Put on before the model moves or after it, taken off where it is then."""
    state = floats(tiny_flux)
    read, model = reader(tmp_path, shapes_of(state)), side_paths.built(state, form)
    for name, (module, tensors) in LORAS.items():
        lora, layer = read(tensors), model.get_submodule(module)
        x = random(2, 5, HIDDEN, seed=3)
        plain = layer(x)
        apply_(model, [(lora, 0.7)])
        expected = layer(x)
        model.cuda()
        moved = layer(x.cuda())
        remove_(model)
        assert all(tensor.is_cuda for tensor in model.state_dict().values()), name
        apply_(model, [(lora, 0.7)], dtype=torch.float32)
        for found in (moved, layer(x.cuda())):
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-2 if "int8" in form else 1e-4, atol=1e-4)
        model.cpu()
        remove_(model)
        assert torch.equal(layer(x), plain), name


PATHS = {1: tables.VECTOR, 16: tables.FUSED, 600: tables.TWO_PASS}  # rows of input: where they go on a Hopper


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "fp8"])
def test_layers_take_the_way_of_a_hopper(name: str, card: Runtime, monkeypatch: pytest.MonkeyPatch):
    """By Triton's interpreter, which multiplies no bfloat16."""
    pytest.importorskip("triton")
    monkeypatch.delenv(SWITCH)
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(1)) / 16
    layer = QuantLinear.from_float(weight, torch.ones(32), FORMATS[name]).repack_()
    expected = {rows: layer(torch.ones(rows, 256, dtype=torch.float16)) for rows in PATHS}
    layer.cuda()
    for rows, path in PATHS.items():
        x = torch.ones(rows, 256, dtype=torch.float16, device="cuda")
        assert dispatch.way_for(layer.fmt, rows, (32, 256), x.dtype, x.device, layer.parts).path == path
        torch.testing.assert_close(layer(x).cpu(), expected[rows], rtol=0.02, atol=0.02)
    assert not dispatch.fallback.failures()
