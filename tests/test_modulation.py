"""Modulation evaluated before the loop: the same output, every weight used once, evaluated again when it must be."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flux_quant.arch import FluxConfig
from flux_quant.benchmarks.random_weights import DEV, DOUBLE, SINGLE
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.frontends.diffusers import load
from flux_quant.frontends.pipelines import pipeline
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_flux
from flux_quant.model import Flux, image_ids, text_ids
from flux_quant.modulation import (
    KEPT,
    Call,
    HoistedModulation,
    evaluate,
    hoisted_bytes,
    hoisted_modules,
    move_without_,
    steered_linears,
    table_bytes,
    visiting,
)

CLOSE = 2e-6  # relative; measured: 8e-7. Rows of a matrix product are rounded otherwise than a row alone


@pytest.fixture(scope="module", params=["bf16", "q8_0", "q4_0", "fp8"])
def model(request, tiny_flux_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Flux:
    suffix = "gguf" if request.param.startswith("q") else "safetensors"
    path = tmp_path_factory.mktemp("models") / f"model.{suffix}"
    run(make_plan(Conversion(tiny_flux_file, path, request.param)))
    return load_flux(path)


@pytest.fixture
def plain() -> Flux:
    """Unpacked weights, which a test may change."""
    config = FluxConfig(64, 64, 128, 32, 512, 64, 32, 2, 3, True)
    generator = torch.Generator().manual_seed(3)
    flux = Flux(config).eval().requires_grad_(False)
    for parameter in flux.parameters():
        parameter.normal_(0, 0.06, generator=generator)
    return flux


def made_calls(config: FluxConfig, batch: int = 2, steps: int = 3) -> list[Call]:
    """Steps of an img2img start, with a guidance that changes, for a text and a negative one."""
    g = torch.Generator().manual_seed(5)
    texts = torch.randn(2, batch, config.pooled, generator=g)
    return [
        Call(torch.full((batch,), 0.7 - 0.2 * i), text, torch.full((batch,), 3.5 - i) if config.guidance else None)
        for i in range(steps)
        for text in texts
    ]


def picture_inputs(config: FluxConfig, batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(6)
    return dict(
        img=torch.randn(batch, 15, config.in_channels, generator=g).to(dtype),
        txt=torch.randn(batch, 7, config.context, generator=g).to(dtype),
        img_ids=image_ids(3, 5),
        txt_ids=text_ids(7),
    )


def outputs(model: Flux, calls: list[Call], rows: list, dtype: torch.dtype = torch.float32) -> list[tuple]:
    """With the modulation computed step by step, and looked up."""
    pairs = []
    for call, row in zip(calls, rows, strict=True):
        x = picture_inputs(model.config, len(call.timestep), dtype)
        direct = model(pooled=call.pooled, timestep=call.timestep, guidance=call.guidance, **x)
        pairs.append((direct.float(), model(pooled=None, timestep=None, steering=row, **x).float()))
    return pairs


@torch.no_grad()
def test_same_output(model: Flux):
    calls = made_calls(model.config)
    rows = HoistedModulation(model).rows(calls, "cpu", torch.float32)
    pairs = outputs(model, calls, rows)
    for direct, looked_up in pairs:
        assert (direct - looked_up).norm() <= CLOSE * direct.norm()
    for (a, _), (b, _) in zip(pairs, pairs[1:], strict=False):
        assert (a - b).norm() > 1e-3 * a.norm(), "every call is steered by its own values"


@torch.no_grad()
def test_same_output_in_bfloat16(plain: Flux):
    calls = made_calls(plain.config)
    model = plain.to(torch.bfloat16)
    rows = evaluate(model, calls, "cpu", torch.bfloat16)
    assert {value.dtype for row in rows for value in row.values()} == {torch.bfloat16}
    for direct, looked_up in outputs(model, calls, rows, torch.bfloat16):
        assert (direct - looked_up).norm() <= 0.02 * direct.norm()  # a few roundings to 3 digits; measured: 0


@torch.no_grad()
def test_every_weight_is_used_once_in_order_and_then_no_more(plain: Flux):
    calls, used = made_calls(plain.config), []
    names = {module: name for name, module in plain.named_modules()}
    linears = [m for part in hoisted_modules(plain) for m in part.modules() if isinstance(m, nn.Linear)]
    for linear in linears:
        linear.register_forward_hook(lambda module, *_: used.append(names[module]))
    rows = HoistedModulation(plain).rows(calls, "cpu", torch.float32)
    assert set(Counter(used).values()) == {1} and len(used) == len(linears)
    blocks = [name for name in used if "blocks" in name or "final" in name]
    assert blocks == [names[linear] for linear in steered_linears(plain)]
    assert blocks[0] == "double_blocks.0.img_mod.lin" and blocks[-1] == "final_layer.adaLN_modulation.1"
    expected = [pair[0] for pair in outputs(plain, calls, rows)]
    for part in hoisted_modules(plain):
        part.to("meta")
    for call, row, out in zip(calls, rows, expected, strict=True):
        x = picture_inputs(plain.config, len(call.timestep))
        found = plain(pooled=None, timestep=None, steering=row, **x)
        assert (found - out).norm() <= CLOSE * out.norm()


def stored_bytes(rows: list) -> int:
    storages = [value.untyped_storage() for row in rows for value in row.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@torch.no_grad()
def test_table_is_compact(plain: Flux):
    calls = made_calls(plain.config, batch=3)
    rows = evaluate(plain, calls, "cpu", torch.float32)
    assert stored_bytes(rows) == table_bytes(plain, 18, torch.float32)
    same = [call._replace(pooled=call.pooled[:1].expand(3, -1)) for call in calls]
    rows = HoistedModulation(plain).rows(same, "cpu", torch.float32)
    assert {tuple(value.shape[:1]) for row in rows for value in row.values()} == {(3,)}
    assert stored_bytes(rows) == table_bytes(plain, 6, torch.float32), "pictures steered alike share a row"
    for direct, looked_up in outputs(plain, same, rows):
        assert (direct - looked_up).norm() <= CLOSE * direct.norm()


def test_sizes_of_the_real_model():
    with torch.device("meta"):
        flux = Flux(FluxConfig(**dict(DEV, guidance=True), double_blocks=DOUBLE, single_blocks=SINGLE))
    assert table_bytes(flux, 1, torch.bfloat16) == 2_113_536
    share = hoisted_bytes(flux) / sum(p.nbytes for p in flux.parameters())
    assert 0.27 < share < 0.28


@torch.no_grad()
def test_unguided_model():
    flux = Flux(FluxConfig(64, 64, 128, 32, 512, 64, 32, 1, 1, False)).eval()
    calls = made_calls(flux.config)
    for direct, looked_up in outputs(flux, calls, evaluate(flux, calls, "cpu", torch.float32)):
        assert (direct - looked_up).norm() <= CLOSE * direct.norm()


def test_guided_model_wants_guidance(plain: Flux):
    calls = [call._replace(guidance=None) for call in made_calls(plain.config)]
    with pytest.raises(ValueError, match="guidance"):
        evaluate(plain, calls, "cpu", torch.float32)


CHANGES = {  # what changes in the calls -> whether weights are needed again
    "nothing": (lambda calls: [Call(*(value.clone() for value in call)) for call in calls], 0),
    "fewer steps": (lambda calls: calls[2:], 0),
    "another order": (lambda calls: calls[::-1], 0),
    "timestep": (lambda calls: [call._replace(timestep=call.timestep * 0.5) for call in calls], 1),
    "guidance": (lambda calls: [call._replace(guidance=call.guidance + 1) for call in calls], 1),
    "text": (lambda calls: [call._replace(pooled=call.pooled.flip(0)) for call in calls], 1),
    "one text of a batch": (
        lambda calls: [call._replace(pooled=torch.cat([call.pooled[:1], -call.pooled[1:]])) for call in calls],
        1,
    ),
    "batch": (lambda calls: [Call(*(value[:1] for value in call)) for call in calls], 1),
}


@pytest.mark.parametrize(("change", "evaluations"), CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_evaluated_again_when_an_input_changes(plain: Flux, change, evaluations: int):
    modulation, calls = HoistedModulation(plain), made_calls(plain.config)
    modulation.rows(calls, "cpu", torch.float32)
    changed = change(calls)
    rows = modulation.rows(changed, "cpu", torch.float32)
    assert modulation.evaluations == 1 + evaluations
    for direct, looked_up in outputs(plain, changed, rows):
        assert (direct - looked_up).norm() <= CLOSE * direct.norm()


class Adapter:
    """A LoRA of rank 1."""

    def __init__(self, layer: QuantLinear, strength: float) -> None:
        self.a, self.b = torch.ones(layer.in_features), torch.linspace(-1, 1, layer.out_features)
        self.strength, self.version = strength, 0

    def __call__(self, x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
        return linear(x) + self.strength * (x @ self.a)[..., None] * self.b / len(self.a)


@torch.no_grad()
def test_adapters_on_modulation_layers(tiny_flux_file: Path):
    model = load_flux(tiny_flux_file)
    modulation, calls = HoistedModulation(model), made_calls(model.config)
    block, embedder = model.double_blocks[1].txt_mod.lin, model.time_in.out_layer
    adapter = Adapter(block, 0.5)

    def strength(value: float) -> None:
        adapter.strength, adapter.version = value, adapter.version + 1

    changes = {
        "attached": lambda: block.adapters.append(adapter),
        "strength": lambda: strength(2.0),
        "another": lambda: embedder.adapters.append(Adapter(embedder, 1.0)),
        "detached": block.adapters.clear,
        "layer exchanged": lambda: model.set_submodule(
            "double_blocks.0.img_mod.lin", QuantLinear.from_parts(block.fmt, block.parts, block.bias)
        ),
    }
    before = outputs(model, calls, modulation.rows(calls, "cpu", torch.float32))[0][1]
    for name, change in changes.items():
        assert not modulation.stale()
        change()
        assert modulation.stale(), name
        pairs = outputs(model, calls, modulation.rows(calls, "cpu", torch.float32))
        for direct, looked_up in pairs:
            assert (direct - looked_up).norm() <= CLOSE * direct.norm(), name
        assert (pairs[0][1] - before).norm() > 1e-4 * before.norm(), name
        before = pairs[0][1]
    assert modulation.evaluations == 1 + len(changes)


@torch.no_grad()
def test_what_is_kept_is_bounded(plain: Flux):
    modulation = HoistedModulation(plain)
    (template,) = made_calls(plain.config, batch=1, steps=1)[:1]
    calls = [template._replace(timestep=torch.tensor([i / 1000])) for i in range(KEPT + 9)]
    assert len(modulation.rows(calls, "cpu", torch.float32)) == len(calls)
    modulation.rows(calls, "cpu", torch.float32)
    assert modulation.evaluations == 1, "a long run is kept as a whole"
    modulation.rows(calls[:1], "cpu", torch.float32)
    assert len(modulation.kept) == KEPT


def test_visiting_and_moving(tiny_flux_file: Path):
    model = load_flux(tiny_flux_file)
    layer = model.single_blocks[0].modulation.lin
    own = [*layer.parts, layer.bias]
    with pytest.raises(RuntimeError, match="stop"), visiting(layer, torch.device("meta")):
        assert {part.device.type for part in (*layer.parts, layer.bias)} == {"meta"}
        raise RuntimeError("stop")
    assert all(a is b for a, b in zip((*layer.parts, layer.bias), own, strict=True))
    with visiting(layer, torch.device("cpu")):
        assert all(a is b for a, b in zip((*layer.parts, layer.bias), own, strict=True)), "nothing is copied"
    move_without_(model, "meta", hoisted_modules(model))
    left = {p for part in hoisted_modules(model) for p in (*part.parameters(), *part.buffers())}
    assert {p.device.type for p in left} == {"cpu"}
    assert {p.device.type for p in (*model.parameters(), *model.buffers()) if p not in left} == {"meta"}


@torch.no_grad()
def test_compiled_once_for_all_steps(plain: Flux):
    calls = made_calls(plain.config)
    rows = HoistedModulation(plain).rows(calls, "cpu", torch.float32)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled, x = torch.compile(plain, backend=backend, fullgraph=True), picture_inputs(plain.config, 2)
    for row in rows:
        expected = plain(pooled=None, timestep=None, steering=row, **x)
        assert torch.equal(compiled(pooled=None, timestep=None, steering=row, **x), expected)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
@torch.no_grad()
def test_modulation_never_stays_on_the_card(model: Flux, name: str):
    calls = made_calls(model.config)
    modulation = HoistedModulation(model)
    expected = [pair[0] for pair in outputs(model, calls, modulation.rows(calls, "cpu", torch.float32))]
    parts = hoisted_modules(model)
    modulation.rows(calls, name, torch.float32)
    assert {t.device.type for part in parts for t in (*part.parameters(), *part.buffers())} == {"cpu"}
    move_without_(model, name, parts)
    rows = modulation.rows(calls, "cuda", torch.float32)
    assert modulation.evaluations == 2, "cuda and cuda:0 are one"
    for call, row, out in zip(calls, rows, expected, strict=True):
        x = {name: value.cuda() for name, value in picture_inputs(model.config, len(call.timestep)).items()}
        found = model(pooled=None, timestep=None, steering=row, **x).cpu()
        assert (found - out).norm() < 2e-3 * out.norm()  # matrix products may use TF32
    model.to("cpu")


def test_pipelines_of_diffusers_evaluate_once_per_prompt():
    pipe = pipeline(BUNDLED, device="cpu")
    modulation = pipe.transformer.modulation

    def draw(**changes: object) -> Tensor:
        arguments = dict(prompt="octopus", num_inference_steps=3, width=64, height=64, max_sequence_length=24)
        generator = torch.Generator().manual_seed(0)
        return pipe(**{**arguments, **changes}, output_type="latent", generator=generator).images

    first = draw()
    assert modulation.evaluations == 1, "the steps to come are evaluated with the first"
    assert torch.equal(draw(), first) and modulation.evaluations == 1
    for i, changes in enumerate(({"prompt": "apple"}, {"guidance_scale": 1.0}, {"num_inference_steps": 4})):
        assert not torch.equal(draw(**changes), first)
        assert modulation.evaluations == 2 + i, changes
    for steps, times in ((3, 0), (5, 1)):
        before = modulation.evaluations
        draw(negative_prompt="ant", true_cfg_scale=2.0, num_inference_steps=steps)
        assert modulation.evaluations - before == 1 + times, "each conditioning once"


def test_gradients_go_through_the_modulation_in_training():
    transformer = load(find_components(BUNDLED).transformer, device="cpu")
    pooled = torch.zeros(1, 128, requires_grad=True)
    inputs = picture_inputs(transformer.engine.config, 1)
    transformer(
        hidden_states=inputs["img"],
        encoder_hidden_states=inputs["txt"],
        pooled_projections=pooled,
        timestep=torch.ones(1),
        img_ids=inputs["img_ids"],
        txt_ids=inputs["txt_ids"],
        guidance=torch.ones(1),
    ).sample.sum().backward()
    assert pooled.grad.abs().sum() > 0
    assert transformer.modulation.evaluations == 0
