"""LoRAs beside packed weights: every kind in every form of weight, against dequantizing, merging and multiplying."""

from pathlib import Path

import pytest
import torch

from flux_quant.converters.lora_records import Lora, Record
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS, format_named
from flux_quant.linear import QuantLinear
from flux_quant.lora import applied_to, apply_, at_step_, remove_, set_strength_, shapes_in, steps_by_strength
from lora_checks import HIDDEN, MODULE, State, floats, random, reader, shapes_of
from side_paths import (
    ATTENTION,
    EIGHT_BIT,
    EXACT,
    FORMS,
    KINDS,
    QKV,
    D,
    N,
    built,
    expected,
    flux,
    matrices,
    weight_of,
)


@pytest.fixture(scope="module")
def state(tiny_flux) -> State:
    return floats(tiny_flux)


@pytest.fixture
def read(tmp_path, state):
    return reader(tmp_path, shapes_of(state))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_kind_on_every_form(state, read, kind, form):
    name, tensors = KINDS[kind]
    model, lora = flux(state, form), read(tensors)
    layer = model.get_submodule(name)
    x = random(2, 5, layer.in_features, seed=3)
    before, own = layer(x), weight_of(layer)
    if kind == "another weight":
        after = x @ tensors[f"{D}.set_weight"].T + layer.bias
    else:
        after = expected(layer, name, x, [(lora, 0.7)])
    apply_(model, [(lora, 0.7)])
    found = layer(x)
    rounded = "int8" in form and "dora" in kind  # a gain acts on the product as 8 bits gave it
    assert (found.double() - after).norm() <= (EIGHT_BIT if rounded else EXACT) * after.norm()
    assert (found - before).norm() > 1e-2 * before.norm(), "the change is seen"
    remove_(model)
    assert torch.equal(layer(x), before) and torch.equal(weight_of(layer), own) and applied_to(model) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_16_bit_activations(state, read, dtype):
    """Within the rounding of one product, whatever the factors are stored in."""
    lora, model = read(KINDS["q and v"][1]), flux(state, "q8_0")
    layer = model.get_submodule(QKV)
    x = random(7, HIDDEN, seed=3)
    after = expected(layer, QKV, x.to(dtype).float(), [(lora, 2.0)])
    for held in (None, dtype):
        apply_(model, [(lora, 2.0)], dtype=held)
        found = layer(x.to(dtype))
        assert found.dtype == dtype
        assert (found.double() - after).norm() <= 2 * torch.finfo(dtype).eps * after.norm()
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(layer(x.to(dtype).float()), found)


@torch.no_grad()
def test_several_files_are_one_product(state, read):
    """Of different ranks, rows and kinds; each with its own strength and scale."""
    one = read({**matrices(D, N, HIDDEN), f"{D}.alpha": torch.tensor(9.0)})
    two = read(KINDS["lokr"][1] | {f"{D}.diff_b": random(N)})
    three = read(matrices(f"lycoris_{MODULE.replace('.', '_')}", N, HIDDEN, rank=4, seed=20))
    both = [(one, 0.5), (two, -1.0), (three, 0.25), (one, 0.125)]
    model = flux(state, "q4_k")
    layer, x = model.get_submodule(MODULE), random(5, HIDDEN, seed=3)
    after = expected(layer, MODULE, x, both)
    applied = apply_(model, both)
    assert (layer(x).double() - after).norm() <= EXACT * after.norm()
    (path,) = layer.adapters
    assert path.down.shape == (3 + 4 + 3, HIDDEN) and len(path.ups) == 1
    assert applied.nbytes == sum(tensor.nbytes for tensor in path.tensors)


@torch.no_grad()
def test_shared_first_factors_are_multiplied_once(state, read):
    down = random(4, HIDDEN)
    tensors = {f"{ATTENTION}.to_{part}.lora_A.weight": down for part in "qkv"}
    tensors |= {f"{ATTENTION}.to_{part}.lora_B.weight": random(HIDDEN, 4, seed=i) for i, part in enumerate("qkv")}
    lora, model = read(tensors), flux(state)
    layer, x = model.get_submodule(QKV), random(5, HIDDEN, seed=3)
    after = expected(layer, QKV, x, [(lora, 1.0)])
    apply_(model, [(lora, 1.0)])
    assert layer.adapters[0].down.shape == (4, HIDDEN)
    assert (layer(x).double() - after).norm() <= EXACT * after.norm()


