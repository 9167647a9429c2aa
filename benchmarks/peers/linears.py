"""Linear layers at FLUX.1's shapes: how fast, and how far from the weight that went in."""

from pathlib import Path

import torch

from flux_quant.benchmarks.bench.record import OURS, Scalar
from flux_quant.benchmarks.peers.contest import Contest, Crew, Entry
from flux_quant.benchmarks.random_weights import gathered
from flux_quant.formats import FORMATS
from flux_quant.kernels import cpu_quantize

Size = tuple[tuple[int, int], int]  # (N, K), rows of input
SIZES: dict[str, tuple[Size, ...]] = {  # by device, the more telling ones first
    "cpu": (((3072, 3072), 512), ((12288, 3072), 512)),
    "cuda": (((21504, 3072), 4608), ((21504, 3072), 512), ((3072, 12288), 4608)),  # no cache holds them
}
SMALL: tuple[Size, ...] = (((256, 512), 512),)
DISTINCT = 512  # rows of a weight on CUDA; others repeat them, so that they are made and packed quickly
DEGREES, SPREAD = 5, 0.02  # of Student's t, whose tails are those of trained weights; its standard deviation

INT8, FP8 = "Int8DynamicActivationInt8WeightConfig", "Float8DynamicActivationFloat8WeightConfig"
COMPILED = ", compiled"
BITS = {  # width of the weights -> our format, and who else has such weights: (peer, its name for them)
    "8": (
        "q8_0",
        (
            ("torch chain", "q8_0"),
            ("diffusers", "q8_0"),
            ("optimum-quanto", "qint8"),
            ("torchao", "Int8WeightOnlyConfig"),
            ("torchao", INT8),
            ("bitsandbytes", "int8"),
        ),
    ),
    "fp8": (
        "fp8",
        (("torch chain", "fp8"), ("optimum-quanto", "qfloat8"), ("torchao", "Float8WeightOnlyConfig")),
    ),
    "4": (
        "q4_k",
        (
            ("torch chain", "q4_k"),
            ("diffusers", "q4_k"),
            ("optimum-quanto", "qint4"),
            ("torchao", "Int4WeightOnlyConfig"),
            ("bitsandbytes", "nf4"),
        ),
    ),
}
ON_CUDA = {  # more of them there; of `BITS` those that need another package there are left out
    "8": (
        (OURS, "q8_0 as int8"),
        ("torch chain", "q8_0" + COMPILED),
        ("torchao", "Int8WeightOnlyConfig" + COMPILED),
        ("torchao", INT8 + COMPILED),
    ),
    "fp8": (
        (OURS, "fp8 as fp8"),
        ("torch chain", "fp8" + COMPILED),
        ("torchao", "Float8WeightOnlyConfig" + COMPILED),
        *(("torchao", f"{FP8}, {by}{how}") for by in ("per row", "per tensor") for how in ("", COMPILED)),
    ),
    "4": (
        (OURS, "q4_k as int8"),
        ("torch chain", "q4_k" + COMPILED),
        ("torchao", "Int4WeightOnlyConfig, tile packed"),
    ),
}
NEEDS_MORE = ("Int4WeightOnlyConfig",)
GGUF = ("q8_0", "q4_k")  # what diffusers takes the bytes of
ROUNDED = "activations in 8 bits too"
WITHOUT = {("optimum-quanto", "qfloat8"): "without the kernel that it compiles at its first use"}  # on CUDA


def contests(device: str, small: bool) -> list[Contest]:
    """On CUDA the formats take turns within a size, and each keeps its processes for all sizes."""
    if device != "cuda":
        return [contest(size, bits, device) for size in (SMALL if small else SIZES["cpu"]) for bits in BITS]
    crews = {bits: Crew() for bits in BITS}
    sizes = SMALL if small else SIZES["cuda"]
    return [contest(size, bits, device, crews[bits]) for size in sizes for bits in BITS]


def contest(size: Size, bits: str, device: str, crew: Crew | None = None) -> Contest:
    dtype = "bfloat16" if device == "cuda" else "float32"  # the faster one on processors without bfloat16 units
    (shape, rows), (ours, _) = size, BITS[bits]

    def material(folder: Path) -> dict:
        path = folder / "linear.pt"
        weight, parts = made(ours, shape, device)
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(2))
        torch.save({"weight": weight, "input": x, "packed": {ours: parts}}, path)
        return {"kind": "linear", "material": str(path), "device": device, "dtype": dtype}

    def judge(shared: dict, entry: Entry, out: Path) -> dict[str, Scalar]:
        return {"bits_per_weight": 8 * entry.found["bytes"] / (shape[0] * shape[1])}

    what = {"work": "linear", "weight": f"{shape[0]} x {shape[1]}", "rows": rows, "bits": bits}
    return Contest(what, entries(bits, device, dtype), material, judge, needs=15.0, crew=crew)


def entries(bits: str, device: str, dtype: str) -> list[Entry]:
    """Ours first, which all are compared with."""
    ours, peers = BITS[bits]
    if device == "cuda":
        peers = (*(pair for pair in peers if pair[1] not in NEEDS_MORE), *ON_CUDA[bits])
    first = Entry(OURS, {"type": ours}, {"how": ours})
    found = [first, Entry("torch", {"type": dtype}, {"how": dtype}, first.name)]
    for peer, how in peers:
        found.append(Entry(peer, {"type": how}, {"how": how}, first.name, note_of(peer, how, device)))
    return found


def note_of(peer: str, how: str, device: str) -> str:
    if how.startswith((INT8, FP8)) or " as " in how or (peer, how) == ("bitsandbytes", "int8"):
        return ROUNDED
    return WITHOUT.get((peer, how), "") if device == "cuda" else ""


def made(name: str, shape: tuple[int, int], device: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """A weight in BF16 and its parts in our format."""
    if device != "cuda":
        weight = student(shape)
        return weight, packed(name, weight)
    few = student((min(DISTINCT, shape[0]), shape[1]))
    rows = torch.randint(len(few), shape[:1], generator=torch.Generator().manual_seed(3))
    return few[rows].to(torch.bfloat16), tuple(gathered(part, rows) for part in packed(name, few))


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
