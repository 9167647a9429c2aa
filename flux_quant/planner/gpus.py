"""Graphics cards as data, and what a plan has to know of a machine.

Rates are datasheet values: dense, TFLOP/s; 16 bits with float32 sums (GeForce with 16-bit sums runs at twice that).
Checked against NVIDIA's advertised AI TOPS, of which 16-bit products are a fourth on Ampere, an eighth on Ada, a
sixteenth on Blackwell. Laptop parts are left out: their rates follow a power limit.

Nothing here was measured on these cards but what a note says. `doctor` measures the machine it runs on, and its
`Machine` takes the place of a row of this table.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher

from flux_quant.errors import UserError

GIB = 1 << 30
SHOWN = 0.96  # of a card's nominal memory, what torch counts: 5.79 of 6, 7.75 of 8, 10.76 of 11 GiB in error reports
DISPLAY = 500_000_000  # bytes that a desktop on the same card takes; cards without outputs have none
LANE = 12e9 / 16  # pinned bytes/s of a third-generation lane: x16 gives 11.3 to 12 GB/s, the fourth 22.5 to 25
PAGEABLE = 8e9  # bytes/s, typical; 2e9 were seen on laptops, 13e9 to 18e9 behind a fast fourth-generation x16 link
TRITON = (7, 0)  # lowest compute capability with our kernels
GEMM, ATTENTION, MEMORY = 0.8, 0.6, 0.88  # of the datasheet: expected of cuBLAS, flash attention, streaming kernels

# A processor with 8 cores and AVX2, for text encoders that stay on it; and a drive on four third-generation lanes.
CPU_FLOPS = 200e9
DISK = 3e9


@dataclass(frozen=True)
class Machine:
    """Rates in FLOP/s and bytes/s that can really be had, and bytes of memory. `source` says where they are from."""

    name: str
    source: str
    capability: tuple[int, int]
    total: int  # bytes of GPU memory, as torch counts them
    usable: int  # of them, without what other programs hold
    flops: Mapping[str, float]  # of matrix products: fp32, fp16, bf16, int8, fp8; what a card lacks is absent
    attention: float
    bandwidth: float
    pinned: float
    pageable: float
    disk: float = DISK
    cpu: float = CPU_FLOPS
    triton: bool = True  # our kernels run; else torch does their work, in more memory

    @property
    def dtype(self) -> str:
        """Of the activations: the first of bf16, fp16, fp32 that has fast products."""
        return next(name for name in ("bf16", "fp16", "fp32") if name in self.flops)


@dataclass(frozen=True)
class Gpu:
    name: str
    vram: int  # GiB, nominal
    capability: tuple[int, int]
    half: float  # TFLOP/s, fp16 and from 8.0 on bf16; of cards without tensor cores fp32
    bandwidth: int  # GB/s
    pcie: tuple[int, int]  # generation, lanes
    int8: float
    fp8: float | None = None
    display: bool = True
    note: str = ""

    @property
    def slug(self) -> str:
        return f"{self.name.lower().replace(' ', '-')}-{self.vram}gb"

    @property
    def total(self) -> int:
        return int(self.vram * SHOWN * GIB)

    @property
    def usable(self) -> int:
        return self.total - DISPLAY * self.display

    @property
    def link(self) -> float:
        """Expected bytes/s from pinned memory. Of the fifth generation nobody published a measurement."""
        generation, lanes = self.pcie
        return LANE * lanes * 2 ** (generation - 3)

    @property
    def has_tensor_cores(self) -> bool:
        return self.capability >= (7, 0)

    def tflops(self) -> dict[str, float]:
        """Datasheet rates by dtype of the product."""
        if not self.has_tensor_cores:
            return {"fp32": self.half}
        rates = {"fp16": self.half, "int8": self.int8}
        if self.capability >= (8, 0):
            rates["bf16"] = self.half
        return rates | ({"fp8": self.fp8} if self.fp8 else {})

    def machine(self) -> Machine:
        """This card in a machine of today, with what kernels usually reach of the datasheet."""
        return Machine(
            name=f"{self.name}, {self.vram} GB",
            source="datasheet",
            capability=self.capability,
            total=self.total,
            usable=self.usable,
            flops={name: rate * 1e12 * GEMM for name, rate in self.tflops().items()},
            attention=self.half * 1e12 * ATTENTION,
            bandwidth=self.bandwidth * 1e9 * MEMORY,
            pinned=self.link,
            pageable=min(PAGEABLE, self.link),
            triton=self.capability >= TRITON,
        )


MEASURED_H200 = "cuBLAS was measured at 790 TFLOP/s, memory at 4.3 TB/s"
GPUS: dict[str, Gpu] = {
    gpu.slug: gpu
    for gpu in (
        Gpu("GTX 1050 Ti", 4, (6, 1), 2.1, 112, (3, 16), 8.5, note="no tensor cores: float32, torch's own kernels"),
        Gpu("GTX 1070", 8, (6, 1), 6.5, 256, (3, 16), 25.8, note="no tensor cores: float32, torch's own kernels"),
        Gpu("RTX 2060", 6, (7, 5), 25.8, 336, (3, 16), 103, note="no bfloat16"),
        Gpu("RTX 3050", 8, (8, 6), 18.2, 224, (4, 8), 73),
        Gpu("RTX 3060", 12, (8, 6), 25.5, 360, (4, 16), 102),
        Gpu("RTX 3060 Ti", 8, (8, 6), 32.4, 448, (4, 16), 130),
        Gpu("RTX 3070", 8, (8, 6), 40.6, 448, (4, 16), 163),
        Gpu("RTX 3080", 10, (8, 6), 59.5, 760, (4, 16), 238),
        Gpu("RTX 3090", 24, (8, 6), 71, 936, (4, 16), 284),
        Gpu("RTX 4060", 8, (8, 9), 30.2, 272, (4, 8), 121, 60.5),
        Gpu("RTX 4060 Ti", 8, (8, 9), 44.1, 288, (4, 8), 177, 88.2),
        Gpu("RTX 4060 Ti", 16, (8, 9), 44.1, 288, (4, 8), 177, 88.2),
        Gpu("RTX 4070", 12, (8, 9), 58.3, 504, (4, 16), 233, 117),
        Gpu("RTX 4070 Ti Super", 16, (8, 9), 88.2, 672, (4, 16), 353, 176),
        Gpu("RTX 4080", 16, (8, 9), 97.5, 717, (4, 16), 390, 195),
        Gpu("RTX 4090", 24, (8, 9), 165, 1008, (4, 16), 661, 330),
        Gpu("RTX 5060", 8, (12, 0), 38.4, 448, (5, 8), 154, 76.8),
        Gpu("RTX 5060 Ti", 8, (12, 0), 47.4, 448, (5, 8), 190, 94.9),
        Gpu("RTX 5060 Ti", 16, (12, 0), 47.4, 448, (5, 8), 190, 94.9),
        Gpu("RTX 5070", 12, (12, 0), 61.7, 672, (5, 16), 247, 124),
        Gpu("RTX 5070 Ti", 16, (12, 0), 87.9, 896, (5, 16), 352, 176),
        Gpu("H100", 80, (9, 0), 989, 3350, (5, 16), 1979, 1979, display=False, note="SXM"),
        Gpu("H200", 141, (9, 0), 989, 4800, (5, 16), 1979, 1979, display=False, note=MEASURED_H200),
    )
}


def find_gpu(text: str) -> Gpu:
    """By slug, or by any words of it that fit one card: "3060", "rtx4060ti 16gb". UserError with suggestions."""
    wanted = words_of(text)
    fitting = [slug for slug in GPUS if set(wanted) <= set(words_of(slug))]
    fewest = min((len(words_of(slug)) for slug in fitting), default=0)
    shortest = [slug for slug in fitting if len(words_of(slug)) == fewest]  # "3060" is not the 3060 Ti
    if wanted and len(shortest) == 1:
        return GPUS[shortest[0]]
    if wanted and shortest:
        raise UserError(f"GPU {text}: {', '.join(shortest)} fit; write one of them")
    near = sorted(GPUS, key=lambda slug: -SequenceMatcher(None, "-".join(wanted), slug).ratio())[:3]
    raise UserError(f"GPU {text} is not in the table; near it: {', '.join(near)}; or give its memory with --vram")


def words_of(text: str) -> list[str]:
    """ "RTX 4060Ti 16GB" -> rtx, 4060, ti, 16gb."""
    return re.findall(r"\d+gb|\d+|[a-z]+", text.lower())
