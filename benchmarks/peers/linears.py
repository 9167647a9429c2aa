"""Linear layers at FLUX.1's shapes: how fast, and how far from the weight that went in."""

from pathlib import Path

import torch
from torch.nn import functional as F

from flux_quant.benchmarks.bench.record import OURS, Scalar
from flux_quant.benchmarks.peers.contest import Contest, Entry
from flux_quant.converters.quantize import Deviation
from flux_quant.formats import FORMATS
from flux_quant.kernels import cpu_quantize

SHAPES = {"3072 x 3072": (3072, 3072), "12288 x 3072": (12288, 3072)}  # N, K
SMALL = {"256 x 512": (256, 512)}
ROWS = 512
DEGREES, SPREAD = 5, 0.02  # of Student's t, whose tails are those of trained weights; its standard deviation

BITS = {  # width of the weights -> our format, and who else has such weights: (peer, its name for them)
    "8": (
        "q8_0",
        (
            ("diffusers", "q8_0"),
            ("optimum-quanto", "qint8"),
            ("torchao", "Int8WeightOnlyConfig"),
            ("torchao", "Int8DynamicActivationInt8WeightConfig"),
            ("bitsandbytes", "int8"),
        ),
    ),
    "fp8": ("fp8", (("optimum-quanto", "qfloat8"), ("torchao", "Float8WeightOnlyConfig"))),
    "4": (
        "q4_k",
        (
            ("diffusers", "q4_k"),
            ("optimum-quanto", "qint4"),
            ("torchao", "Int4WeightOnlyConfig"),
            ("bitsandbytes", "nf4"),
        ),
    ),
}
GGUF = ("q8_0", "q4_k")  # what diffusers takes the bytes of
NOTES = dict.fromkeys(("Int8DynamicActivationInt8WeightConfig", "int8"), "activations in 8 bits too")


def contests(device: str, small: bool) -> list[Contest]:
    dtype = "bfloat16" if device == "cuda" else "float32"  # the faster one on processors without bfloat16 units
    return [
        contest(name, shape, bits, device, dtype)
        for name, shape in (SMALL if small else SHAPES).items()
        for bits in BITS
    ]


def contest(name: str, shape: tuple[int, int], bits: str, device: str, dtype: str) -> Contest:
    ours, peers = BITS[bits]
    entries = [
        Entry(OURS, {"type": ours}, {"how": ours}),
        Entry("torch", {"type": dtype}, {"how": dtype}, f"{OURS} {ours}"),
    ]
    for peer, how in peers:
        against = entries[0].name
        entries.append(Entry(peer, {"type": how}, {"how": how}, against, NOTES.get(how, "")))

    def material(folder: Path) -> dict:
        path = folder / "linear.pt"
        weight = student(shape)
        x = torch.randn(ROWS, shape[1], generator=torch.Generator().manual_seed(2))
        torch.save({"weight": weight, "input": x, "packed": {ours: packed(ours, weight)}}, path)
        return {"kind": "linear", "material": str(path), "device": device, "dtype": dtype}

    what = {"work": "linear", "weight": name, "rows": ROWS, "bits": bits}
    return Contest(what, entries, material, judge, needs=15.0)


def student(shape: tuple[int, int]) -> torch.Tensor:
    """Student's t with few degrees, rounded to BF16 as a checkpoint has it; float32."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    squares = sum(torch.randn(shape, generator=generator).square_() for _ in range(DEGREES))
    weight /= (squares / DEGREES).sqrt_()
    return (weight * (SPREAD / weight.std())).to(torch.bfloat16).float()


def packed(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if name in GGUF:
        return cpu_quantize.quantize(name, weight)[0]
    return FORMATS[name].pack(weight)


def judge(shared: dict, entry: Entry, out: Path) -> dict[str, Scalar]:
    """Decibels of the weight as it comes out of the layer, and of the product, against those in full precision."""
    given, made = torch.load(shared["material"], weights_only=True), torch.load(out, weights_only=True)
    weight, product = given["weight"], F.linear(given["input"], given["weight"])
    return {
        "weight_snr_db": decibels(weight, made["weight"]),
        "output_snr_db": decibels(product, made["output"]),
        "bits_per_weight": 8 * entry.found["bytes"] / weight.numel(),
    }


def decibels(right: torch.Tensor, found: torch.Tensor) -> float | None:
    """None where nothing differs."""
    noise = (right.double() - found.double()).square().sum().item()
    return Deviation(right.double().square().sum().item(), noise).snr if noise else None