@torch.no_grad()
def test_strengths_are_scalars(state, read):
    lora, model = read(KINDS["lora"][1]), flux(state)
    layer, x = model.get_submodule(MODULE), random(5, HIDDEN)
    plain = layer(x)
    apply_(model, [(lora, 1.0)])
    tensors, versions = [(t, t.clone(), t.data_ptr()) for t in layer.adapters[0].tensors], set()
    for strength in (1.0, -0.5, 0.0, 3):
        set_strength_(model, 0, strength)
        versions.add(layer.adapters[0].version)
        after = expected(layer, MODULE, x, [(lora, float(strength))])
        assert (layer(x).double() - after).norm() <= EXACT * after.norm()
        if not strength:
            assert torch.equal(layer(x), plain), "nothing is computed"
    assert len(versions) == 4
    assert all(t.data_ptr() == place and torch.equal(t, copy) for t, copy, place in tensors)


def test_strength_by_step(state, read):
    lora, model = read(KINDS["lora"][1]), flux(state)
    applied = apply_(model, [(lora, [1.0, 0.5]), (lora, lambda step: step / 4), (lora, 2.0)])
    seen = []
    for step in range(4):
        at_step_(model, step)
        seen.append(applied.dial.values)
    assert seen == [[1.0, 0.0, 2.0], [0.5, 0.25, 2.0], [0.5, 0.5, 2.0], [0.5, 0.75, 2.0]]
    apply_(model, [(lora, [1.0, 1.0, 0.0])])
    assert steps_by_strength(model, 5) == [[0, 1], [2, 3, 4]]
    remove_(model)
    assert steps_by_strength(model, 3) == [[0, 1, 2]]


@torch.no_grad()
def test_hot_swap(state, read):
    """Other targets: nothing of the first is left."""
    model = flux(state)
    first, second = read(KINDS["another weight"][1]), read(KINDS["q and v"][1])
    layers = model.get_submodule(MODULE), model.get_submodule(QKV)
    x = random(5, HIDDEN)
    before = [layer(x) for layer in layers]
    apply_(model, [(first, 1.0)])
    apply_(model, [(second, 1.0)])
    assert torch.equal(layers[0](x), before[0]) and not torch.equal(layers[1](x), before[1])
    remove_(model)
    assert [torch.equal(layer(x), y) for layer, y in zip(layers, before, strict=True)] == [True, True]


@torch.no_grad()
def test_control_lora_and_back(state, read):
    """Twice the inputs, other norms, biases; with a style of the base's width."""
    tensors = {**matrices("img_in", HIDDEN, 128), "img_in.lora_B.bias": random(HIDDEN)}
    norm = "double_blocks.0.img_attn.norm.query_norm"
    control = read({**tensors, f"{norm}.scale": 2 + random(128)})
    style = read(matrices("diffusion_model.img_in", HIDDEN, 64, seed=5))
    model = flux(state, "bf16")
    own, config, old = model.get_submodule(norm).scale, model.config, model.img_in(random(3, 64))
    x = random(3, 128)
    after = expected(model.img_in, "img_in", x, [(control, 0.85), (style, 0.5)])
    apply_(model, [(control, 0.85), (style, 0.5)])
    assert model.config.in_channels == 128
    assert (model.img_in(x).double() - after).norm() <= EXACT * after.norm()
    torch.testing.assert_close(model.get_submodule(norm).scale.data, 2 + random(128))
    set_strength_(model, 0, 0.1)
    torch.testing.assert_close(
        model.get_submodule(norm).scale.data, 2 + random(128), msg="a replacement has no strength"
    )
    remove_(model)
    assert model.config is config and model.get_submodule(norm).scale is own
    assert torch.equal(model.img_in(random(3, 64)), old)


@torch.no_grad()
def test_norm_changes_follow_the_strength(state, read):
    name = "double_blocks.0.txt_attn.norm.key_norm"
    lora, model = read({f"diffusion_model.{name}.w_norm": random(128)}), flux(state)
    own = model.get_submodule(name).scale.clone()
    apply_(model, [(lora, 0.5)])
    torch.testing.assert_close(model.get_submodule(name).scale.data, own + 0.5 * random(128))
    set_strength_(model, 0, 2.0)
    torch.testing.assert_close(model.get_submodule(name).scale.data, own + 2 * random(128))
    with pytest.raises(UserError, match="one number for all steps"):
        set_strength_(model, 0, [1.0, 0.0])
    remove_(model)
    torch.testing.assert_close(model.get_submodule(name).scale.data, own, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["lora", "lokr factored", "loha", "loha of high rank", "q and v"])
@pytest.mark.parametrize("form", ["q8_0", "f32"])
def test_gradients_flow_to_factors(state, read, kind, form):
    """As through the merged weight, by autograd; the packed weight takes none."""
    name, tensors = KINDS[kind]
    model, lora = flux(state, form), read(tensors)
    apply_(model, [(lora, 0.7)])
    layer = model.get_submodule(name)
    (path,) = layer.adapters
    x = random(5, layer.in_features, seed=3).requires_grad_()
    for tensor in path.tensors:
        tensor.requires_grad_()
    layer(x).square().sum().backward()
    for tensor in path.tensors:
        step = 1e-2 * torch.randn_like(tensor)
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * step
                moved.append(layer(x).double().square().sum())
                tensor -= sign * step
        slope = float((moved[0] - moved[1]) / 2)
        assert abs(float((tensor.grad * step).sum()) - slope) <= 2e-2 * abs(slope) + 1e-2
    assert x.grad.isfinite().all() and x.grad.norm() > 0


