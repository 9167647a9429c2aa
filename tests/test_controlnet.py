"""ControlNets on our blocks: diffusers as the judge, packed files, blocks without use, and nets that do not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from control_nets import (
    BASE,
    NETS,
    condition,
    diffusers_net,
    in_diffusers_names,
    inputs,
    randomise,
    relative_error,
    residuals_of,
    saved,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux_quant.arch import FluxConfig
from flux_quant.controlnet import Control, Joined, combined, live, turns
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.errors import UserError
from flux_quant.loading import load_controlnet
from flux_quant.model import Flux, Residuals
from flux_quant.naming import from_stored, gather, to_diffusers

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")  # within diffusers


@pytest.fixture(scope="module")
def engine() -> Flux:
    return randomise(Flux(BASE), seed=1)


@pytest.fixture(scope="module")
def judge(engine: Flux) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(**BASE.diffusers()).eval()
    model.load_state_dict(to_diffusers(engine.state_dict()))
    return model


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_a_net_and_its_effect_are_those_of_diffusers(name: str, engine: Flux, judge: nn.Module, tmp_path: Path):
    theirs = diffusers_net(**NETS[name])
    ours = load_controlnet(saved(theirs, tmp_path), BASE)
    x, cond, mode = inputs(), condition(), 4 if "num_mode" in NETS[name] else None
    given = in_diffusers_names(x)
    guidance = given if "guidance_embeds" in NETS[name] else {**given, "guidance": None}
    samples = theirs(
        controlnet_cond=cond,
        controlnet_mode=None if mode is None else torch.full((2, 1), mode),
        conditioning_scale=0.7,
        **guidance,
    )
    assert samples.controlnet_block_samples[0].norm() > 1
    expected = judge(
        **given,
        controlnet_block_samples=samples.controlnet_block_samples,
        controlnet_single_block_samples=samples.controlnet_single_block_samples,
    ).sample
    found = engine(**x, residuals=residuals_of(ours, x, cond, 0.7, mode))
    assert relative_error(found, expected) < 1e-5
    assert relative_error(engine(**x), expected) > 0.01, "the net has an effect"


@pytest.mark.parametrize(
    ("blocks", "outputs", "repeats", "used"),
    [
        (19, 6, False, 5), (19, 5, False, 5), (38, 10, False, 10), (19, 19, False, 19), (19, 1, False, 1),
        (19, 2, True, 2), (19, 0, False, 0), (7, 9, False, 7), (7, 9, True, 7), (7, 5, False, 4), (0, 3, False, 0),
    ],
)  # fmt: skip
def test_blocks_without_use(blocks: int, outputs: int, repeats: bool, used: int):
    assert live(blocks, outputs, repeats) == used
    if used:
        every = turns(blocks, outputs, repeats)
        assert set(every) == set(range(used)) and every == turns(blocks, used, repeats)


@torch.no_grad()
def test_the_sixth_block_is_never_loaded(engine: Flux, tmp_path: Path):
    """In a model of 7 double blocks as in FLUX.1's 19, 6 residuals leave some unread: here 2, there 1."""
    path = saved(diffusers_net(**NETS["6 + 0"]), tmp_path)
    net = load_controlnet(path, BASE)
    assert (len(net.double_blocks), len(net.controlnet_blocks)) == (4, 4)
    tensors = load_file(path)
    for name in tensors:
        if name.startswith(("transformer_blocks.4.", "transformer_blocks.5.", "controlnet_blocks.4.")):
            tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, tmp_path / "dead.safetensors")
    dead = load_controlnet(tmp_path / "dead.safetensors", BASE)
    x, cond = inputs(), condition()
    outputs = [engine(**x, residuals=residuals_of(one, x, cond)) for one in (net, dead)]
    assert torch.equal(*outputs) and outputs[0].isfinite().all()
    full = replace(BASE, double_blocks=19)
    assert len(load_controlnet(path, full).double_blocks) == 5


@torch.no_grad()
def test_single_blocks_need_all_double_ones(tmp_path: Path):
    net = load_controlnet(saved(diffusers_net(num_layers=6, num_single_layers=2), tmp_path), BASE)
    assert (len(net.double_blocks), len(net.controlnet_blocks), len(net.single_blocks)) == (6, 4, 2)


