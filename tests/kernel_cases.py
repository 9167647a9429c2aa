"""Which launches are compiled, for which architectures, and how many weights the counted instructions unpack.

A case calls a launcher of `kernels/` as it is, with tensors on the meta device in FLUX's shapes; tile sizes, warps and
stages are therefore the launcher's own. Importing this file imports no triton: the pytest process may have it in
interpreter mode, in which nothing can be compiled.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from flux_quant.codecs import rotation
from flux_quant.codecs.planar import FIELDS as MISALIGNED
from flux_quant.formats import FORMATS, IN_MEMORY, QuantFormat

M, N, K = 4608, 3072, 3072
EPS = 1e-6
H200 = 132  # multiprocessors
ALIGNED = {"q5_1": (16,), "q5_k": (128,), "q4_k": (128,), "iq4_xs": (128,)}  # largest field of a block, in bytes
PACKED = [  # as weights lie on a GPU
    *(IN_MEMORY[f"{name} planar"] for name in MISALIGNED),
    *(fmt for name, fmt in FORMATS.items() if not fmt.is_plain and name not in MISALIGNED),
    IN_MEMORY["fp8_rows"],
]
MAPPED = [FORMATS[name] for name in MISALIGNED]  # as they lie in a mapped file
EVERY = (61, 75, 80, 86, 89, 90, 120)  # compute capabilities: GTX 10, RTX 20, A100, RTX 30, RTX 40, H100, RTX 50
UNPACKING = 10  # thread-instructions per weight at which an H200 is still limited by its memory, half of what it has
# Thread-instructions that a card can issue while its memory moves a byte: RTX 2060, A100, 3060, 4070, H200, 5090.
ISSUE = {75: 11, 80: 14, 86: 20, 89: 32, 90: 7, 120: 33}
FUSED = {80: 8, 86: 8, 89: 8, 90: 5, 120: 8}  # of which a Hopper's faster tensor cores leave less


@dataclass(frozen=True)
class Case:
    """What is launched, and what it is held to.

    `weights` and `aim` are told the launch; `weights` also whether its code has a loop, because instructions are
    counted in the main loop, or in the whole program if there is none.
    """

    family: str
    what: str
    cc: int
    run: Callable[[], object]  # launches one kernel or more
    weights: Callable[
        [Any, bool], float | None
    ]  # (or elements) the counted instructions handle; None: a helper's launch
    aim: float | Callable[[Any], float] | None = None  # thread-instructions per weight
    wide: float = 0  # bytes per weight that must come in loads of 64 bits or more
    mma: str = ""  # pattern of the matrix instruction that must be there
    shown: tuple[str, ...] = ()  # arguments that tell the launches of a case from each other

    @property
    def name(self) -> str:
        return f"{self.family} {self.what} sm_{self.cc}"


def meta(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def float_of(cc: int) -> torch.dtype:
    """What FLUX is computed in there: bfloat16 from Ampere on."""
    return torch.bfloat16 if cc >= 80 else torch.float16


def share_of_program(launch: Any, loop: bool, elements: int = N * K) -> float:
    return elements / prod(launch.grid)


def weight(fmt: QuantFormat) -> list[Tensor]:
    return [meta(*part.shape((N, K)), dtype=part.dtype) for part in fmt.parts]


def dequantize(fmt: QuantFormat, cc: int) -> None:
    from flux_quant.kernels import triton_path

    triton_path.dequantize(fmt, weight(fmt), meta(N, K, dtype=float_of(cc)))


def in_blocks(fmt: QuantFormat) -> bool:
    return fmt.block > 1


def wide_bytes(fmt: QuantFormat) -> float:
    """Bytes per weight of a block's largest field: they must come in wide pieces, if the blocks' places allow it."""
    name = fmt.native or fmt.name
    if name in MISALIGNED and not fmt.native:
        return 0
    return max(MISALIGNED.get(name, ALIGNED.get(name, (1,)))) / fmt.block


def dequant_cases() -> Iterator[Case]:
    """As weights lie on a GPU, for every card; misaligned blocks, as in a mapped file, for three generations."""
    for cc in EVERY:
        for fmt in PACKED + MAPPED * (cc in (75, 86, 90)):
            run = partial(dequantize, fmt, cc)
            yield Case("dequant", fmt.name, cc, run, share_of_program, UNPACKING, wide_bytes(fmt))


def expand(fmt: QuantFormat) -> None:
    from flux_quant.kernels import expand8, triton_path

    (data,), scales, out = weight(fmt), meta(N, dtype=torch.float32), meta(N, K, dtype=torch.int8)
    expand8.expand(data, triton_path.kernel_rows(fmt, K), scales, rotation.DEFAULT, out)


def quantize_rows(what: str, channels: int, cc: int) -> None:
    from flux_quant.kernels import rows8

    x = meta(N, channels, dtype=float_of(cc))
    if what == "int8":
        rows8.quantize_rows(x, rotation.DEFAULT)
    else:
        rows8.quantize_fp8(x, what, meta(dtype=torch.float32))


def int8_product(cc: int) -> None:
    """Every tile that the tuner may try."""
    from flux_quant.kernels import int8

    a, w, scales = meta(M, K, dtype=torch.int8), meta(N, K, dtype=torch.int8), meta(M, 1, dtype=torch.float32)
    for config in int8.configs_for(divmod(cc, 10), M):
        int8.int8_matmul(a, scales, w, meta(N, dtype=torch.float32), None, float_of(cc), config)


def int8_product_tma() -> None:
    from flux_quant.kernels import int8_tma

    a, w, scales = meta(M, K, dtype=torch.int8), meta(N, K, dtype=torch.int8), meta(M, 1, dtype=torch.float32)
    for config in int8_tma.CONFIGS:
        int8_tma.int8_matmul_tma(a, scales, w, meta(N, dtype=torch.float32), None, torch.bfloat16, config, H200)


def int8_epilogue(cc: int) -> None:
    from flux_quant.kernels import int8

    acc, a_scale, w_scale = meta(M, N, dtype=torch.int32), meta(M, 1, dtype=torch.float32), meta(N, dtype=torch.float32)
    int8.finish(acc, a_scale, w_scale, meta(N, dtype=float_of(cc)), meta(M, N, dtype=float_of(cc)))


def int8_aim(launch: Any) -> float:
    """What an H200 can issue while its tensor cores multiply a weight with BM rows, at 4096 products a clock."""
    return max(1, launch.arguments["BM"] / 32)


def weight_tile(launch: Any, loop: bool) -> int:
    """Weights that a turn of a loop over K handles."""
    return launch.arguments["BN"] * launch.arguments["BK"]


def eight_bit_cases() -> Iterator[Case]:
    tile = ("BM", "BN", "BK")
    for cc in EVERY[1:]:
        for fmt in filter(in_blocks, PACKED if cc in (75, 86, 90, 120) else ()):
            aim = ISSUE[90] * (fmt.bits_per_weight / 8 + 1)
            yield Case("expand8", fmt.name, cc, partial(expand, fmt), share_of_program, aim, wide_bytes(fmt))
        for what in ["int8"] + ["row", "tensor"] * (cc >= 89):
            for channels in (3072, 15360):
                run = partial(quantize_rows, what, channels, cc)
                share = partial(share_of_program, elements=N * channels)
                yield Case("rows8", f"{what} {channels}", cc, run, share, 3 * ISSUE[90], wide=2)
        share = partial(share_of_program, elements=M * N)
        yield Case("int8", "epilogue", cc, partial(int8_epilogue, cc), share, 6 * ISSUE[90], wide=4)
        if cc >= 80:
            run = partial(int8_product, cc)
            yield Case("int8", "product", cc, run, weight_tile, int8_aim, 1, "IG?MMA", tile)
    # The loop over K holds the code between two tiles too: no budget for it.
    yield Case("int8", "tma", 90, int8_product_tma, weight_tile, mma="IGMMA", shown=tile)


def linear(module: str, fmt: QuantFormat, m: int, cc: int, every: bool = False) -> None:
    """A linear layer for m rows of input with the default configuration, or with every one that a tuner would try."""
    kernel, planes = import_module(f"flux_quant.kernels.{module}"), import_module("flux_quant.kernels.planes")
    path = import_module("flux_quant.kernels.triton_path")
    data, *scales = weight(fmt)
    rows = path.kernel_rows(fmt, K) if in_blocks(fmt) else planes.Rows("fp8", K)
    capability, x, bias = divmod(cc, 10), meta(m, K, dtype=float_of(cc)), meta(N, dtype=float_of(cc))
    for config in kernel.candidates(capability, rows.name, m, N, K) if every else [None]:
        kernel.linear(x, data, rows, bias, config, scale=scales[0] if scales else None)


def fused_step(launch: Any, loop: bool) -> int | None:
    """Weights of a step along K. The kernel that adds the parts of a sum that was split has none."""
    arguments = launch.arguments
    return arguments["BN"] * arguments["T"] * arguments["R"].layout.block if "R" in arguments else None


def vector_step(launch: Any, loop: bool) -> int | None:
    arguments = launch.arguments
    return arguments["BN"] * arguments["WARPS"] * 256 if "R" in arguments else None


def fused_cases() -> Iterator[Case]:
    """Every format on every card with its defaults; few rows, and all that a tuner tries, where the code differs."""
    tile = ("BM", "BN", "T")
    for fmt, cc in product(PACKED, EVERY[2:]):
        for m in (16, 512) if cc == 86 else (512,):
            run, mma = partial(linear, "matmul", fmt, m, cc), "HGMMA" if cc == 90 and m > 64 else "HMMA"
            yield Case("fused", f"{fmt.name} M{m}", cc, run, fused_step, FUSED[cc], wide_bytes(fmt), mma, tile)
    for fmt in MAPPED:
        run = partial(linear, "matmul", fmt, 512, 86)
        yield Case("fused", f"{fmt.name} M512", 86, run, fused_step, FUSED[86], mma="HMMA", shown=tile)
    for name, cc in product(("q4_k", "q8_0 planar"), (86, 90)):
        fmt = IN_MEMORY.get(name) or FORMATS[name]
        run = partial(linear, "matmul", fmt, 512, cc, every=True)
        yield Case("fused", f"{name} tiles", cc, run, fused_step, FUSED[cc], wide_bytes(fmt), "HG?MMA", tile)


def vector_cases() -> Iterator[Case]:
    for fmt, cc in product(PACKED, EVERY[1:]):
        aim = ISSUE[cc] * fmt.bits_per_weight / 8
        for m in (1, 2) if cc in (75, 86) else (1,):
            run = partial(linear, "vector", fmt, m, cc)
            yield Case("vector", f"{fmt.name} M{m}", cc, run, vector_step, aim, wide_bytes(fmt), shown=("BN",))
    for fmt in MAPPED:
        run, aim = partial(linear, "vector", fmt, 1, 86), ISSUE[86] * fmt.bits_per_weight / 8
        yield Case("vector", f"{fmt.name} M1", 86, run, vector_step, aim, shown=("BN",))


def modulated_norm(cc: int) -> None:
    from flux_quant.kernels import pointwise

    (x, out), (shift, scale) = stream(M, K, cc, 2), stream(1, K, cc, 2)
    pointwise.modulated_norm(x, shift, scale, EPS, out)


def heads(cc: int, copy_v: bool) -> None:
    from flux_quant.kernels import pointwise

    (wide,), channels = stream(M, 7 * K, cc, 1), 128
    q, k, v = (x.view(1, M, K // channels, channels) for x in stream(M, K, cc, 3))
    scales = [meta(channels, dtype=q.dtype)] * 2
    angles = [meta(M, channels // 2, dtype=torch.float32)] * 2
    pointwise.heads(wide[..., : 3 * K], scales, angles, 0, EPS, q, k, v if copy_v else None)


def gelu(cc: int) -> None:
    from flux_quant.kernels import pointwise

    (x,) = stream(M, 4 * K, cc, 1)
    pointwise.gelu(x, x)


def beside_gelu(cc: int) -> None:
    """As in a single block: q, k, v and MLP in, attention and MLP out."""
    from flux_quant.kernels import pointwise

    (y,), (wide,), (out,) = (stream(M, times * K, cc, 1) for times in (1, 7, 5))
    pointwise.beside_gelu(y, wide[..., 3 * K :], out)


def gated_sum(cc: int) -> None:
    from flux_quant.kernels import pointwise

    (x, y), (gate,) = stream(M, K, cc, 2), stream(1, K, cc, 1)
    pointwise.gated_sum(x, gate, y, y)


def stream(rows: int, width: int, cc: int, count: int) -> list[Tensor]:
    return [meta(1, rows, width, dtype=float_of(cc)) for _ in range(count)]


def heads_tile(launch: Any, loop: bool) -> int:
    """Elements of q, k and v that a turn of the loop over heads handles, or all its turns where it is unrolled."""
    arguments = launch.arguments
    return arguments["HEADS" if loop else "H"] * arguments["C"] * (3 if arguments["COPY_V"] else 2)


def pointwise_cases() -> Iterator[Case]:
    for cc in EVERY[1:]:
        row = partial(share_of_program, elements=M * K)
        yield Case("pointwise", "modulated_norm", cc, partial(modulated_norm, cc), row, 4 * ISSUE[90], wide=2)
        yield Case("pointwise", "heads", cc, partial(heads, cc, False), heads_tile, 4 * ISSUE[90], wide=2)
        yield Case("pointwise", "heads_and_v", cc, partial(heads, cc, True), heads_tile, 4 * ISSUE[90], wide=2)
        mlp = partial(share_of_program, elements=4 * M * K)
        yield Case("pointwise", "gelu", cc, partial(gelu, cc), mlp, 4 * ISSUE[90], wide=2)
        both = partial(share_of_program, elements=5 * M * K)
        yield Case("pointwise", "beside_gelu", cc, partial(beside_gelu, cc), both, 4 * ISSUE[90], wide=2)
        yield Case("pointwise", "gated_sum", cc, partial(gated_sum, cc), row, 6 * ISSUE[90], wide=4)


def example(name: str, cc: int) -> None:
    import kernel_examples as examples

    getattr(examples, name)(cc)


def example_cases() -> Iterator[Case]:
    """Kernels with known faults, to see that the instruments find them."""
    for name in ("copy_aligned", "copy_misaligned", "multiply", "multiply_in_one_warp"):
        for cc in (86, 90):
            yield Case("example", name, cc, partial(example, name, cc), share_of_program)


FAMILIES = (example_cases, dequant_cases, eight_bit_cases, pointwise_cases, fused_cases, vector_cases)
CASES = {case.name: case for cases in FAMILIES for case in cases()}