def broken(name: str) -> State:
    tensors = dict(KINDS["lora"][1])
    if name == "nan":
        tensors[f"{D}.lora_B.weight"] = tensors[f"{D}.lora_B.weight"].index_fill(0, torch.tensor([7]), torch.nan)
    if name == "half":
        tensors["diffusion_model.double_blocks.0.img_mlp.0.lora_A.weight"] = random(3, HIDDEN)
    return tensors


@pytest.mark.parametrize(
    ("case", "strength", "message"),
    [
        ("nan", 1.0, r"lora.safetensors: \S+img_mlp\.0\.lora_B\.weight holds values that are not finite"),
        ("half", 1.0, r"lora.safetensors: \S+double_blocks\.0\.img_mlp\.0\.lora_A\.weight has no other half"),
        ("", float("nan"), "strength nan is not a number"),
        ("", "1", "strength '1' is not a number"),
        ("", [1.0, "x"], "is not a number"),
        ("", [], "is not a number"),
    ],
)
@torch.no_grad()
def test_bad_input_changes_nothing(state, tmp_path, case, strength, message):
    from safetensors.torch import save_file

    from flux_quant.converters.lora_io import read_lora

    model = flux(state)
    save_file(KINDS["q and v"][1], tmp_path / "good.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in broken(case).items()}, tmp_path / "lora.safetensors")
    good, bad = (read_lora(tmp_path / f"{name}.safetensors", shapes_in(model)) for name in ("good", "lora"))
    applied = apply_(model, [(good, 1.0)])
    layer, x = model.get_submodule(QKV), random(3, HIDDEN)
    before = layer(x)
    with pytest.raises(UserError, match=message):
        apply_(model, [(good, 0.5), (bad, strength)])
    assert applied_to(model) is applied and torch.equal(layer(x), before)
    with pytest.raises(UserError, match="no LoRA number 3"):
        set_strength_(model, 3, 1.0)


@torch.no_grad()
def test_moves_with_its_layer(state, read):
    model, lora = built(state, "f32"), read(KINDS["lora"][1])
    apply_(model, [(lora, 1.0)])
    (path,) = model.get_submodule(MODULE).adapters
    held = path.tensors
    path.move_(lambda tensor: tensor.double())
    assert all(a is b and a.dtype == torch.float64 for a, b in zip(held, path.tensors, strict=True))
    path.move_(lambda tensor: tensor.float())
    moves = []
    path.move_ = moves.append
    model.to(torch.bfloat16)
    (move,) = moves
    assert move(held[0]).dtype == torch.float32, "a cast of the model does not cast factors"


def test_shapes_are_those_of_the_file(state):
    for form in ("q4_k", "q4_0 planar", "int8_rows"):
        assert shapes_in(flux(state, form)) == shapes_of(state)
    assert format_named("int8_rows").compute == "int8"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "another weight"])
@torch.no_grad()
def test_every_kind_on_a_gpu(state, read, kind):
    name, tensors = KINDS[kind]
    model, lora = built(state, "q8_0"), read(tensors)
    layer, x = model.get_submodule(name), random(2, 5, model.get_submodule(name).in_features, seed=3)
    after = expected(layer, name, x, [(lora, 0.7)])
    apply_(model, [(lora, 0.7)])
    model.to("cuda")
    assert all(tensor.is_cuda for tensor in layer.adapters[0].tensors)
    assert (layer(x.cuda()).cpu().double() - after).norm() <= 1e-3 * after.norm()


@pytest.mark.gpu
@torch.no_grad()
def test_nothing_as_large_as_the_output_is_allocated():
    weight = random(3072, 1024)
    layer = QuantLinear.from_float(weight, torch.zeros(3072), FORMATS["bf16"])
    model = torch.nn.Sequential(layer)
    factors = {"down": random(16, 1024), "up": random(1024, 16)}
    records = [Record("transformer", "0", "lora", i * 1024, 1024, factors, 1.0, None, None, ("x",)) for i in range(3)]
    apply_(model, [(Lora(Path("x"), tuple(records), [], {}, {}), 0.5)], dtype=torch.bfloat16)
    model.to("cuda")
    x = random(4096, 1024).to("cuda", torch.bfloat16)
    model(x)  # the library takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = model(x)
    assert torch.cuda.max_memory_allocated() - before < 1.25 * out.nbytes