def in_xlabs_names(net: nn.Module) -> dict[str, Tensor]:
    """From diffusers' names, by hand where XLabs has another word."""
    state = net.state_dict()
    names = {"controlnet_x_embedder": "pos_embed_input"}
    names |= {"input_hint_block.conv_in": "input_hint_block.0", "input_hint_block.conv_out": "input_hint_block.14"}
    names |= {f"input_hint_block.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(6)}
    places = from_stored("FLUX.1", "diffusers", {name: tuple(x.shape) for name, x in state.items()})
    out = {name: gather(place, state).contiguous() for name, place in places.items()}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        if name.startswith(("controlnet_", "input_hint_block")):
            out[f"{names.get(module, module)}.{kind}"] = value
    return out


@pytest.mark.parametrize("naming", ["diffusers", "XLabs"])
@torch.no_grad()
def test_nets_that_see_pixels(naming: str, engine: Flux, judge: nn.Module, tmp_path: Path):
    """XLabs': a hint in pixels, residuals that take turns."""
    theirs = diffusers_net(
        num_layers=2, num_single_layers=0, guidance_embeds=True, conditioning_embedding_channels=16, patch_size=2
    )
    save_file(theirs.state_dict() if naming == "diffusers" else in_xlabs_names(theirs), tmp_path / "net.safetensors")
    net = load_controlnet(tmp_path / "net.safetensors", BASE)
    assert (len(net.double_blocks), net.config.from_pixels, net.config.repeats) == (2, True, True)
    x, hint = inputs(), torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(1)) * 2 - 1
    given = in_diffusers_names(x)
    samples = theirs(controlnet_cond=hint, **given).controlnet_block_samples
    expected = judge(**given, controlnet_block_samples=samples, controlnet_blocks_repeat=True).sample
    found = engine(**x, residuals=residuals_of(net, x, net.tokens(hint)))
    assert relative_error(found, expected) < 1e-5
    assert relative_error(engine(**x), expected) > 0.01


@pytest.mark.parametrize("naming", ["diffusers", "XLabs"])
@torch.no_grad()
def test_converted_nets(naming: str, tmp_path: Path):
    """A net in 8 bits adds nearly the same, in either naming and container."""
    theirs = diffusers_net(
        num_layers=2, num_single_layers=0, guidance_embeds=True, conditioning_embedding_channels=16, patch_size=2
    )
    source = tmp_path / "net.safetensors"
    save_file(theirs.state_dict() if naming == "diffusers" else in_xlabs_names(theirs), source)
    x, hint = inputs(), torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def added(path: Path) -> Tensor:
        net = load_controlnet(path, BASE)
        return torch.cat(residuals_of(net, x, net.tokens(hint)).double)

    exact = added(source)
    for name, fmt, most in (("net.gguf", "q8_0", 0.02), ("net8.safetensors", "fp8", 0.08)):
        run(make_plan(Conversion(source, tmp_path / name, fmt)))
        assert 1e-4 < relative_error(added(tmp_path / name), exact) < most


@torch.no_grad()
def test_several_nets_are_those_of_diffusers(engine: Flux, judge: nn.Module, tmp_path: Path):
    from diffusers import FluxMultiControlNetModel

    theirs = [diffusers_net(seed, **NETS["double and single"]) for seed in (3, 4)]
    ours = [load_controlnet(saved(net, tmp_path, str(i)), BASE) for i, net in enumerate(theirs)]
    x, conditions, scales = inputs(), [condition(11), condition(12)], [0.4, 1.3]
    modes = [torch.zeros(2, dtype=torch.long)] * 2
    given = in_diffusers_names(x)
    double, single = FluxMultiControlNetModel(theirs)(
        controlnet_cond=conditions, controlnet_mode=modes, conditioning_scale=scales, return_dict=False, **given
    )
    expected = judge(**given, controlnet_block_samples=double, controlnet_single_block_samples=single).sample
    controls = [Control(net, cond, scale) for net, cond, scale in zip(ours, conditions, scales, strict=True)]
    parts = []
    for net, cond in zip(ours, conditions, strict=True):
        vec = net.steering(x["pooled"], x["timestep"], x["guidance"], torch.float32)
        parts.append(net(x["img"], cond, x["txt"], x["img_ids"], x["txt_ids"], vec))
    residuals = Residuals(
        combined([(c, p[0]) for c, p in zip(controls, parts, strict=True)], BASE.double_blocks),
        combined([(c, p[1]) for c, p in zip(controls, parts, strict=True)], BASE.single_blocks),
    )
    assert relative_error(engine(**x, residuals=residuals), expected) < 1e-5
    shared = {id(tensor) for tensor in residuals.double}
    assert len(shared) == 3, "blocks that get the same share one tensor"


