"""What tests of LoRA side paths share: an engine in every form of weight, every kind of change, what must come out."""

import torch
from torch import Tensor

from flux_quant.arch import FluxConfig
from flux_quant.converters.lora_math import fused
from flux_quant.converters.lora_records import Lora
from flux_quant.formats import FORMATS
from flux_quant.kernels import dispatch
from flux_quant.linear import QuantLinear, repack_, set_compute_
from flux_quant.lora import remove_
from flux_quant.model import Flux
from lora_checks import FINAL, HIDDEN, KEY, MODULE, State, random, shapes_of

WIDE = "diffusion_model.single_blocks.1.linear1"
FORMS = ("bf16", "f32", "q8_0", "q4_k", "fp8", "q4_0 planar", "q4_k as int8", "int8_rows")
EXACT = 2e-6  # relative, of sums in float32
EIGHT_BIT = 3e-2


BUILT: dict[str, Flux] = {}


def flux(state: State, form: str = "q8_0") -> Flux:
    """The engine with its linears in a form, where their rows allow it; nothing is on it."""
    if form not in BUILT:
        BUILT[form] = built(state, form)
    remove_(BUILT[form])
    return BUILT[form]


def built(state: State, form: str) -> Flux:
    base, *_ = form.replace(" planar", "").split(" as ")
    base = "bf16" if base == "int8_rows" else base
    with torch.device("meta"):
        model = Flux(FluxConfig.from_shapes(shapes_of(state)))
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            weight, fmt = state[f"{name}.weight"], FORMATS[base]
            fmt = fmt if fmt.fits(tuple(weight.shape)) else FORMATS["f32"]
            model.set_submodule(name, QuantLinear.from_float(weight, state[f"{name}.bias"].clone(), fmt))
    for name, module in model.named_modules():
        if "scale" in module._parameters:
            module.scale = torch.nn.Parameter(state[f"{name}.scale"].clone(), requires_grad=False)
    if form.endswith("planar"):
        repack_(model)
    if "int8" in form:
        set_compute_(model, "int8")
    return model.eval()


def weight_of(layer: QuantLinear) -> Tensor:
    return dispatch.dequantize(layer.fmt, layer.parts, torch.float32)


def expected(layer: QuantLinear, name: str, x: Tensor, adapters: list[tuple[Lora, float]]) -> Tensor:
    """Dequantize, merge in float32, multiply in double; the base product is the layer's own, which 8 bits round."""
    weight, bias = weight_of(layer), layer.bias.float()
    merged, moved = fused(f"{name}.weight", weight, adapters), fused(f"{name}.bias", bias, adapters)
    weight = torch.nn.functional.pad(weight, (0, merged.shape[1] - weight.shape[1]))
    change = x.double() @ (merged.double() - weight.double()).T + (moved - bias).double()
    return layer.product(x[..., : layer.in_features]).double() + change


def matrices(name: str, n: int, k: int, rank: int = 3, seed: int = 0) -> State:
    return {
        f"{name}.lora_A.weight": random(rank, k, seed=seed),
        f"{name}.lora_B.weight": random(n, rank, seed=seed + 1),
    }


def lokr(name: str, w1: tuple[int, int], w2: tuple[int, int], factored: bool) -> State:
    found = {f"{name}.lokr_w1": random(*w1)}
    if not factored:
        return {**found, f"{name}.lokr_w2": random(*w2, seed=1)}
    return {**found, f"{name}.lokr_w2_a": random(w2[0], 3), f"{name}.lokr_w2_b": random(3, w2[1], seed=2)}


def loha(name: str, n: int, k: int, rank: int) -> State:
    parts = {"w1_a": (n, rank), "w1_b": (rank, k), "w2_a": (n, rank), "w2_b": (rank, k)}
    return {f"{name}.hada_{part}": random(*shape, seed=i) for i, (part, shape) in enumerate(parts.items())}


D = f"diffusion_model.{MODULE}"
N = 4 * HIDDEN
ATTENTION = "transformer.transformer_blocks.0.attn"
K = f"{ATTENTION}.to_k"
QKV = "double_blocks.0.img_attn.qkv"
lengths = 1 + random(N, 1).abs()
KINDS: dict[str, tuple[str, State]] = {  # module, tensors of the file
    "lora": (MODULE, {**matrices(D, N, HIDDEN), f"{D}.alpha": torch.tensor(1.5)}),
    "lora_mid": (
        MODULE,
        {
            f"{KEY}.lora_down.weight": random(3, HIDDEN, 1, 1),
            f"{KEY}.lora_mid.weight": random(3, 3, 1, 1),
            f"{KEY}.lora_up.weight": random(N, 3, 1, 1),
        },
    ),
    "lokr": (MODULE, lokr(D, (8, 4), (N // 8, HIDDEN // 4), False)),
    "lokr, small first": (MODULE, lokr(D, (2, 16), (N // 2, HIDDEN // 16), False)),
    "lokr factored": (MODULE, lokr(D, (8, 4), (N // 8, HIDDEN // 4), True)),
    "loha": (MODULE, loha(D, N, HIDDEN, 4)),
    "loha of high rank": (MODULE, loha(D, N, HIDDEN, 16)),
    "dora by rows": (MODULE, {**matrices(D, N, HIDDEN), f"{D}.dora_scale": lengths}),
    "dora by columns": (MODULE, {**matrices(D, N, HIDDEN), f"{D}.dora_scale": lengths[:HIDDEN].T.contiguous()}),
    "lokr, dora by rows": (MODULE, {**lokr(D, (8, 4), (N // 8, HIDDEN // 4), True), f"{D}.dora_scale": lengths}),
    "loha, dora by columns": (MODULE, {**loha(D, N, HIDDEN, 4), f"{D}.dora_scale": lengths[:HIDDEN].T.contiguous()}),
    "diff and bias": (MODULE, {f"{D}.diff": random(N, HIDDEN), f"{D}.diff_b": random(N)}),
    "bias alone": (MODULE, {f"{D}.diff_b": random(N)}),
    "bias of a product": (MODULE, {**matrices(D, N, HIDDEN), f"{D}.lora_B.bias": random(N)}),
    "q and v": (
        QKV,
        {
            **matrices(f"{ATTENTION}.to_q", HIDDEN, HIDDEN),
            **matrices(f"{ATTENTION}.to_v", HIDDEN, HIDDEN, rank=5, seed=9),
        },
    ),
    "k by dora": (
        QKV,
        {
            **matrices(K, HIDDEN, HIDDEN),
            f"{K}.lora_magnitude_vector": lengths[:HIDDEN, 0],
        },
    ),
    "k by dora of columns": (
        QKV,
        {
            **matrices(K, HIDDEN, HIDDEN),
            f"{K}.dora_scale": lengths[:HIDDEN].T.contiguous(),
        },
    ),
    "mlp of linear1": (
        "single_blocks.1.linear1",
        {**matrices("transformer.single_transformer_blocks.1.proj_mlp", N, HIDDEN)},
    ),
    "exchanged halves": (FINAL, matrices("transformer.norm_out.linear", 2 * HIDDEN, HIDDEN)),
    "another weight": (MODULE, {f"{D}.set_weight": random(N, HIDDEN)}),
}
