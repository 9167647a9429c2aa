"""LoRAs on the engine against diffusers' transformer with PEFT: same file, same inputs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flux_quant.converters.lora_io import read_lora
from flux_quant.converters.lora_write import Factors, peft, write_lora
from flux_quant.formats import FORMATS
from flux_quant.kernels import dispatch
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_flux
from flux_quant.lora import apply_, shapes_in
from flux_quant.model import Flux, image_ids, text_ids
from flux_quant.naming import to_diffusers
from lora_checks import floats, random


def theirs(model: Flux) -> torch.nn.Module:
    """diffusers' class over the weights that our packed ones stand for."""
    from diffusers import FluxTransformer2DModel

    state = {name: p.detach() for name, p in model.named_parameters()}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            state[f"{name}.weight"] = dispatch.dequantize(layer.fmt, layer.parts, torch.float32)
    judge = FluxTransformer2DModel(**model.config.diffusers())
    judge.load_state_dict(to_diffusers(state))
    return judge.eval()


@pytest.mark.parametrize("form", ["bf16", "q8_0", "q4_k"])
@torch.no_grad()
def test_peft(tiny_flux, tiny_flux_file: Path, tmp_path: Path, form: str):
    """Every linear in split names, with an alpha that is not the rank in the header, at two strengths."""
    pytest.importorskip("peft")
    model = load_flux(tiny_flux_file)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear) and "_blocks" in name:
            weight = floats(tiny_flux)[f"{name}.weight"]
            model.set_submodule(name, QuantLinear.from_float(weight, layer.bias, FORMATS[form]))
    changes = {}
    for i, (name, shape) in enumerate(shapes_in(model).items()):
        if len(shape) == 2:
            factors = Factors(random(6, shape[1], seed=i), 0.3 * random(shape[0], 6, seed=-i))
            changes[name.removesuffix(".weight")] = factors
    path = tmp_path / "lora.safetensors"
    write_lora(path, peft(changes, model.config.hidden), "f32", {})
    judge = theirs(model)
    judge.load_lora_adapter(load_file(path), prefix="transformer", adapter_name="a")
    inputs = dict(img=random(2, 16, 64), txt=random(2, 5, model.config.context), pooled=random(2, model.config.pooled))
    times = dict(timestep=torch.tensor([0.9, 0.2]), guidance=torch.tensor([3.5, 1.0]))
    ids = dict(img_ids=image_ids(4, 4), txt_ids=text_ids(5))
    plain = model(**inputs, **times, **ids)
    for strength in (1.0, 0.4):
        judge.set_adapters("a", strength)
        expected = judge(
            inputs["img"], inputs["txt"], inputs["pooled"], **times, **ids, return_dict=False
        )[0]  # fmt: skip
        apply_(model, [(read_lora(path, shapes_in(model)), strength)])
        found = model(**inputs, **times, **ids)
        assert (found - expected).norm() <= 1e-4 * expected.norm()
        assert (found - plain).norm() > 0.05 * plain.norm()