@torch.no_grad()
def test_nets_of_different_depth_add_up(tmp_path: Path):
    """Two residuals of one net serve 2 of 4 blocks each; of three of another two do, and the third serves none."""
    net = load_controlnet(saved(diffusers_net(**NETS["unguided"]), tmp_path), BASE)
    two, three = ([torch.full((1,), 10.0**i) for i in range(count)] for count in (2, 3))
    found = combined([(Control(net, condition()), two), (Control(net, condition(), 0.5), three)], 4)
    assert [float(x) for x in found] == [1.5, 1.5, 15.0, 15.0]
    assert combined([(Control(net, condition()), [])], 4) == []


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["q8_0", "q4_k_m", "fp8", "bf16"])
@torch.no_grad()
def test_packed_files(fmt: str, tmp_path: Path):
    """The engine over packed weights is diffusers' net with the same weights unpacked."""
    from diffusers import FluxControlNetModel

    from flux_quant.converters.checkpoint import load, open_checkpoint

    base = FluxConfig(64, 64, 256, 64, 1024, 256, 64, 3, 3, True)
    arguments = {**base.diffusers(), "num_layers": 2, "num_single_layers": 1, "num_mode": 3}
    arguments.pop("out_channels")
    theirs = randomise(FluxControlNetModel(**arguments))
    source = saved(theirs, tmp_path)
    target = tmp_path / ("packed.safetensors" if fmt in ("fp8", "bf16") else "packed.gguf")
    run(make_plan(Conversion(source, target, fmt)))
    net = load_controlnet(target, base)
    with open_checkpoint(target) as reader:
        theirs.load_state_dict({name: load(reader, name) for name in reader.tensors})
    packed = {layer.fmt.name for layer in net.modules() if hasattr(layer, "fmt")}
    assert packed - {"f32"}, "something is packed"
    inside = {layer.fmt.name for layer in net.double_blocks.modules() if hasattr(layer, "fmt")}
    assert "f32" not in inside, "nothing of a block was unpacked to be joined"
    if fmt == "fp8":
        assert any(isinstance(layer, Joined) for layer in net.modules())
    x = inputs() | {"txt": torch.randn(2, 6, 256), "pooled": torch.randn(2, 64)}
    given, cond = in_diffusers_names(x), condition()
    expected = theirs(controlnet_cond=cond, controlnet_mode=torch.full((2, 1), 2), **given)
    vec = net.steering(x["pooled"], x["timestep"], x["guidance"], torch.float32)
    double, single = net(x["img"], cond, x["txt"], x["img_ids"], x["txt_ids"], vec, 2)
    for found, judged in zip(
        [*double, *single],
        [*expected.controlnet_block_samples, *expected.controlnet_single_block_samples],
        strict=True,
    ):
        assert relative_error(found, judged) < 1e-3


MISFITS = {
    "width": (replace(BASE, hidden=96), "its width is 64, that of the model 96"),
    "T5": (replace(BASE, context=40), "its T5 width is 48, that of the model 40"),
    "CLIP": (replace(BASE, pooled=8), "its CLIP width is 40, that of the model 8"),
    "latents": (replace(BASE, out_channels=16), "latents of 64 channels, the model has 16"),
}


def test_a_folder_as_diffusers_saves_it(tmp_path: Path):
    diffusers_net(**NETS["6 + 0"]).save_pretrained(tmp_path / "controlnet")
    assert len(load_controlnet(tmp_path / "controlnet", BASE).double_blocks) == 4


@pytest.mark.parametrize("name", MISFITS)
def test_nets_for_other_models(name: str, tmp_path: Path):
    base, message = MISFITS[name]
    path = saved(diffusers_net(**NETS["6 + 0"]), tmp_path)
    with pytest.raises(UserError, match=f"net.safetensors: a ControlNet for .*{message}"):
        load_controlnet(path, base)


@pytest.mark.parametrize(
    "missing",
    ["controlnet_blocks.1.weight", "transformer_blocks.1.attn.to_k.weight", "context_embedder.weight",
     "transformer_blocks.0.ff.net.2.bias", "time_text_embed.guidance_embedder.linear_2.weight"],
)  # fmt: skip
def test_incomplete_nets(missing: str, tmp_path: Path):
    tensors = diffusers_net(num_layers=3, num_single_layers=0, guidance_embeds=True).state_dict()
    del tensors[missing]
    save_file(tensors, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=r"net\.safetensors.*missing"):
        load_controlnet(tmp_path / "net.safetensors", BASE)


def test_modes(tmp_path: Path):
    union = load_controlnet(saved(diffusers_net(**NETS["Union"]), tmp_path), BASE)
    assert [union.number_of(mode) for mode in ("canny", "depth", "6")] == [0, 2, 6]
    for wrong in (None, "7", "edges", "-1"):
        with pytest.raises(UserError, match="needs a mode it knows: canny, tile"):
            union.number_of(wrong)
    plain = load_controlnet(saved(diffusers_net(**NETS["6 + 0"]), tmp_path, "plain"), BASE)
    assert plain.number_of(None) is None
    with pytest.raises(UserError, match="Union nets"):
        plain.number_of("canny")
